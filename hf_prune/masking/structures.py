"""The structures of a pruner, such as neurons and layers: finding them, skipping what is masked, the smaller model."""

import logging
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config.pruning import PruningConfig, save_configs
from ..errors import StructureError
from ..methods.unit_criteria import UNIT_CRITERIA
from ..model.layouts import Target
from ..model.names import all_names, named_parameters, plain_model, shape_of
from ..model.per_layer import reads_overrides
from ..model.targets import check_expressions, targets_named
from ..saved.unit_scores import read_unit_scores, write_unit_scores
from ..structure.chosen import Chosen, write_chosen
from ..structure.coupled import OTHER_STRUCTURES, find_families, own_share, select_groups, with_own_widths
from ..structure.norms import normalise_others
from ..structure.proof import Example, proven
from ..structure.record import STRUCTURE_NAME, cut_of_record, describe_cut, is_cut, read_structure, write_structure
from ..structure.routing import avoid
from ..structure.shrink import Cut, cut_of, in_fewest_values, shrink_model
from ..structure.skipping import skip
from ..structure.units import CoupledUnits, Family
from .feasible import check_what_is_left
from .groups import Group, make_unit_group
from .local import LocalTensor
from .masks import Masks
from .unit_ranking import dropped_units, mask_units, unit_scores

logger = logging.getLogger(__name__)

# What masked units are passed by with, where zero weights alone are not enough.
_PASS_BY = {"experts": avoid, "hidden": normalise_others}


class Structures:
    """The structures of a pruner: their units, the layers that are skipped, scores, and what was cut out.

    Args:
        example: gives a batch that the model runs with, to try what can be removed.

    Attributes:
        removed: what was cut out of the model, see `record.describe_cut`; None if nothing was.
        sums: the scores that are added up over optimizer steps (float64), by the name of the coupled units.
        layers: for each layer of the model, whether it is kept; None where layers are no structure that is pruned. Of
            encoder-decoders, those of the decoder.
    """

    def __init__(self, example: Example) -> None:
        self._example = example
        self.removed: dict[str, Any] | None = None
        self.sums: dict[str, torch.Tensor] = {}
        self.layers: list[bool] | None = None
        self._families: dict[int, list[Family]] = {}  # by the index of the configuration
        self._model: nn.Module | None = None  # that has these units
        self._class: type[PreTrainedModel] | None = None  # of that model, before it was sharded
        self._skipped: list[Any] = []  # handles of the hooks that pass by units
        self._added = False  # whether the gradients of the current step were added to the sums

    # ---- Units and their masks ----

    def find(self, index: int, config: PruningConfig, model: nn.Module) -> tuple[list[Target], list[Group]]:
        """The tensors and the groups of a configuration with a structure; without units where those were cut out.

        Raises StructureError if the model has no such units that can be removed, and TargetError for an expression that
        matches no parameter.
        """
        assert config.structure is not None
        if self._model is not plain_model(model):  # nothing was cut out of another one
            self._model, self._families = plain_model(model), {}
            self._class = cast(type[PreTrainedModel], type(self._model))
            self.removed = self.layers = None
            self.sums.clear()
        if self.removed is not None:
            number = self.removed["groups"].get(str(index), 0)
            return [], [make_unit_group(index, config, (), ()) for _ in range(number)]
        if index not in self._families:
            try:
                tried = self._try(config, model)
            except StructureError as error:
                raise _with_hint_of_resuming(error, cast(PreTrainedModel, self._model)) from error
            self._families[index] = [one for family in tried for one in family.with_tied]
            _warn_of_import(tried, cast(PreTrainedModel, self._model))
            self._check_together()
        families = self._families[index]
        targets = targets_named(model, {name for family in families for name in family.names})
        groups = []
        for family in families:
            for own, units in _ranked_alike(config, family.removable):
                members_of = {name for one in units for name in one.names}
                members = tuple(target for target in targets if target.name in members_of)
                groups.append(make_unit_group(index, config, members, units, len(family.fixed_layers), own))
        return targets, groups

    def _try(self, config: PruningConfig, model: nn.Module) -> list[Family]:
        """The families of a configuration whose removal was tried, and leaves a model that can be built."""
        assert config.structure is not None
        known = [name for of_one in all_names(model).values() for name in of_one]
        check_expressions("targets", config.targets or (), known)
        check_expressions("exclude", config.exclude, known)
        found = select_groups(find_families(model, config.structure), config.targets, config.exclude)
        if config.overrides or config.scope == "global":
            names = [name for family in found for name in family.names]
            check_expressions("overrides", list(config.overrides or {}), names)
            found = with_own_widths(found, "scope" if config.scope == "global" else "overrides")
        try:
            tried = proven(found, cast(PreTrainedModel, self._model), self._example)
        except StructureError as error:
            raise StructureError(
                problems=[(key, f"{message}; {OTHER_STRUCTURES}") for key, message in error.problems]
            ) from error
        for family in tried:
            check_what_is_left(family, config, cast(PreTrainedModel, self._model))
        return tried

    def _check_together(self) -> None:
        """Raise StructureError where heads leave in two ways: by themselves, and with the width of the model."""
        families = self._all_families()
        if any(one.structure == "hidden" for one in families) and any(one.per_layer for one in families):
            raise StructureError(
                "structure",
                "hidden dimensions must not be removed beside neurons or heads that differ from layer to layer, nor "
                "beside heads of models like BERT; train twice, hidden dimensions first",
            )

    def mask_zero_units(self, groups: Sequence[Group], masks: Masks) -> None:
        """Mask the units all of whose weights are zero."""
        for group in groups:
            held = _held(group, masks) if group.coupled else {}
            nonzero = {name: tensor.weight != 0 for name, tensor in held.items()}
            changed: dict[str, None] = {}
            for units, drop in zip(group.coupled, dropped_units(group, nonzero, held, masks.all_reduce), strict=True):
                for part in units.all_parts if bool(drop.any()) else ():
                    mask_units(held[part.name], part, drop)
                    changed[part.name] = None
            for name in changed:
                masks.note_change(name, None)
            masks.count(changed)

    def pass_by(self, groups: Sequence[Group], masks: Masks, model: nn.Module) -> None:
        """Skip the layers that are masked, send no token to experts and normalise over no dimensions that are."""
        self.pass_by_none()
        for group in groups:
            pass_by = _PASS_BY.get(group.coupled[0].structure) if group.coupled else None
            if pass_by is not None:
                dropped = masked_units(group, masks)
                for units in group.coupled:
                    self._skipped += pass_by(plain_model(model), units, dropped[units.name])
            if group.coupled and group.config.structure == "layers":
                dropped = masked_units(group, masks)
                family = self._family_of(group)
                skipped = {layer.name for layer in group.coupled if bool(dropped[layer.name].all())}
                self.layers = [layer.name not in skipped for layer in family.groups]
                for layer in group.coupled:
                    if layer.name in skipped:
                        self._skipped.append(skip(plain_model(model).get_submodule(layer.path)))

    def _family_of(self, group: Group) -> Family:
        families = self._families[group.config_index]
        return next(family for family in families if family.removable == group.coupled)

    def pass_by_none(self) -> None:
        """Run the whole model again."""
        for handle in self._skipped:
            handle.remove()
        self._skipped = []

    # ---- Scores of gradients ----

    def begin_step(self) -> None:
        """Begin an optimizer step."""
        self._added = False

    def add_gradients(
        self, groups: Sequence[Group], masks: Masks, gradients: Mapping[str, torch.Tensor], loss_scale: float
    ) -> None:
        """Add the scores of an optimizer step, once, from its gradients; a step that is not finite is left out.

        Weights without a gradient, such as those of a layer that is skipped, add nothing; a group all of whose weights
        are without one was not in the loss, and has no scores of this step.
        """
        for group in () if self._added else groups:
            if any(name in gradients for name in group.read_names):
                held = {name: masks.local(name) for name in group.read_names}
                for name, local in held.items():
                    gradient = gradients[name] if name in gradients else torch.zeros_like(local.weight)
                    flat = gradient.detach().float().reshape(-1)
                    held[name] = replace(local, gradient=flat if loss_scale == 1 else flat / loss_scale)
                criterion = UNIT_CRITERIA[group.config.method]
                scores = unit_scores(group.coupled, held, criterion, group.config.pruning_seed, masks.all_reduce)
                if all(bool(score.isfinite().all()) for score in scores.values()):
                    for name, score in scores.items():
                        self.sums[name] = self.sums[name] + score if name in self.sums else score
        self._added = True

    def lacks_scores(self, group: Group) -> bool:
        """Whether the scores of a group are added up over steps, and there are none yet."""
        return "gradients" in group.reads and any(units.name not in self.sums for units in group.coupled)

    # ---- The smaller model ----

    def cut(
        self, groups: Sequence[Group], masks: Masks, model: nn.Module, optimizer: torch.optim.Optimizer | None
    ) -> tuple[dict[str, torch.Tensor], Cut]:
        """Cut the masked units out of a model, in place, see `shrink_model`; returns the masks of what is left, too."""
        plain = cast(PreTrainedModel, plain_model(model))
        cut = self.what_is_left(groups, masks)
        content = self.describe(cut, groups, plain)
        left = cut.tensors(masks.parts)
        shrink_model(plain, cut, optimizer)
        self.pass_by_none()
        self.removed = content
        self.sums.clear()
        return left, cut

    def what_is_left(self, groups: Sequence[Group], masks: Masks) -> Cut:
        """What is left of the model without the masked units; every process must call it."""
        dropped: dict[str, torch.Tensor] = {}
        for group in groups:
            dropped.update(masked_units(group, masks) if group.coupled else {})
        cut = cut_of(self._all_families(), dropped)
        return in_fewest_values(cut, cast(PreTrainedModel, self._model), self._class)

    def _all_families(self) -> list[Family]:
        """The families of all configurations; those that several prune, one after another, once."""
        families: dict[tuple[str, ...], Family] = {}
        for family in (one for found in self._families.values() for one in found):
            names = tuple(group.name for group in family.groups)
            if names not in families or family.per_layer:
                families[names] = family
        return list(families.values())

    def describe(self, cut: Cut, groups: Sequence[Group], model: PreTrainedModel) -> dict[str, Any]:
        """What a cut removes from a model, see `describe_cut`."""
        shapes = {name: shape_of(parameter) for name, parameter in named_parameters(model)}
        left = cut.tensors({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
        by_unit = dict.fromkeys(target.name for group in groups if group.coupled for target in group.members)
        names = {name: cut.name_of(name) for name in by_unit}
        return describe_cut(
            cut,
            Counter(group.config_index for group in groups if group.coupled),
            model.config,
            parameters=(sum(map(math.prod, shapes.values())), sum(tensor.numel() for tensor in left.values())),
            weights=(
                sum(math.prod(shapes[name]) for name in by_unit),
                sum(left[new].numel() for new in names.values() if new is not None),
            ),
        )

    def smaller_model(
        self, groups: Sequence[Group], masks: Masks, configs: Sequence[PruningConfig], chosen: Chosen | None
    ) -> "SmallerModel":
        """The model without the masked units, for saving; every process must call it."""
        assert self._class is not None
        plain = cast(PreTrainedModel, self._model)
        cut = self.what_is_left(groups, masks)
        with torch.device("meta"):
            skeleton = self._class(cut.config(plain.config))
        return SmallerModel(cut, skeleton, self.describe(cut, groups, plain), configs, chosen)

    def cut_as_saved(self, directory: Path, model: nn.Module) -> bool:
        """Cut out of a model what was cut out of the one in a folder; whether anything was.

        The model may be the whole one, or the one that was left. Raises PruningStateError if it is neither.
        """
        content = read_structure(directory)
        if content is None:
            return False
        plain = cast(PreTrainedModel, plain_model(model))
        if not is_cut(content, plain.config, directory):
            cut = cut_of_record(content, self._all_families(), directory)
            shrink_model(plain, in_fewest_values(cut, plain))
        self._take_removed(content)
        return True

    def note_removed(self, directory: Path, model: nn.Module) -> None:
        """Before a model is pruned as in a folder: if it is what was left there, take what was cut out of it.

        Its units are then not looked for: layers have other names, and some may have a single unit. Raises
        PruningStateError as `cut_as_saved` does.
        """
        content = read_structure(directory)
        plain = plain_model(model)
        if content is not None and is_cut(content, cast(PreTrainedModel, plain).config, directory):
            self._model, self._families = plain, {}
            self._class = cast(type[PreTrainedModel], type(plain))
            self._take_removed(content)

    def _take_removed(self, content: dict[str, Any]) -> None:
        self.pass_by_none()
        self.removed = content
        layers = [name for name in content["units"] if name.startswith("layers of ")]
        last = layers[-1].rpartition(".")[0] if layers else ""
        kept = [bool(content["units"][name]["kept"]) for name in layers if name.rpartition(".")[0] == last]
        self.layers = kept or None

    # ---- Files ----

    def layer_pairs(self, layers: int) -> list[list[int]] | None:
        """Pairs of hidden states of this model and of one with all layers, as `Pruner.layer_pairs` tells."""
        if self.layers is None or len(self.layers) != layers:
            return None
        kept = [index for index, is_kept in enumerate(self.layers) if is_kept]
        own = list(range(len(kept))) if self.removed is not None else kept
        return [[0, 0], *([one + 1, other + 1] for one, other in zip(own, [*kept[:-1], layers - 1], strict=True))]

    def with_removed(self, masked: float, weights: int) -> float:
        """The share of masked weights, with those that were cut out."""
        if self.removed is not None:
            before, left = self.removed["weights"]
            masked, weights = masked + before - left, max(weights, left) + before - left
        return masked / max(weights, 1)

    def save(self, directory: Path) -> None:
        """Write what was cut out, and the scores."""
        directory.mkdir(parents=True, exist_ok=True)
        write_structure(directory, self.removed)
        write_unit_scores(directory, self.sums)

    def load(self, directory: Path, groups: Sequence[Group]) -> None:
        """Read the scores of the units of these groups. Raises PruningStateError if they are others, or broken."""
        self.sums = read_unit_scores(
            directory, {units.name: units.units for group in groups for units in group.coupled}
        )


def _ranked_alike(
    config: PruningConfig, coupled: Sequence[CoupledUnits]
) -> list[tuple[float | None, list[CoupledUnits]]]:
    """Coupled units in groups: those without an override (None), and those that follow one another with the same."""
    found: list[tuple[float | None, list[CoupledUnits]]] = []
    others: list[CoupledUnits] = []
    for units in coupled:
        own = own_share(config, units)
        if own is None:
            if not others:
                found.append((None, others))
            others.append(units)
        elif found and found[-1][0] == own and found[-1][1][0].units == units.units:
            found[-1][1].append(units)
        else:
            found.append((own, [units]))
    return found


def _with_hint_of_resuming(error: StructureError, model: PreTrainedModel) -> StructureError:
    """The error; of a model from a folder where units were cut out, with what to do if training is to be resumed."""
    folder = model.name_or_path
    if not folder or not Path(folder, STRUCTURE_NAME).is_file():
        return error
    hint = (
        f"units were cut out of this model before ({folder}); to resume its training, give the model that it began with"
    )
    return StructureError(problems=[(key, f"{message}. Note: {hint}") for key, message in error.problems])


def _warn_of_import(families: Sequence[Family], model: PreTrainedModel) -> None:
    """Say before training that the smaller model will not open everywhere."""
    if any(family.per_layer for family in families) and not reads_overrides(type(model.config)):
        needed = families[0].needs_per_layer
        logger.warning(
            "The %s %s, which %s does not read from its configuration by itself yet: %sthe smaller model opens after "
            "`import hf_prune`, and without it from_pretrained raises an error.",
            families[0].structure,
            "are counted layer by layer" if needed else "can differ from layer to layer",
            type(model).__name__,
            "" if needed else "if they do, ",
        )


@dataclass(frozen=True)
class SmallerModel:
    """A model without its masked units: what is left, the model without weights, and what was removed.

    `chosen` is the structure that was chosen for a target, if there was one.
    """

    cut: Cut
    skeleton: PreTrainedModel
    removed: dict[str, Any]
    configs: Sequence[PruningConfig]
    chosen: Chosen | None

    def save(self, directory: str | os.PathLike) -> None:
        """Write configuration and `pruning_structure.json` into a directory, which is created if needed."""
        save_configs(self.configs, directory)
        write_structure(Path(directory), self.removed)
        write_chosen(Path(directory), self.chosen)


def masked_units(group: Group, masks: Masks) -> dict[str, torch.Tensor]:
    """Which units of a group are masked (bool), by the name of their coupled units."""
    held = _held(group, masks)
    gone = dropped_units(group, {name: tensor.mask for name, tensor in held.items()}, held, masks.all_reduce)
    return {units.name: flags for units, flags in zip(group.coupled, gone, strict=True)}


def _held(group: Group, masks: Masks) -> dict[str, LocalTensor]:
    return {target.name: masks.local(target.name) for target in group.members}
