"""Pruning a trained model at once from calibration data: each layer from its inputs in the model as pruned so far.

prune.py runs the whole; lockstep.py streams the inputs through the model's own forward.
May import: errors, foreign, methods, quantise, config, model, engines, structure, saved, masking.
"""
