"""Tables of criteria, solvers, reconstructions, schedules, patterns, scopes and penalties, with their words and papers.

A new method is one entry in one of these tables. Nothing here uses a model, a Trainer or a file.
May import: errors.
"""
