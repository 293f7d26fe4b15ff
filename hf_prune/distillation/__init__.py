"""Knowledge distillation: losses, teachers, and which outputs of model and teacher are compared.

trainer/distilling.py connects it to the Trainer.
May import: errors, foreign, config, model.
"""
