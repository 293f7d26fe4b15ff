"""Every architecture that can be built tiny, pruned at once from calibration data by `sparsegpt` and by `wanda`.

    python tests/architecture_oneshot.py [CLASS ...] [--jobs N]

The results are kept in architecture_oneshot.jsonl, a line for each class; those that are there are not tried again,
unless they are named. architectures.py writes them into its table. Each class is tried in a process of its own.
"""

import argparse
import copy
import math
import os
import re
import sys
import time
from fractions import Fraction
from pathlib import Path

import torch
import transformers
from architectures import NoTrialError, architectures, find_trial, study_all
from oneshot_results import METHODS, MOST_INPUTS, RESULTS, failures
from streamed import check, farthest, matrices_of, micro_batches, plain_outputs
from structure_results import read_results, versions, write_results

from hf_prune import CalibrationError, PruningConfig, prune
from hf_prune.model.targets import find_targets

MOST_SECONDS = 600  # of a class

# ---- One architecture ----


def study_at_once(architecture):
    """What `prune_at_once` returns, and the seconds of CPU; None where no tiny model can be built."""
    started = time.process_time()
    try:
        trial = find_trial(architecture)
    except NoTrialError:
        return None
    return prune_at_once(trial) | {"seconds": round(time.process_time() - started, 1)}


def prune_at_once(trial):
    """Prune with each method, and stream through the model once more with the weights that it got.

    Returns what the table says, how many tensors were left dense, and how many are too wide for `sparsegpt`.
    """
    dense = trial.model()
    targets = find_targets(dense)
    wide = [target.name for target in targets if math.prod(target.sides[1:]) > MOST_INPUTS]
    batches = micro_batches(trial.batch)
    is_random = any(map(farthest, *(plain_outputs(copy.deepcopy(dense), batches) for _ in range(2))))
    apart, left = {"pruned": 0.0, "dense": 0.0, "inputs": 0.0}, set()
    for method in METHODS:
        exclude = wide if method == "sparsegpt" else []
        config = PruningConfig(method=method, sparsity=0.5, exclude=[re.escape(name) for name in exclude])
        model, done = pruned(dense, batches, config)
        check_pruned(dense, model, done, [target for target in targets if target.name not in exclude])
        left |= set(done.left_dense)
        if not is_random:
            streamed = copy.deepcopy(dense)
            found = check(streamed, batches, matrices_of(model), exclude)
            outputs = zip(plain_outputs(streamed, batches), plain_outputs(model, batches), strict=True)
            found["pruned"] = max(found["pruned"], *(farthest(one, other) for one, other in outputs))
            apart = {name: max(value, found[name]) for name, value in apart.items()}
    differing = {name: value for name, value in apart.items() if value}
    assert not differing, f"outputs or inputs differ: {differing}"
    numbers = {name: len(names) for name, names in (("left", left), ("wide", wide)) if names}
    return {"result": "random" if is_random else "unreached" if left else "yes", **numbers}


def pruned(dense, batches, config):
    """A pruned copy, and what `prune` says; where it refuses layers that are never called, these stay dense."""
    model = copy.deepcopy(dense)
    try:
        return model, prune(model, config, batches)
    except CalibrationError as error:
        named = re.match(r"(\S+?)(?: and \d+ others)?: expected a call of its layer in the forward pass", str(error))
        if named is None:
            raise
        done = prune(model, config, batches, leave_unreached=True)
        assert done.left_dense[0] == named[1], f"{named[1]} was refused, but {done.left_dense} stayed dense"
        return model, done


def check_pruned(before, after, done, targets):
    """Exact counts, zeros that are there, and nothing else changed; AssertionError otherwise."""
    before, after = dict(before.named_parameters()), dict(after.named_parameters())
    numbers = {target.name: target.weights for target in targets if target.name not in done.left_dense}
    masked = {name: int((~mask).sum()) for name, mask in done.masks.items()}
    assert masked == {name: round(Fraction(number, 2)) for name, number in numbers.items()}, "not the counts asked for"
    assert not any(bool(after[name][~mask].any()) for name, mask in done.masks.items()), "a masked weight is not zero"
    assert all(bool(after[name].isfinite().all()) for name in masked), "a weight is not finite"
    if done.config.method == "wanda":
        before |= {name: before[name] * mask for name, mask in done.masks.items()}
        masked = {}
    changed = [name for name in before if name not in masked and not torch.equal(before[name], after[name])]
    assert not changed, f"{changed[0]} was changed"


# ---- All of them ----


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "classes", nargs="*", help="classes to try, again where they have results; without any, all others"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the results are kept")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    made_with, results = read_results(options.results)
    if made_with != versions():
        results = {}
    every = architectures(options.classes or None)
    chosen = [one for one in every if options.classes or one.class_name not in results]

    def keep(architecture, outcome):
        print(f"{architecture.class_name}: {outcome}", flush=True)
        results[architecture.class_name] = {name: one for name, one in (outcome or {}).items() if name != "seconds"}
        write_results(results, options.results)

    study_all(chosen, options.jobs, keep, study_at_once, MOST_SECONDS)
    failed = failures(results)
    print(f"{len(results)} classes have results; failed: {', '.join(failed) or 'none'}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
