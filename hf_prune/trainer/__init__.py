"""Pruning in the events of a Trainer: training, saving and resuming, distilling, publishing.

`PruningCallback` is for any Trainer, `PruningMixin` and `PruningTrainer` reach what no callback can.
May import: every wing but recipe and cli.
"""
