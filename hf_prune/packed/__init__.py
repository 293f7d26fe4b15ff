"""Packed weights: tensors as entropy-coded blocks of bytes, files of such blocks, and how transformers opens them.

Nothing is lost: the dense file comes back bit for bit.
May import: errors, foreign, config.
"""
