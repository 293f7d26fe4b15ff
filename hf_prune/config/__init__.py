"""The configurations that users write, and the checks that they share.

A configuration is frozen, and is validated when it is created.
May import: errors, methods.
"""
