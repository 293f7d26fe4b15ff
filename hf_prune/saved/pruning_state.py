"""What a pruner saves beside a model and reads to resume: masks, configuration and state."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ..config.pruning import CONFIG_NAME, PruningConfig, load_configs, save_configs
from ..engines.processes import processes, rank, wait_for_all
from ..engines.regions import Region
from ..errors import PruningConfigError, PruningStateError
from .masks import (
    FORMAT_VERSION,
    Remembered,
    check_version,
    mask_files,
    read_masks,
    read_memory,
    write_mask_shard,
    write_masks,
)

STATE_NAME = "pruning_state.json"


@dataclass
class PruningState:
    """The progress of pruning.

    `completed_steps` are optimizer steps, `total_steps` those of the whole training, if known. `starts` maps the index
    of a group of tensors to the sparsity at which its schedule started; `owed` has the groups with an update that is to
    be made after the next step, such as those that wait for the inputs or gradients that their method reads; `finished`
    has the groups whose last update was made; files of earlier versions do not say (None).
    """

    completed_steps: int = 0
    total_steps: int | None = None
    starts: dict[int, float] = field(default_factory=dict)
    owed: set[int] = field(default_factory=set)
    finished: set[int] | None = field(default_factory=set)


def state_files(directory: Path) -> list[Path]:
    """The files that `save_pruning` has written into a directory."""
    others = [directory / name for name in (CONFIG_NAME, STATE_NAME)]
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
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    if regions is None:
        write_masks(path, masks, memory)
    else:
        write_mask_shard(path, masks, regions, rank(), processes(), memory)
    if regions is None or rank() == 0:
        save_configs(configs, path, frozen)
        _write_state(path / STATE_NAME, state, notes or {})
    if regions is not None:
        wait_for_all()


def load_pruning(
    directory: str | os.PathLike,
    configs: Sequence[PruningConfig],
    shapes: Mapping[str, tuple[int, ...]],
    regions: Mapping[str, Region],
) -> tuple[dict[str, torch.Tensor], dict[str, Remembered], PruningState]:
    """The masks (bool, on the CPU) of shards of tensors of these names and shapes, the methods' memory, and the state.

    Raises PruningStateError, naming the file and the difference, if a file is missing, broken or of another format
    version, or was saved for another model or configuration.
    """
    path = Path(directory)
    _check_same_configuration(path, configs)
    return read_masks(path, shapes, regions), read_memory(path, regions), _read_state(path / STATE_NAME)


def _write_state(path: Path, state: PruningState, notes: Mapping[str, Any]) -> None:
    content = {
        "format_version": FORMAT_VERSION,
        "completed_steps": state.completed_steps,
        "total_steps": state.total_steps,
        **notes,
        "starts": {str(index): start for index, start in state.starts.items()},
        "owed": sorted(state.owed),
        "finished": sorted(state.finished or ()),
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _read_state(path: Path) -> PruningState:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = str(content["format_version"])
        state = PruningState(
            completed_steps=int(content["completed_steps"]),
            total_steps=int(content["total_steps"]) if content.get("total_steps") is not None else None,
            starts={int(index): float(start) for index, start in content["starts"].items()},
            owed={int(index) for index in content.get("owed", [])},
            finished={int(index) for index in content["finished"]} if "finished" in content else None,
        )
    except FileNotFoundError as error:
        raise PruningStateError(f"{path}: the file with the saved pruning state does not exist") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PruningStateError(
            f"{path}: expected the saved pruning state, got a file that cannot be used ({error!r})"
        ) from error
    check_version(path, version)
    return state


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
