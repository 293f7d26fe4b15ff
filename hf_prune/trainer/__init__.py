"""Pruning in the Trainer: training, saving and resuming, distilling, publishing.

`PruningCallback` works with any Trainer; `PruningMixin` and `PruningTrainer` do what no callback can.
May import: every wing but recipe and cli.
"""
