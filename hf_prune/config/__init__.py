"""The configurations that users write, the checks that they share, and JSON and YAML that is read within limits.

A configuration is frozen, and is validated when it is created.
May import: errors, methods, quantise.
"""
