"""Few values for many weights: codebooks by k-means, which weight gets which value, and counting distinct values.

Pure functions of tensors.
May import: errors, methods.
"""
