"""What other libraries do not document and this package needs: a file a library, an entry a name.

Where an entry is missing or has changed, IncompatibleVersionError says so in one line.
May import: errors.
"""
