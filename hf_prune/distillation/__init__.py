"""What a student learns from its teacher: losses, teachers, and which outputs are compared.

The Trainer's part of it is in trainer/distilling.py.
May import: errors, foreign, config, model.
"""
