"""What pruning took from a model, and what it changed in its answers: measured on samples, and shown as a page.

Pure functions of tensors and samples first; the schema of what they find is publish.explanation, which cards read.
May import: errors, foreign, methods, config, model, engines, saved, structure, packed, publish.
"""
