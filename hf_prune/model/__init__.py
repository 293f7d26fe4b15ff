"""What a model consists of: parameter names, tensor layouts, layers, stacks, experts, adapters; and pruning targets.

Everything is derived from the modules themselves, never from a model's name.
May import: errors, foreign.
"""
