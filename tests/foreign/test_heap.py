"""What the C library does with memory that was freed, counted in pages that the system gave to a process of its own."""

import json
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import json, resource, sys
import torch
from hf_prune.foreign.heap import give_back_freed_memory, large_tensors_given_back, large_tensors_reused

torch.set_num_threads(1)
PAGES, TIMES = 512, 50  # a tensor of 2 MiB

def pages_taken(times=TIMES):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(PAGES * 4096, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

found = {}
with large_tensors_given_back():
    found["given back"] = pages_taken() / PAGES
with large_tensors_reused():
    pages_taken(20)  # the heap grows to the places that they need
    found["reused"] = pages_taken() / PAGES
    give_back_freed_memory()
    found["after it was given back"] = pages_taken(1) / PAGES
pages_taken(20)
found["afterwards"] = pages_taken() / PAGES
print(json.dumps(found))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these thresholds")
def test_memory_of_tensors_goes_back_at_once_or_serves_the_next_ones():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300, check=True)
    times = json.loads(done.stdout.splitlines()[-1])
    assert times["given back"] > 45  # all 50 tensors, each time anew
    assert times["reused"] < 1
    assert times["after it was given back"] > 0.9
    assert times["afterwards"] < 1  # as in any process that has had large tensors
