"""What a run was made with and what came of it, described and measured for its record."""

import dataclasses
import enum
import hashlib
import importlib.metadata
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import TrainingArguments

from .distributed import gather
from .engines import engine_of
from .penalties import PENALTIES
from .record import Emissions, Hardware, Source
from .targets import shape_of

# Entries of the log that are kept; every evaluation is.
_LOGGED_STEPS = 1000

# What a Trainer logs of an evaluation beside its metrics.
_NOT_METRICS = (
    *("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "jit_compilation_time"),
    *("epoch", "step", "num_input_tokens_seen", "mem_cpu_alloc_delta", "mem_cpu_peaked_delta"),
    *("mem_gpu_alloc_delta", "mem_gpu_peaked_delta"),
)

# Arguments that say where a run was made and what was done with it, not what came of it.
_NOT_REPRODUCED = (
    *("output_dir", "logging_dir", "run_name", "project", "report_to", "trackio_space_id"),
    *("disable_tqdm", "log_level", "log_level_replica", "do_train", "do_eval", "do_predict"),
)

# What `datasets` calls data sets that are files of these kinds.
_KINDS_OF_FILES = (
    *("arrow", "audiofolder", "cache", "csv", "generator", "hdf5", "imagefolder", "json", "lance", "pandas", "parquet"),
    *("pdffolder", "spark", "sql", "text", "videofolder", "webdataset", "xml"),
)

_SECRETS = ("token", "apikey", "password", "secret")
_TOKEN = re.compile(r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{20,}")

# A path that tells where something lies on this machine: from the root, a home folder, a drive, or above where we are.
_PATH = re.compile(
    r"""((?:^|[\s=:,"'(\[]))((?:file://)?(?:~\w*)?/(?!/)[^\s"',)\]]*|file://[^\s"']+|[A-Za-z]:\\[^\s"']*|\.\./[^\s"']*)"""
)


# ---- What a Trainer logged ----


def metrics_of(values: Mapping[str, Any], prefix: str = "eval") -> dict[str, float]:
    """The metrics among what a Trainer logs of an evaluation, without prefix and timings: finite numbers only."""
    metrics = {}
    for key, value in values.items():
        name = key.removeprefix(f"{prefix}_")
        if name != key and name not in _NOT_METRICS and _is_finite(value):
            metrics[name] = float(value)
    return metrics


def not_finite(values: Mapping[str, Any], prefix: str = "eval") -> list[str]:
    """The names of metrics, without the prefix, that are NaN or infinite."""
    bad = [key for key, value in values.items() if _is_number(value) and not _is_finite(value)]
    return [key.removeprefix(f"{prefix}_") for key in bad if key.startswith(f"{prefix}_")]


def thin_history(log_history: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Steps, sparsities, losses and evaluation metrics of a log; of very many training steps an even selection."""
    terms = ("task_loss", "distillation_loss", "hidden_loss", *(f"{name}_penalty" for name in PENALTIES))
    wanted = ("step", "loss", *terms, "sparsity", "target_sparsity")
    entries = []
    for entry in log_history:
        kept = {name: float(entry[name]) for name in wanted if name in entry and _is_finite(entry[name])}
        kept |= {f"eval_{name}": value for name, value in metrics_of(entry).items()}
        if "step" in kept and ("loss" in kept or any(name.startswith("eval_") for name in kept)):
            entries.append(kept)
    training = [index for index, entry in enumerate(entries) if not any(name.startswith("eval_") for name in entry)]
    every = math.ceil(len(training) / _LOGGED_STEPS) or 1
    dropped = set(training) - set(training[::every]) - set(training[-1:])
    return [entry for index, entry in enumerate(entries) if index not in dropped]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value)


# ---- What a run was made with ----


def changed_arguments(args: TrainingArguments) -> dict[str, Any]:
    """The training arguments that are not the defaults, as plain values; no paths, tokens, or names on the Hub."""
    changed = {}
    for field in dataclasses.fields(args):
        name = field.name
        private = name.startswith(("_", "hub_", "push_to_hub")) or name in _NOT_REPRODUCED
        if not field.init or private:
            continue
        value, default = _as_plain(getattr(args, name)), _as_plain(_default_of(field))
        if value != default and not (_says_nothing(value) and _says_nothing(default)) and _is_plain(value):
            changed[name] = value
    return without_tokens(changed)


def _says_nothing(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _default_of(field: dataclasses.Field) -> Any:
    # A second object of TrainingArguments would tell, but making one resets accelerate's state.
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default if field.default is not dataclasses.MISSING else None


def _as_plain(value: Any) -> Any:
    return value.value if isinstance(value, enum.Enum) else value


def without_tokens(value: Any) -> Any:
    """A recipe's content without what holds tokens or passwords, at any depth: by the name of a key, or by its look."""
    if isinstance(value, Mapping):
        return {
            key: without_tokens(inner)
            for key, inner in value.items()
            if not _is_secret_name(key) and not _is_secret(inner)
        }
    if isinstance(value, (list, tuple)):
        return [without_tokens(inner) for inner in value if not _is_secret(inner)]
    return value


def _is_secret_name(name: Any) -> bool:
    return str(name).lower().replace("_", "").replace("-", "").endswith(_SECRETS)


def _is_secret(value: Any) -> bool:
    return isinstance(value, str) and looks_like_token(value)


def looks_like_token(text: str) -> bool:
    """Whether a text holds what looks like a token of the Hub."""
    return _TOKEN.search(text) is not None


def without_paths(value: Any) -> Any:
    """A recipe's content as it may be published: of a path on this machine, only the last part."""
    if isinstance(value, Mapping):
        return {without_paths(key): without_paths(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(inner) for inner in value]
    if isinstance(value, str):
        return _PATH.sub(lambda found: found[1] + re.split(r"[/\\]", found[2].rstrip("/\\"))[-1], value)
    return value


def _is_plain(value: Any) -> bool:
    """Whether a value can be shown: a number, text that holds no path, or a list or mapping of such."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(key) and _is_plain(inner) for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, str):
        return _PATH.search(value) is None
    return value is None or isinstance(value, bool) or _is_finite(value)


def versions(names: Sequence[str] = ("hf-prune", "transformers", "torch", "accelerate", "datasets")) -> dict[str, str]:
    """Python's version and those of installed packages."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware(device: torch.device, processes: int = 1) -> Hardware:
    """The machine that this process runs on, and the accelerator if `device` is one."""
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    if accelerator is None and device.type != "cpu":
        accelerator = device.type
    return Hardware(
        processor=_processor(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        accelerator=accelerator,
        processes=processes,
    )


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return " ".join(found[1].split()) if found else platform.processor() or platform.machine()


def is_shared_model(model: torch.nn.Module) -> bool:
    """Whether processes hold parts of a model's weights (FSDP2, ZeRO-3)."""
    engine = engine_of(model)
    return any(engine.shares(parameter) for parameter in model.parameters())


def weights_digest(model: torch.nn.Module) -> str:
    """A digest of a model's weights and buffers that changes with any of them: of their bytes, one after another.

    Of a model that processes share (FSDP2, ZeRO-3), it is one of the digests of all their parts; every process must ask
    for it.
    """
    engine = engine_of(model)
    engine.prepare(model)
    digest = hashlib.sha256()
    weights = model.state_dict(keep_vars=True)
    for name, tensor in weights.items():
        digest.update(f"{name} {tensor.dtype} {shape_of(tensor)}\n".encode())
        part = engine.part(tensor).cpu().reshape(-1).contiguous()
        digest.update(part.view(torch.uint8).numpy().data)
    if any(engine.shares(tensor) for tensor in weights.values()):
        parts = gather(torch.tensor(list(digest.digest()), dtype=torch.uint8))
        digest = hashlib.sha256(bytes(torch.cat(parts).tolist()))
    return digest.hexdigest()


def measure_latency(
    forwards: Sequence[Callable[[], Any]], passes: int = 20, seconds: float = 5.0
) -> tuple[list[float], int]:
    """Median seconds of each of several forward passes, taken in turns, and how often each was timed.

    Each is called once beforehand to warm up; no more are begun after `seconds`.
    """
    times: list[list[float]] = [[] for _ in forwards]
    started = time.perf_counter()
    for forward in forwards:
        forward()
    while len(times[-1]) < passes and (not times[-1] or time.perf_counter() - started < seconds):
        for forward, taken in zip(forwards, times, strict=True):
            _wait_for_accelerator()
            start = time.perf_counter()
            forward()
            _wait_for_accelerator()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times], len(times[-1])


def _wait_for_accelerator() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def input_shapes(batch: Mapping[str, Any]) -> dict[str, list[int]]:
    """The shapes of the tensors in a batch, labels left out."""
    inputs = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor) and "label" not in name}
    return {name: list(value.shape) for name, value in inputs.items()}


def emissions_of(callbacks: Sequence[Any]) -> Emissions | None:
    """What codecarbon estimated, where transformers' `report_to="codecarbon"` is among a Trainer's callbacks."""
    for callback in callbacks:
        data = getattr(getattr(callback, "tracker", None), "final_emissions_data", None)
        if data is not None and _is_finite(data.emissions):
            return Emissions(
                kilograms=float(data.emissions),
                kilowatt_hours=float(data.energy_consumed),
                country=data.country_name or None,
                seconds=float(data.duration),
            )
    return None


# ---- What a run began with ----


def is_hub_name(name: str | None) -> bool:
    """Whether a name could be that of a repository on the Hub, with its namespace or without."""
    try:
        validate_repo_id(name or "")
    except HFValidationError:
        return False
    return bool(name)


def describe_base(
    name_or_path: str, hub_name: str | None = None, revision: str | None = None
) -> tuple[Source, str | None]:
    """A base model as its own card describes it: license and languages; and why they are not known, where they are not.

    `name_or_path` is a folder or a name on the Hub; `hub_name` is what a folder's model is called there.
    """
    folder = Path(name_or_path)
    card_file = folder / "README.md"
    if not folder.is_dir() and hub_name is None:
        hub_name = name_or_path if is_hub_name(name_or_path) else None
    shown = hub_name or folder.name or name_or_path
    data: dict[str, Any] = {}
    if folder.is_dir() and not card_file.is_file():
        problem: str | None = f"the folder of {shown} has no card (README.md)"
    else:
        try:
            card = ModelCard.load(card_file if folder.is_dir() else name_or_path, ignore_metadata_errors=True)
            data = card.data.to_dict()
            problem = None if _texts(data.get("license")) else f"the card of {shown} names no license"
        except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
            # No network, no such name, or a card that is none.
            problem = f"the card of {shown} cannot be read: {type(error).__name__}"
    license_name = next(iter(_texts(data.get("license"))), None)
    source = Source(
        name=shown,
        hub_name=hub_name,
        revision=revision,
        license=license_name,
        languages=language_codes(data.get("language")),
    )
    return source, problem


def language_codes(value: Any) -> list[str]:
    """The languages in a card's metadata."""
    return _texts(with_norwegian(value))


def with_norwegian(value: Any) -> Any:
    """A card's `language`, where `no` is Norwegian: YAML 1.1 reads it as false."""
    if isinstance(value, list):
        return [with_norwegian(code) for code in value]
    return "no" if value is False else value


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str) and text]


def describe_dataset(dataset: Any) -> Source | None:
    """What a `datasets.Dataset` knows of where it came from: name and revision on the Hub, configuration, split."""
    info = getattr(dataset, "info", None)
    if info is None:
        return None
    found = next(
        filter(None, (re.match(r"hf://datasets/([^@]+)@([^/]+)/", url) for url in info.download_checksums or {})), None
    )
    name = found[1] if found else info.dataset_name
    if name is None or (found is None and name in _KINDS_OF_FILES):  # which is a kind of file, not a name
        return None
    return Source(
        name=name,
        hub_name=found[1] if found else None,
        revision=found[2] if found else None,
        config=info.config_name if info.config_name != "default" else None,
        split=str(dataset.split) if dataset.split is not None else None,
    )
