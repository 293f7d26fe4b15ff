"""Undocumented names of other libraries that this package needs: one file per library, one entry per name.

If a name is missing or has changed, IncompatibleVersionError says so in one line.
May import: errors.
"""
