"""The target of a pruner's configurations, such as a speed-up, and the structure that is chosen for it."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config.pruning import PruningConfig
from ..engines.choose import is_shared_model
from ..engines.processes import raised_by_all, rank, text_of
from ..errors import PlacementError, PruningConfigError, PruningStateError, first_line
from ..model.names import plain_model
from ..saved.pruning_state import state_files
from ..structure.chosen import SEARCH_NAME, Chosen, read_chosen, target_of
from ..structure.coupled import checked_model
from ..structure.latency import build_again
from ..structure.proof import Example
from ..structure.search import thinned
from ..structure.targeting import find_structure, time_again
from .structures import SmallerModel

# The rows of the table that is logged.
_ROWS = 12

# By which share a trained model may be slower than asked for without a warning.
_TOLERATED = 0.1

logger = logging.getLogger(__name__)


class Searching:
    """What a pruner was asked to reach, and what was chosen.

    Attributes:
        given: the configurations as they were given, of which one may have a target.
        chosen: what was chosen for the target; None before, and without one.
    """

    def __init__(self, configs: Sequence[PruningConfig], example: Example):
        _check_one_target(configs)
        self.given = list(configs)
        self.chosen: Chosen | None = None
        self._example = example

    @property
    def asked(self) -> PruningConfig | None:
        """The configuration with a target; None without one."""
        return next((config for config in self.given if config.has_target), None)

    @property
    def waits(self) -> bool:
        """Whether there is a target and nothing was chosen for it yet."""
        return self.asked is not None and self.chosen is None

    @property
    def configs(self) -> list[PruningConfig]:
        """The configurations that say what is pruned: in place of the one with a target, those of the structures."""
        if self.chosen is None:
            return list(self.given)
        found: list[PruningConfig] = []
        for config in self.given:
            found += self.chosen.configs if config.has_target else [config]
        return found

    def find(
        self,
        model: nn.Module,
        directory: Path | None,
        device: torch.device | None,
        dense_fields: Mapping[str, int] | None = None,
    ) -> None:
        """Choose the structure; every process must call it. The first one measures, and all get the same.

        The model is measured on `device`, and moved back afterwards. For `dense_fields` see `find_structure`.
        """
        asked = self.asked
        assert asked is not None
        target = target_of(asked)
        assert target is not None
        if is_shared_model(model):
            raise PlacementError(
                target.name,
                "cannot be measured on a model that is sharded over processes: use PruningTrainer, which measures it "
                "before, and load the model before TrainingArguments are made, as from_pretrained shards it after that "
                "(ZeRO-3); or name structures and their sparsities",
            )
        checked_model(model, target.name)
        self.chosen = _of_first(lambda: self._measured(plain_model(model), asked, directory, device, dense_fields))
        for line in lines_about(self.chosen):
            logger.info("%s", line)

    def _measured(
        self,
        model: nn.Module,
        asked: PruningConfig,
        directory: Path | None,
        device: torch.device | None,
        dense_fields: Mapping[str, int] | None,
    ) -> Chosen:
        batch = self._batch()
        home = next((parameter.device for parameter in model.parameters()), None)
        try:
            if device is not None and device != home:
                model.to(device)
            return find_structure(cast(PreTrainedModel, model), asked, batch, directory, dense_fields)
        finally:
            if device is not None and device != home:
                model.to(home)

    def _batch(self) -> Any:
        batch = self._example()
        asked = self.asked
        target = target_of(asked) if asked is not None else None
        if not batch and target is not None:
            raise PruningConfigError(
                target.name, "needs a batch to measure the model with: pass example= to Pruner, or data to the Trainer"
            )
        return batch

    def time_again(self, model: nn.Module, removed: dict[str, Any] | None, smaller: SmallerModel | None) -> None:
        """Time the model that is left in turns with a dense one, on the first process; every process must call it.

        Of a model that is sharded, and becomes `smaller` when it is saved, one of the sizes is timed.
        """
        before = self.chosen
        if before is None:
            return
        if smaller is not None:
            device = next(model.parameters()).device

            def measure() -> Chosen:
                small = build_again(smaller.skeleton, before.conditions["dtype"], device)
                return time_again(before, small, smaller.removed, self._batch())

            self._note_times(measure)
        elif removed is not None:
            small = cast(PreTrainedModel, plain_model(model))
            self._note_times(lambda: time_again(before, small, removed, self._batch()))

    def _note_times(self, measure: Callable[[], Chosen]) -> None:
        before = self.chosen

        def measure_if_possible() -> Chosen:
            try:
                return measure()
            except torch.OutOfMemoryError as error:  # training is over: it must not be lost
                assert before is not None
                logger.warning("The speed that was reached is not measured: %s", first_line(error))
                return before

        self.chosen = _of_first(measure_if_possible)
        if self.chosen.reached is None:
            return
        said = (
            f"Asked for {self.chosen.target.words}; reached {self.chosen.reached_words}, with "
            f"{self.chosen.words_of(self.chosen.candidate)} ({self.chosen.inputs_words} inputs)."
        )
        logger.info("%s", said)
        if (self.chosen.off_by or 0.0) < -_TOLERATED:
            logger.warning("%s Other programs on the machine may have slowed it: measure again (measure_target).", said)

    def take(self, directory: Path) -> bool:
        """Take what was chosen for the model in a folder; whether there is a target. Nothing is measured.

        Raises PruningStateError if nothing was, or for another target.
        """
        asked = self.asked
        if asked is None or not state_files(directory):
            return False
        chosen = read_chosen(directory)
        if chosen is None or chosen.config != asked:
            was = "without a target" if chosen is None else f"for {chosen.target.words}, or with other settings"
            target = target_of(asked)
            assert target is not None
            raise PruningStateError(
                f"{directory / SEARCH_NAME}: expected what was chosen for {target.words}, but the checkpoint was saved "
                f"{was}; use the configuration that it was trained with"
            )
        self.chosen = chosen
        return True


def _of_first(measure: Callable[[], Chosen]) -> Chosen:
    """What the first process measures, on every process; an error of it is raised by all."""
    text = ""
    with raised_by_all():
        if rank() == 0:
            text = json.dumps(measure().to_dict())
    return Chosen.from_dict(json.loads(text_of(0, text)))


def rows_of(chosen: Chosen) -> list[tuple[str, ...]]:
    """The structures than which no other is as fast and changes less, in rows of text; the first is the heading."""
    rows: list[tuple[str, ...]] = [("times as fast", "ms", "parameters", "change", *chosen.units)]
    for one in thinned(chosen.frontier, _ROWS):
        speed, milliseconds = chosen.dense.seconds / one.seconds, 1000 * one.seconds
        left = [f"{number:,}" for number in chosen.left(one).values()]
        rows.append((f"{speed:.2f}", f"{milliseconds:.2f}", f"{one.parameters:,}", f"{one.change:.4f}", *left))
    return rows


def widths_of(chosen: Chosen) -> list[tuple[str, ...]]:
    """What was chosen for each layer, in rows of text, the first is the heading; none where all layers are alike."""
    if not chosen.layers:
        return []
    names = [name for name in chosen.units if name != "layers"]
    rows: list[tuple[str, ...]] = [("layer", *names)]
    for path, left in chosen.left_of_layers.items():
        cells = [f"{left[name]:,}" if name in left else "-" for name in names] if left is not None else None
        rows.append((path, *(cells if cells is not None else ["removed"] * len(names))))
    return rows


def sentence_about(chosen: Chosen) -> str:
    """What was chosen, in a sentence."""
    return (
        f"Chosen for {chosen.target.words}: {chosen.words_of(chosen.candidate)}; {chosen.speedup:.2f} times as fast, "
        f"measured before training with {chosen.inputs_words} inputs, {chosen.candidate.parameters:,} of "
        f"{chosen.dense.parameters:,} parameters."
    )


def lines_about(chosen: Chosen) -> list[str]:
    """What was chosen, and from what, in lines of text."""
    return [*_as_lines(rows_of(chosen)), *_as_lines(widths_of(chosen)), sentence_about(chosen)]


def _as_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows]


def _check_one_target(configs: Sequence[PruningConfig]) -> None:
    asked = [config for config in configs if config.has_target]
    if not asked:
        return
    target = target_of(asked[0])
    assert target is not None
    if len(asked) > 1:
        raise PruningConfigError(target.name, "expected one configuration with a target, got several")
    if any(config.structure is not None for config in configs):
        raise PruningConfigError(
            target.name, "must not be set beside a configuration with a structure: it finds all structures itself"
        )
