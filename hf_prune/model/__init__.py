"""What a model is made of: parameter names, layouts of tensors, layers, stacks, experts, and what may be pruned.

Everything is found from the modules themselves, never from a model's name.
May import: errors, foreign.
"""
