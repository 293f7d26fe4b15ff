"""What a user may ask for, and the checks that all configurations share.

A configuration is frozen, and is checked whole when it is made.
May import: errors, methods.
"""
