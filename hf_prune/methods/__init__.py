"""Pure tables of how to prune: criteria, schedules, patterns, scopes and penalties, with their words and papers.

A new method is one entry in one of these tables. Nothing here knows a model, a Trainer or a file.
May import: errors.
"""
