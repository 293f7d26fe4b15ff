"""Everything that is read from or written to a model's folder: weights, skeleton, zeros, masks and pruning state.

What is known about a saved model is read here, once.
May import: errors, foreign, methods, quantise, config, model, engines, structure, packed.
"""
