"""Every architecture of transformers' auto mappings, tiny: built, pruned by half, trained for a step, saved and loaded.

    python tests/architectures.py [--only EXPRESSION] [--write docs/architectures.md] [--jobs N]

Models are built from their configuration classes alone, made small by tiny_configurations.py, and get their inputs from
tiny_inputs.py. What is tried there and does not work is no error: the next size, inputs or labels are tried, and the
table says what was in the way.
"""

import argparse
import copy
import dataclasses
import functools
import json
import os
import re
import resource
import signal
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import peft
import torch
import transformers
from oneshot_results import at_once_lines, kept_results
from structure_results import OPENED, REFUSED, STRUCTURES, read_results, versions
from tiny_configurations import SIZES, parts_of, ready_to_train, tiny_config
from tiny_inputs import loss_of, possible_inputs, possible_labels, what_is_missing
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto import configuration_auto, modeling_auto
from transformers.pytorch_utils import Conv1D

from hf_prune import Pruner, PruningConfig
from hf_prune.model.targets import find_targets

MOST_PARAMETERS = 5_000_000
MOST_SECONDS = 100
MOST_MEMORY = 12 << 30  # of addresses, in one process

# Why an architecture was not built, in the order of how far it came.
REASONS = {
    "configuration": "The class cannot be built from its configuration alone, or not in a small size.",
    "size": f"No configuration with at most {MOST_PARAMETERS:,} parameters was found from the names of its fields.",
    "inputs": "It was built, but no working inputs were found from the names of forward's arguments.",
    "training": "The model cannot be trained: it says so, or none of its outputs has a gradient.",
    "package": "The model needs a package that this project does not install (timm, natten, detectron2).",
}

# ---- Which ----

# Task -> mappings of transformers.models.auto.modeling_auto. A class counts for the first task that names it.
TASKS = {
    "causal language model": r"CAUSAL_LM",
    "masked language model": r"MASKED_LM",
    "sequence classification": r"SEQUENCE_CLASSIFICATION",
    "sequence to sequence": r"SEQ_TO_SEQ_CAUSAL_LM",
    "audio": r"AUDIO_.*|CTC|RNNT|TDT|SPEECH_SEQ_2_SEQ|TEXT_TO_(SPECTROGRAM|WAVEFORM)",
    "vision": r".*(IMAGE|VIDEO|VISUAL|OBJECT|SEGMENTATION|ESTIMATION|KEYPOINT|MASK_GENERATION).*",
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A class of transformers, and the model type whose configuration it is built from."""

    model_type: str
    class_name: str
    task: str


def architectures(only=None):
    """All classes of the tasks' mappings, each once, under its own model type where several name it.

    Each is imported to see that it is there; `only` names the classes that are wanted.
    """
    found = {}
    for task, expression in TASKS.items():
        for name in sorted(vars(modeling_auto)):
            if not re.fullmatch(f"MODEL_FOR_({expression})_MAPPING_NAMES", name):
                continue
            for model_type, classes in getattr(modeling_auto, name).items():
                for class_name in classes if isinstance(classes, (tuple, list)) else [classes]:
                    if only is not None and class_name not in only:
                        continue
                    if model_type in configuration_auto.CONFIG_MAPPING_NAMES and hasattr(transformers, class_name):
                        found.setdefault(class_name, (task, []))[1].append(model_type)
    rows = []
    for class_name, (task, model_types) in found.items():
        own = getattr(getattr(getattr(transformers, class_name), "config_class", None), "model_type", None)
        rows.append(Architecture(own if own in model_types else model_types[0], class_name, task))
    order = list(TASKS)
    return sorted(rows, key=lambda row: (order.index(row.task), row.model_type, row.class_name))


# ---- One architecture ----


@dataclasses.dataclass
class Trial:
    """An architecture made small, and a batch that it can be trained with."""

    model_class: type
    config: PreTrainedConfig
    batch: dict
    parameters: int

    def model(self):
        """A new model, the same each time. Weights that begin as zeros are drawn, as if they were trained already."""
        torch.manual_seed(0)
        model = self.model_class(copy.deepcopy(self.config)).train()
        by_name = dict(model.named_parameters())
        for target in find_targets(model):
            if not by_name[target.name].all():
                nn.init.normal_(by_name[target.name], std=0.02)
        return model


class NoTrialError(Exception):
    """No size, inputs and labels were found that an architecture can be trained with; the reason is the argument."""


def find_trial(architecture):
    """The first configuration, inputs and labels that an architecture computes a gradient with."""
    failures = []
    for size in SIZES:
        torch.manual_seed(0)
        try:
            config, model = small_model(architecture, size)
        except Exception as error:  # noqa: BLE001 - whatever is raised, this size does not do
            failures.append((_reason(error, "configuration"), error))
            continue
        batch = first_batch(model, config, failures)
        if batch is not None:
            return Trial(type(model), config, batch, _parameters(model))
    order = list(REASONS)
    reason, error = max(failures, key=lambda failure: order.index(failure[0]))
    raise NoTrialError(reason, f"{type(error).__name__}: {error}"[:300])


def small_model(architecture, size):
    """A configuration of this size, and the model; TooLargeError where it is not small."""
    model_class = getattr(transformers, architecture.class_name)
    config_class = getattr(transformers, configuration_auto.CONFIG_MAPPING_NAMES[architecture.model_type])
    config = ready_to_train(tiny_config(config_class(), size))
    own = getattr(model_class, "config_class", None)
    if own is not None and not isinstance(config, own):  # a part of a composite model
        config = next((part for part in parts_of(config) if isinstance(part, own)), config)
    try:
        with torch.device("meta"):
            parameters = _parameters(model_class(copy.deepcopy(config)))
    except Exception:  # noqa: BLE001 - some read numbers while they are built
        parameters = 0
    model = model_class(copy.deepcopy(config)) if parameters <= MOST_PARAMETERS else None
    if model is None or _parameters(model) > MOST_PARAMETERS:
        raise TooLargeError(f"more than {MOST_PARAMETERS:,} parameters")
    return config, model


def first_batch(model, config, failures):
    """The first inputs and labels that a model computes a gradient with; None, with the failures, if there are none."""
    inputs = possible_inputs(model, config)
    while True:
        try:
            given = next(inputs)
            given |= what_is_missing(model, given)
        except StopIteration:
            failures.append(("inputs", None))
            return None
        except Exception as error:  # noqa: BLE001 - no inputs for such a configuration
            failures.append(("inputs", error))
            return None
        for labels in possible_labels(model, given):
            stage = "inputs"
            try:
                output = model.train()(**given, **labels)
                stage = "training"
                loss = loss_of(output)
                loss.backward()
                model.zero_grad()
                if not loss.isfinite():
                    raise ValueError("the loss is not finite")
            except Exception as error:  # noqa: BLE001 - nor do these inputs
                failures.append((_reason(error, stage), error))
            else:
                return given | labels


class TooLargeError(Exception):
    """A model has more parameters than are taken here."""


def _parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def _reason(error, stage):
    text = f"{type(error).__name__}: {error}"
    if re.search(r"requires the .* library|ImportError|ModuleNotFound", text):
        return "package"
    if isinstance(error, TooLargeError):
        return "size"
    if re.search(r"not support training|NotImplementedError|to run in training mode", text):
        return "training"
    return stage


def expected_masked(targets, scope):
    """How many weights half of the targets are: rounded half to even, a tensor (layer) or in total (global)."""
    numbers = [target.weights for target in targets]
    numbers = [sum(numbers)] if scope == "global" else numbers
    return sum(round(Fraction(number, 2)) for number in numbers)


def prune_in_loop(trial, model, config):
    """One optimizer step in a loop of one's own; the pruner."""
    pruner = Pruner(model, config, total_steps=1)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-3)
    torch.manual_seed(1)
    loss_of(model(**trial.batch)).backward()
    pruner.mask_gradients()
    optimizer.step()
    pruner.step(optimizer)
    return pruner


def check(trial, scope, prune=prune_in_loop):
    """Prune, train, save and load; the masked share of all parameters. AssertionError where something is wrong."""
    model = trial.model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    config = PruningConfig(method="magnitude", sparsity=0.5, schedule="one_shot", begin=0, scope=scope)
    pruner = prune(trial, model, config)
    masks = pruner.masks
    masked = {name: int((~mask).sum()) for name, mask in masks.items()}
    assert sum(masked.values()) == expected_masked(pruner.targets, scope), "not as many weights are masked as asked"
    if scope == "layer":
        assert masked == {target.name: round(Fraction(target.weights, 2)) for target in pruner.targets}
    by_name = dict(model.named_parameters())
    assert any(not torch.equal(before[name], by_name[name]) for name in by_name), "nothing was trained"
    zeros = {name: by_name[name] == 0 for name in masks}
    assert all(bool(zeros[name][~mask].all()) for name, mask in masks.items()), "a masked weight is not zero"
    check_targets(model, pruner.targets)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = dict(trial.model_class.from_pretrained(folder).named_parameters())
    assert all(torch.equal(again[name] == 0, there) for name, there in zeros.items()), "other zeros were loaded"
    return sum(masked.values()) / trial.parameters


PRUNABLE = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d)


def check_targets(model, targets):
    """None of the targets is an embedding, a norm, a head, or a router, told without what `hf_prune` tells them by."""
    owners = {
        f"{path}.{name}" if path else name: module
        for path, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    }
    by_name = dict(model.named_parameters())
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    embeddings |= {id(getattr(head, "weight", None))}
    base = {id(parameter) for parameter in model.base_model.parameters()}
    experts = {
        getattr(part, name, None)
        for part in parts_of(model.config)
        for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    }
    for target in targets:
        owner, parameter = owners[target.name], by_name[target.name]
        kind = type(owner).__name__.lower()
        is_fused = parameter.ndim == 3 and any(word in kind for word in ("expert", "moe", "attention"))
        is_kind = isinstance(owner, PRUNABLE) or is_fused or (parameter.ndim == 2 and "linear" in kind)
        assert is_kind, f"{target.name} is of a {type(owner).__name__}"
        assert id(parameter) not in embeddings, f"{target.name} is an embedding"
        assert id(parameter) in base, f"{target.name} is of a head"
        chooses = re.search(r"router|\.(gate|gating|wg)\.", target.name) and parameter.shape[0] in experts
        assert parameter.ndim != 2 or not chooses, f"{target.name} is a router"


def study(architecture):
    """What the table says of an architecture: tensors and shares of parameters pruned, or the reason and the error."""
    try:
        trial = find_trial(architecture)
    except NoTrialError as error:
        reason, detail = error.args
        return {"reason": reason, "error": detail}
    targets = find_targets(trial.model())
    return {
        "tensors": len(targets),
        "layer": f"{check(trial, 'layer'):.2%}",
        "global": f"{check(trial, 'global'):.2%}",
    }


# ---- All of them ----


def aside(work, seconds):
    """What `work` returns, called in a process of its own, within limits of time and memory.

    An `error` alone where it raises an exception, or ends in another way.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        signal.alarm(seconds)
        warnings.simplefilter("ignore")  # models warn of their own configurations and inputs
        try:
            with os.fdopen(write, "w") as out:
                json.dump(_outcome(work), out)
        finally:
            os._exit(0)  # even where the parent has ended: this process must not go on in its place
    os.close(write)
    with os.fdopen(read) as back:
        said = back.read()
    _, status = os.waitpid(child, 0)
    return json.loads(said) if said else {"error": f"the process ended with status {status}: time or memory ran out"}


def _outcome(work):
    try:
        return work()
    except BaseException as error:  # noqa: BLE001 - told to the parent, whatever it is
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def study_aside(architecture, study=study, seconds=MOST_SECONDS):
    """`study` in a process of its own; an `error` without a reason is a failure."""
    return aside(functools.partial(study, architecture), seconds)


def study_all(chosen, jobs, tell=lambda architecture, outcome: None, study=study, seconds=MOST_SECONDS):
    """Architecture -> outcome, several processes at once, each forked from this one, and each with so many seconds."""
    torch.set_num_threads(1)
    outcomes = {}
    work = functools.partial(study_aside, study=study, seconds=seconds)
    with ThreadPoolExecutor(jobs) as pool:
        for architecture, outcome in zip(chosen, pool.map(work, chosen), strict=True):
            tell(architecture, outcome)
            outcomes[architecture] = outcome
    return outcomes


TABLE_HEAD = """\
hf-prune does not know models by name. This table covers every causal-LM, masked-LM, sequence-classification,
sequence-to-sequence, audio and vision class of transformers' auto mappings, each built in a tiny size from its
configuration class alone. Each model that can be built is pruned by half, with the scopes `layer` and `global`,
trained for one step, saved, and loaded with `from_pretrained`. The test checks that the number of masked weights is
exact, that all of them are zero after the step, and that the zeros are at the same places after loading. No
embedding, norm, head or router is pruned.

**{} of {} classes, of {} of {} model types, were built, and all of these pass.** The columns "Layer" and "Global"
give the share of zeros among all parameters of the tiny model. Embeddings and heads weigh more in a tiny model than
in a real one. A model with 0 tensors has no weights of the kinds that are pruned by default."""


WORDS = {"hidden": "hidden dimensions"}
STRUCTURES_HEAD = """\
The columns from "Neurons" to "Hidden" say whether [structures](structures.md) can be removed. Half of the neurons,
heads or hidden dimensions of each layer, or half of the layers, are cut out of the tiny model, which is saved, and
opened by `from_pretrained` with `import hf_prune`, and without. The opened model must have the outputs of the one that
was saved, and of the masked one before it was cut. Of composite models, it is enough that one part can be made smaller,
such as the encoder. `make test-all` tries every 20th class again.

{} The numbers in brackets are those of neurons, heads, layers and hidden dimensions:"""


def structure_lines(rows):
    """What the columns of structures say, and how many of these classes there are of each."""
    counts = [
        f"the {WORDS.get(structure, structure)} of {sum(row[structure] in OPENED for row in rows)}"
        for structure in STRUCTURES
    ]
    number = f"**Of {len(rows)} classes, {', '.join(counts[:-1])} and {counts[-1]} can be removed.**"
    lines = ["", *STRUCTURES_HEAD.format(number).splitlines(), ""]
    meanings = {**OPENED, **{word: meaning for word, (meaning, _) in REFUSED.items()}}
    for word, meaning in meanings.items():
        numbers = [sum(row[structure] == word for row in rows) for structure in STRUCTURES]
        if any(numbers):
            lines.append(f"- **{word}** ({', '.join(map(str, numbers))}): {meaning}")
    return lines


def results_of(built):
    """Class name -> what is kept of its structures; nothing where one of these classes lacks, or of other versions."""
    made_with, results = read_results()
    complete = made_with == versions() and all(STRUCTURES[0] in results.get(one.class_name, {}) for one in built)
    return {one.class_name: results[one.class_name] for one in built} if complete else {}


def table(outcomes):
    """The text of docs/architectures.md."""
    built = {architecture for architecture, outcome in outcomes.items() if "layer" in outcome}
    types = {architecture.model_type for architecture in built}
    every = {architecture.model_type for architecture in outcomes}
    results = results_of(built)
    names = [structure.capitalize() for structure in STRUCTURES] if results else []
    at_once = {name: one for name, one in kept_results().items() if name in {one.class_name for one in built}}
    lines = [
        "# Architectures",
        "",
        *TABLE_HEAD.format(len(built), len(outcomes), len(types), len(every)).splitlines(),
        "",
        f"Made with torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__} and peft "
        f"{peft.__version__} by `make architectures`; `make test-all` tries every 20th",
        "class again and compares its row.",
        "",
        "If a row has no shares, it gives one of these reasons:",
        "",
    ]
    for reason, sentence in REASONS.items():
        number = sum(outcome.get("reason") == reason for outcome in outcomes.values())
        lines.append(f"- **{reason}** ({number}): {sentence}")
    lines += structure_lines(results.values()) if results else []
    lines += at_once_lines(at_once.values()) if at_once else []
    titles = [*names, "At once"] if at_once else names
    for task in TASKS:
        lines += ["", f"## {task[0].upper()}{task[1:]}", ""]
        lines.append("| " + " | ".join(["Model type", "Class", "Tensors", "Layer", "Global", *titles]) + " |")
        lines.append("|---|---|---:|---:|---:|" + "---|" * len(titles))
        for architecture, outcome in outcomes.items():
            if architecture.task == task:
                cells = [outcome[key] for key in ("tensors", "layer", "global")] if "layer" in outcome else None
                cells = cells or ["", outcome.get("reason", "**fails**"), ""]
                words = results.get(architecture.class_name, {})
                cells += [words.get(name.lower(), "") for name in names]
                cells += [at_once.get(architecture.class_name, {}).get("result", "")] if at_once else []
                lines.append(
                    "| " + " | ".join([architecture.model_type, architecture.class_name, *map(str, cells)]) + " |"
                )
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="classes and model types in which this expression is found")
    parser.add_argument("--write", type=Path, help="where to write the table")
    parser.add_argument("--json", type=Path, help="where to write the outcomes")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    chosen = [one for one in architectures() if re.search(options.only, f"{one.model_type} {one.class_name}")]
    outcomes = study_all(chosen, options.jobs, functools.partial(print, flush=True))
    if options.write:
        options.write.write_text(table(outcomes))
    if options.json:
        rows = [[*dataclasses.astuple(architecture), outcome] for architecture, outcome in outcomes.items()]
        options.json.write_text(json.dumps(rows, indent=0))
    failed = [
        architecture for architecture, outcome in outcomes.items() if "layer" not in outcome and "reason" not in outcome
    ]
    built = sum("layer" in outcome for outcome in outcomes.values())
    print(f"{built} of {len(outcomes)} built, {len(failed)} of these fail")
    sys.exit(bool(failed))


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
