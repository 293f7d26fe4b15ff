"""Recipes, from a YAML file to a finished run: schema, data, tasks, metrics and models.

`loading.py` reads and checks a recipe, `run.py` runs it.
May import: every wing but cli.
"""
