"""What is read of saved models, counted by path: skeletons, counts of zeros, and hashes of whole files."""

import hashlib
from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest import mock

from hf_prune.publish import push_plan
from hf_prune.saved import model, zeros


@contextmanager
def counted_reads():
    """The real functions, and how often they were called for which path."""
    reads = {"skeletons": Counter(), "counts": Counter(), "hashes": Counter()}

    def count(module, name, what, path_of=str):
        function = getattr(module, name)

        def call(first, *arguments, **options):
            if not isinstance(first, bytes):
                reads[what][path_of(first)] += 1
            return function(first, *arguments, **options)

        return mock.patch.object(module, name, call)

    with ExitStack() as stack:
        stack.enter_context(count(model, "build_skeleton", "skeletons"))
        stack.enter_context(count(zeros, "count_zeros", "counts"))
        stack.enter_context(count(hashlib, "file_digest", "hashes", lambda file: str(file.name)))
        stack.enter_context(count(push_plan, "_pieces", "hashes"))
        yield reads


def of_weights(paths):
    """Of counted paths, those of weights."""
    return {path: times for path, times in paths.items() if path.endswith(".safetensors") and "mask" not in path}
