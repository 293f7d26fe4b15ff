"""Units of a model that can be removed as a whole (neurons, heads, layers), and the model that is left without them.

May import: errors, foreign, config, model.
"""
