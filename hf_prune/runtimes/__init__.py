"""Where pruned models run: on CPUs by sparse products, on GPUs by 2:4 kernels, and in other runtimes, measured there.

May import: errors, foreign, model, config, structure, saved, publish, recipe.
"""
