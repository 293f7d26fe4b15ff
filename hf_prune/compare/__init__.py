"""Several saved models side by side: which gives what quality at which sparsity, size and time, and which is best.

What is compared was counted in the files, or measured with these very weights.
May import: errors, config, saved, publish.
"""
