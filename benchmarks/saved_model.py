"""What the end of a recipe reads of the model it saved: skeletons, counts of zeros, hashes, bytes and time.

python benchmarks/saved_model.py [--layers 16] [--shard 300MB] [--rounds 3] [--threads 1]

A random Llama, pruned to 80%, is saved in shards with its masks, as a Trainer saves it. Then comes what a recipe that
pushes does: the record, the card, the report, and the plan of the push to a repository that is not there yet. The
sending is left out. Beside it: reading the files of weights once, hashing them once and counting zeros once.
"""

import argparse
import contextlib
import hashlib
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import LlamaConfig, LlamaForCausalLM, logging

from hf_prune import Pruner, PruningConfig
from hf_prune.publish.card import write_card
from hf_prune.publish.push_plan import NOTHING_THERE, make_push_plan
from hf_prune.publish.record import RunRecord, save_record
from hf_prune.saved import model as saved_model
from hf_prune.saved import zeros
from hf_prune.saved.model import SavedModel
from hf_prune.saved.report import make_report

CONFIG = PruningConfig(sparsity=0.8, schedule="one_shot", begin=1)


def save_model(folder: str, layers: int, shard: str) -> int:
    """Save a pruned model with random weights, in float32; how many weights it has."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 16}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, tie_word_embeddings=False, **sizes))
    pruner = Pruner(model, CONFIG, total_steps=2)
    pruner.update(1)
    model.save_pretrained(folder, max_shard_size=shard)
    pruner.save(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def publish(folder: str) -> None:
    """What a recipe that pushes does with the model it saved, but for the sending."""
    saved = SavedModel(folder)
    save_record(saved, RunRecord(name="A model", pruning=[CONFIG.to_dict()], weights=saved.hashes))
    write_card(saved)
    make_report(saved)
    make_push_plan(saved, "somebody/model", NOTHING_THERE)


@contextlib.contextmanager
def counted() -> Iterator[Counter]:
    """Count skeletons, and files that are hashed and counted, with their bytes."""
    found: Counter = Counter()

    def counting(function: Callable, what: str, size_of: Callable[[Any], int]) -> Callable:
        def call(argument: Any, *arguments: Any, **options: Any) -> Any:
            found[what] += 1
            found["bytes"] += size_of(argument)
            return function(argument, *arguments, **options)

        return call

    def size_of_file(path: Path) -> int:
        return path.stat().st_size

    with (
        mock.patch.object(
            saved_model, "build_skeleton", counting(saved_model.build_skeleton, "skeletons", lambda _: 0)
        ),
        mock.patch.object(zeros, "count_zeros", counting(zeros.count_zeros, "counts", size_of_file)),
        mock.patch.object(
            hashlib, "file_digest", counting(hashlib.file_digest, "hashes", lambda file: size_of_file(Path(file.name)))
        ),
    ):
        yield found


def read(folder: str) -> None:
    """Read the files of weights through, into one buffer."""
    buffer = bytearray(1 << 20)
    for path in SavedModel(folder).weight_files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def seconds_of(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--shard", default="300MB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        weights = save_model(folder, options.layers, options.shard)
        files, size = len(SavedModel(folder).weight_files), SavedModel(folder).file_bytes
        with counted() as found:
            publish(folder)
        tasks: dict[str, Callable[[], Any]] = {
            "read once": lambda: read(folder),
            "hash once": lambda: SavedModel(folder).hashes,
            "count once": lambda: SavedModel(folder).tensors,
            "record, card, report, plan": lambda: publish(folder),
        }
        times: dict[str, list[float]] = {name: [] for name in tasks}
        for _ in range(options.rounds):
            for name, task in tasks.items():
                times[name].append(seconds_of(task))
    print(f"{weights:,} weights, {size:,} bytes in {files} files, {options.threads} thread(s), {options.rounds} rounds")
    print(
        f"{found['skeletons']} skeleton(s), each file hashed {found['hashes'] / files:g} time(s) and its zeros counted "
        f"{found['counts'] / files:g} time(s): {found['bytes']:,} bytes, {found['bytes'] / size:.2f} times the model"
    )
    for name, values in times.items():
        print(f"{name:>26}: median {statistics.median(values):.2f} s, least {min(values):.2f} s")
    floor = statistics.median(times["hash once"]) + statistics.median(times["count once"])
    print(f"ratio to one hash and one count: {statistics.median(times['record, card, report, plan']) / floor:.2f}")


if __name__ == "__main__":
    main()
