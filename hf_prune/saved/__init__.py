"""Everything that is read from or written to a model's folder: weights, skeleton, zeros, masks and pruning state.

What a saved model says of itself is read here, once.
May import: errors, foreign, methods, config, model, engines.
"""
