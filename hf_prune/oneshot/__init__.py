"""Pruning from calibration data, layer by layer: the inputs of each layer in the model as it is pruned so far.

lockstep.py streams them through the model's own forward, discovery.py finds how a model calls its layers.
May import: errors, foreign, methods, config, model, structure, masking.
"""
