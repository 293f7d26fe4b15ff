"""Publishing a model: the record of its run, measurements, plots, its card, and the push to the Hub.

Every number is counted in the saved files or measured, or marked as given by the author.
May import: errors, foreign, methods, config, model, engines, saved, structure, packed.
"""
