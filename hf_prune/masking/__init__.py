"""Which weights are masked, and that they stay zero: plans, statistics, ranking, selection, masks, and `Pruner`.

One mask update runs from groups.py through ranking.py and selection.py to masks.py.
May import: errors, methods, quantise, config, model, engines, saved, structure.
"""
