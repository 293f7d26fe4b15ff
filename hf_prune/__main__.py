"""`python -m hf_prune` is `hf-prune`."""

from .cli.commands import main

main()
