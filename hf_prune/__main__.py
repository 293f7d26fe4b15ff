"""`python -m hf_prune` is `hf-prune`."""

from .cli import main

main()
