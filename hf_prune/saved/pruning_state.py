"""What a pruner saves beside a model and reads to resume: masks, configuration and state."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ..config.checks import as_path, is_number
from ..config.pruning import CONFIG_NAME, PruningConfig, load_configs, save_configs
from ..config.safe_json import read_json
from ..engines.processes import gather, processes, rank, wait_for_all
from ..engines.regions import Region
from ..errors import PruningConfigError, PruningStateError
from .masks import (
    FORMAT_VERSION,
    MASKS_NAME,
    Remembered,
    check_version,
    digest_of,
    mask_files,
    read_masks,
    read_memory,
    shard_name,
    write_mask_shard,
    write_masks,
)
from .unit_scores import UNIT_SCORES_NAME

STATE_NAME = "pruning_state.json"


@dataclass
class PruningState:
    """The progress of pruning.

    `completed_steps` are optimizer steps, `total_steps` those of the whole training, if known. `starts` maps the index
    of a group of tensors to the sparsity at which its schedule started; `allotted` maps it to how many units each of
    its tensors loses in the end, where its scope has decided that at the first update; `owed` has the groups with an
    update that is to be made after the next step, such as those that wait for the inputs or gradients that their method
    reads; `finished` has the groups whose last update was made; files of earlier versions do not say (None);
    `codebooks` maps a parameter's name to the values that its weights share (float32, ascending), once they do.
    """

    completed_steps: int = 0
    total_steps: int | None = None
    starts: dict[int, float] = field(default_factory=dict)
    allotted: dict[int, list[int]] = field(default_factory=dict)
    owed: set[int] = field(default_factory=set)
    finished: set[int] | None = field(default_factory=set)
    codebooks: dict[str, torch.Tensor] = field(default_factory=dict)


def state_files(directory: Path) -> list[Path]:
    """The files that `save_pruning` has written into a directory."""
    others = [directory / name for name in (CONFIG_NAME, STATE_NAME, UNIT_SCORES_NAME)]
    return [*mask_files(directory), *(path for path in others if path.exists())]


def save_pruning(
    directory: str | os.PathLike,
    configs: Sequence[PruningConfig],
    state: PruningState,
    masks: Mapping[str, torch.Tensor],
    regions: Mapping[str, Region] | None = None,
    notes: Mapping[str, Any] | None = None,
    memory: Mapping[str, Remembered] = MappingProxyType({}),
    frozen: Sequence[str] = (),
) -> None:
    """Write masks and memory (see `masks.py`), configuration and state into a directory, which is created if needed.

    Args:
        masks: of whole tensors; or with `regions`, of the shards that this process counts. Then every process must
            call this; each writes a file of its own and returns when all have written theirs.
        notes: information for people, written with the state.
        memory: what methods remember of each weight, for the same tensors or shards as `masks`.
        frozen: see `save_configs`.
    """
    path = as_path(directory)
    path.mkdir(parents=True, exist_ok=True)
    if regions is None:
        digests: dict[str, int] = {MASKS_NAME: write_masks(path, masks, memory)}
    else:
        digests = _of_all(write_mask_shard(path, masks, regions, rank(), processes(), memory))
    if regions is None or rank() == 0:
        save_configs(configs, path, frozen)
        _write_state(path / STATE_NAME, state, digests, notes or {})
    if regions is not None:
        wait_for_all()


def load_pruning(
    directory: str | os.PathLike,
    configs: Sequence[PruningConfig],
    shapes: Mapping[str, tuple[int, ...]],
    regions: Mapping[str, Region],
) -> tuple[dict[str, torch.Tensor], dict[str, Remembered], PruningState, float | None]:
    """The masks (bool, on the CPU) of shards of tensors of these names and shapes, the methods' memory, and the state.

    The last is the share of masked weights that was noted with the state, if it was. Raises PruningStateError, naming
    the file and the difference, if a file is missing, broken or of another format version, if it was saved for another
    model or configuration, or if the masks are not those that were saved with the state.
    """
    path = as_path(directory)
    _check_same_configuration(path, configs)
    state, digests, sparsity = _read_state(path / STATE_NAME)
    return read_masks(path, shapes, regions, digests), read_memory(path, regions), state, sparsity


def _of_all(digest: int | None) -> dict[str, int]:
    """The digests of the mask files of all processes, by name; every process must call it."""
    found = gather(torch.tensor([digest is not None, digest or 0], dtype=torch.int64))
    written = [(index, one) for index, (there, one) in enumerate(pair.tolist() for pair in found) if there]
    return {shard_name(index, processes()): one for index, one in written}


def _write_state(path: Path, state: PruningState, digests: Mapping[str, int], notes: Mapping[str, Any]) -> None:
    content = {
        "format_version": FORMAT_VERSION,
        "completed_steps": state.completed_steps,
        "total_steps": state.total_steps,
        **notes,
        "starts": {str(index): start for index, start in state.starts.items()},
        "allotted": {str(index): counts for index, counts in state.allotted.items()},
        "owed": sorted(state.owed),
        "finished": sorted(state.finished or ()),
        "codebooks": {name: codebook.tolist() for name, codebook in state.codebooks.items()},
        "mask_files": digests,
    }
    content["digest"] = _digest_of(content)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _digest_of(content: Mapping[str, Any]) -> int:
    return digest_of(json.dumps(content, sort_keys=True).encode())


def _read_state(path: Path) -> tuple[PruningState, dict[str, int] | None, float | None]:
    """The state, the digests of the mask files, and the share of masked weights.

    Earlier versions wrote no digests, here and in the mask files; what they wrote is read without them.
    """
    try:
        content = read_json(path)
        digest = content.pop("digest", None)
        version = str(content["format_version"])
        state = PruningState(
            completed_steps=_whole(content["completed_steps"]),
            total_steps=_whole(content["total_steps"]) if content.get("total_steps") is not None else None,
            starts={_whole(int(index)): _share(start) for index, start in content["starts"].items()},
            allotted={
                _whole(int(index)): [_whole(count) for count in counts]
                for index, counts in content.get("allotted", {}).items()
            },
            owed={_whole(index) for index in content.get("owed", [])},
            finished={_whole(index) for index in content["finished"]} if "finished" in content else None,
            codebooks={name: _ascending(values) for name, values in content.get("codebooks", {}).items()},
        )
        digests = dict(content["mask_files"]) if "mask_files" in content else None
        sparsity = _share(content["sparsity"]) if "sparsity" in content else None
    except FileNotFoundError as error:
        raise PruningStateError(f"{path}: the file with the saved pruning state does not exist") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PruningStateError(
            f"{path}: expected the saved pruning state, got a file that cannot be used ({error!r})"
        ) from error
    check_version(path, version)
    if (digest is not None or digests is not None) and digest != _digest_of(content):
        raise PruningStateError(f"{path}: has changed since it was saved; take all files from one checkpoint")
    return state, digests, sparsity


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"expected a whole number of 0 or more, got {value!r}")
    return value


def _ascending(values: Any) -> torch.Tensor:
    if not isinstance(values, list) or not all(map(is_number, values)) or values != sorted(values):
        raise ValueError(f"expected a list of numbers in ascending order, got {values!r}")
    return torch.tensor(values, dtype=torch.float32)


def _share(value: Any) -> float:
    if not is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"expected a share from 0 to 1, got {value!r}")
    return float(value)


def _as_meant(config: PruningConfig) -> dict[str, Any]:
    """The fields, with `sparse_base` and the default of `adapters` taken as the same."""
    values = config.to_dict()
    return values | {"adapters": None if values["adapters"] == "sparse_base" else values["adapters"]}


def _check_same_configuration(directory: Path, configs: Sequence[PruningConfig]) -> None:
    try:
        saved = load_configs(directory)
    except (FileNotFoundError, PruningConfigError) as error:
        raise PruningStateError(f"{directory}: the saved pruning configuration cannot be read: {error}") from error
    differences = [
        f"{name}: {before[name]!r} was saved, {after[name]!r} is configured"
        for before, after in zip(map(_as_meant, saved), map(_as_meant, configs), strict=False)
        for name in before
        if before[name] != after[name]
    ]
    if len(saved) != len(configs):
        differences.append(f"{len(saved)} configurations were saved, {len(configs)} are configured")
    if differences:
        raise PruningStateError(
            f"{directory / CONFIG_NAME}: saved with another pruning configuration ({'; '.join(differences)}); "
            "resume with the saved one, or start a new training from these weights"
        )
