"""What can be removed from a model as a whole, such as neurons, layers and unused tokens, and the model that is left.

May import: errors, foreign, methods, config, model.
"""
