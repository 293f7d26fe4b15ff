"""Neurons, heads, layers and width of every architecture that can be built tiny: removed, saved, and opened again.

    python tests/architecture_structures.py [CLASS ...] [--jobs N]

The results are kept in architecture_structures.jsonl, a line for each class; those that are there are not tried again,
unless they are named. architectures.py writes them into its table. Each class is tried in a process of its own.
"""

import argparse
import functools
import os
import re
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import transformers
from architectures import Architecture, NoTrialError, architectures, aside, find_trial
from structure_results import OPENED, REFUSED, RESULTS, STRUCTURES, failures, read_results, versions, write_results
from torch import nn

from hf_prune import Pruner, PruningConfig, StructureError
from hf_prune.errors import first_line
from hf_prune.model import per_layer
from hf_prune.structure.coupled import find_families
from hf_prune.structure.proof import TOLERANCES, answers, largest_difference, sample_inputs

MOST_SECONDS = 300  # of a structure of a class

# ---- One architecture ----


def study_structures(architecture):
    """Structure -> what the table says, and under `why` what the errors said; None where no tiny model can be built."""
    try:
        trial = find_trial(architecture)
    except NoTrialError:
        return None
    results, why = {}, {}
    for structure in ("neurons", "layers", "hidden"):  # the processes that are forked from this one remember the shapes
        with suppress(StructureError):
            find_families(trial.model(), structure)
    for structure in STRUCTURES:
        with tempfile.TemporaryDirectory() as folder:
            # in a process of its own, so that this one stays as it is without `import hf_prune`
            outcome = aside(functools.partial(remove, trial, structure, Path(folder)), MOST_SECONDS)
            if outcome.get("result") == "with import":
                outcome = open_plainly(trial, Path(folder))
        results[structure] = outcome.get("result", "fails")
        if results[structure] not in OPENED:
            why[structure] = outcome["error"]
    return results | {"why": why}


def remove(trial, structure, folder):
    """Remove half of a structure, save the model, and open it with `import hf_prune`: what the table says of it so far.

    AssertionError where the model that is opened answers otherwise.
    """
    model = trial.model().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # no bias stays zero, or removing the wrong one would change nothing
            if parameter.dim() == 1 and parameter.is_floating_point():
                parameter.add_(0.02 * torch.randn_like(parameter))
    for dtype in TOLERANCES:
        nn.Module.to(model, dtype)
        inputs = sample_inputs(model, lambda: trial.batch)
        if inputs is not None:
            break
    config = PruningConfig(structure=structure, sparsity=0.5, method="magnitude", schedule="one_shot", begin=0)
    try:
        pruner = Pruner(model, config, total_steps=1, example=trial.batch)
    except StructureError as error:
        return refusal(first_line(error).removeprefix("structure: "))
    assert inputs is not None, "the units were tried, but no inputs are found here"
    pruner.step()
    masked = answers(model, inputs)
    pruner.shrink()
    expected = answers(model, inputs)
    same = [index for index, one in enumerate(masked) if one.shape == expected[index].shape]  # others are hidden states
    check_alike(
        *([some[index] for index in same] for some in (masked, expected)), model.dtype, "smaller and masked model"
    )
    model.save_pretrained(folder)
    torch.save((inputs, expected, model.dtype), folder / "answers.pt")
    check_opened(trial, folder, "the opened model and the smaller one")
    return {"result": "with import"}


def refusal(message):
    """The word for the reason that an error names; a failure where it is none of those that are known."""
    found = [word for word, (_, expression) in REFUSED.items() if re.search(expression, message)]
    return {"result": found[0] if len(found) == 1 else "fails", "error": message[:300]}


def open_plainly(trial, folder):
    """What the table says of a model that was saved with `import hf_prune`, opened in a process without it."""
    with without_import():
        try:
            check_opened(trial, folder, "the model opened without `import hf_prune` and the smaller one")
        except AssertionError as error:
            return {"error": str(error)}
        except Exception as error:  # noqa: BLE001 - of any class, where nothing but the import is missing
            if not per_layer.needs_import(trial.model_class.config_class.from_pretrained(folder)):
                return {"error": f"{type(error).__name__}: {error}"[:300]}
            return {"result": "with import"}
    return {"result": "yes"}


@contextmanager
def without_import():
    """Let models open as in a process that has not imported hf_prune, as far as that was not asked for yet."""
    teach = per_layer.teach
    per_layer.teach = lambda config: None
    try:
        yield
    finally:
        per_layer.teach = teach


def check_opened(trial, folder, which):
    inputs, expected, dtype = torch.load(folder / "answers.pt")
    opened = trial.model_class.from_pretrained(folder, dtype=dtype).eval()
    nn.Module.to(opened, dtype)
    check_alike(expected, answers(opened, inputs), dtype, which)


def check_alike(expected, found, dtype, which):
    """AssertionError where the outputs of two models differ by more than rounding; norms round to float32."""
    assert [one.shape for one in expected] == [one.shape for one in found], f"{which} have outputs of other shapes"
    scale = max((float(one.abs().max()) for one in expected if one.numel()), default=0.0)
    difference = largest_difference(expected, found)
    tolerance = max(TOLERANCES[dtype], 1e-6)
    assert difference <= tolerance * max(scale, 1e-30), f"{which} differ by {difference / max(scale, 1e-30):.1e}"


# ---- All of them ----


def warm_up():
    """Remove, save and open once, for what transformers and torch compute then only: processes forked later have it."""
    trial = find_trial(Architecture("llama", "LlamaForCausalLM", "causal language model"))
    with tempfile.TemporaryDirectory() as folder:
        remove(trial, "neurons", Path(folder))


def study_structures_of(chosen, jobs, keep=lambda architecture, outcome: None):
    """Class name -> what `study_structures` returns; a class that fails as a whole has an `error` instead.

    `keep` is called with each as soon as it is known.
    """
    torch.set_num_threads(1)
    warm_up()

    def study(architecture):
        started = time.perf_counter()
        outcome = aside(functools.partial(study_structures, architecture), len(STRUCTURES) * MOST_SECONDS)
        keep(architecture, outcome)
        print(f"{architecture.class_name}: {time.perf_counter() - started:.1f} s, {outcome}", flush=True)
        return outcome

    with ThreadPoolExecutor(jobs) as pool:
        return dict(zip([one.class_name for one in chosen], pool.map(study, chosen), strict=True))


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
        results[architecture.class_name] = outcome or {}
        write_results(results, options.results)

    study_structures_of(chosen, options.jobs, keep)
    failed = failures(results)
    print(f"{len(results)} classes have results; failed: {', '.join(failed) or 'none'}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
