"""Sweeps: one recipe run with many settings, a grid or trials of optuna, with one dense run; ends in a comparison.

May import: errors, foreign, config, engines, saved, publish, compare, trainer, recipe.
"""
