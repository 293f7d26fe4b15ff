"""What can be removed from a model as a whole, such as neurons, layers and unused tokens, and the model that is left.

targeting.py finds which to remove for a speed-up or a size that is asked for.
May import: errors, foreign, methods, config, model.
"""
