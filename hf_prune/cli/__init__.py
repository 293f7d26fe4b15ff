"""The commands of `hf-prune`, and the tables they print.

Only this wing prints and turns errors into exit codes.
May import: every wing.
"""
