"""`Pruner`: owns the masks of a model and the rule of when and how they change."""

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from .allocation import Pool
from .config import CONFIG_NAME, PruningConfig, PruningConfigError, load_configs, save_configs
from .criteria import CRITERIA, Piece
from .mask_files import MASKS_NAME, STATE_NAME, PruningStateError, read_masks, read_state, write_masks, write_state
from .optimizers import leaves_zeros, parameters_of, zero_masked, zero_moments
from .patterns import PATTERNS, count_of
from .plan import Group, Plan, PlannedTensor, Window, make_groups, make_plan, make_windows
from .selection import KeptChunks, KeyChunks, demote, find_threshold, lowest_of_kept, order_keys, taken
from .targets import Target, as_matrices, find_targets, from_matrices

logger = logging.getLogger(__name__)

# What `Pruner.save` writes.
STATE_FILES = (MASKS_NAME, CONFIG_NAME, STATE_NAME)

# Weights ranked at a time: small enough for a CPU's cache, large enough to keep an accelerator busy.
_CPU_PIECE = 1 << 18
_ACCELERATOR_PIECE = 1 << 24

# Up to this many weights (16 MiB of keys) keys are made once and held, not made again for each pass.
_KEYS_HELD = 1 << 22


_Chunk = TypeVar("_Chunk")


class Pruner:
    """Prunes the tensors of a model on a schedule and keeps what was pruned at exactly zero.

    In a training loop of one's own:

        pruner = Pruner(model, config, total_steps=1000)
        loss.backward()
        pruner.mask_gradients()      # before gradients are clipped
        optimizer.step()
        pruner.step(optimizer)       # one optimizer step is completed; masks are updated if that is due
        optimizer.zero_grad()

    The model's modules, parameter names and state dict are never changed.

    Args:
        model: the model, on any device.
        config: one configuration or several: together, each on tensors of its own, or one after another on the same.
        total_steps: optimizer steps of the training. With it pruning starts at once: an update due at step 0 is made
            here. Without it, call `start` before training.

    Attributes:
        targets: the tensors to prune, in the model's order.
        parameters: parameter name -> parameter.
        masks: parameter name -> bool tensor of the parameter's shape, True where a weight is kept. Zeros that the model
            has when pruning starts are masked and stay zero.
        masked: parameter name -> number of masked weights.
        completed_steps, total_steps: optimizer steps done and to do; `total_steps` is None before the start.
        expected_steps: what `plan` takes for `total_steps` before the start, where that can be told beforehand.
        target_sparsity: the share of masked weights that the schedule ends with; None before the start.

    Raises:
        TargetError: an expression or a shape does not fit the model.
        PruningConfigError: a configuration does not fit into the training, or two are at work on a tensor at once.
        PruningStateError: a weight is NaN or infinite; raised when masks are to be updated, before any is changed.
    """

    def __init__(
        self,
        model: nn.Module,
        config: PruningConfig | Sequence[PruningConfig],
        total_steps: int | None = None,
    ):
        self.configs = [config] if isinstance(config, PruningConfig) else list(config)
        if not self.configs or not all(isinstance(entry, PruningConfig) for entry in self.configs):
            raise TypeError(f"config: expected a PruningConfig or a list of them, got {config!r}")
        self.completed_steps = 0
        self.total_steps: int | None = None
        self.expected_steps: int | None = None
        self.target_sparsity: float | None = None
        self._windows: list[Window] = []
        self._attach(model)
        if total_steps is not None:
            self.start(total_steps)

    def _attach(self, model: nn.Module) -> None:
        """Find the targets in this model and mask the zeros that are there."""
        self.model = model
        self._groups: list[Group] = []
        chosen: dict[str, Target] = {}
        for index, config in enumerate(self.configs):
            found = find_targets(model, config.targets, config.exclude)
            self._groups += make_groups(index, config, found)
            chosen.update({target.name: target for target in found})
        self.parameters = {name: parameter for name, parameter in model.named_parameters() if name in chosen}
        self.targets = [chosen[name] for name in self.parameters]
        self.masks = {name: parameter.detach() != 0 for name, parameter in self.parameters.items()}
        self.masked = {name: _count_masked(mask) for name, mask in self.masks.items()}
        self._starts: dict[int, float] = {}
        self._gradients_masked: set[str] = set()  # names, since the last optimizer step
        if not self.targets:
            logger.warning("Nothing to prune: the model has no weights that the pruning configuration selects.")

    # ---- When ----

    def start(
        self,
        total_steps: int,
        model: nn.Module | None = None,
        completed_steps: int = 0,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        """Begin to prune in a training of `total_steps` optimizer steps: mask the zeros that are there.

        Updates due at step 0 are made. Where `completed_steps` were trained before, without pruning, what the schedule
        would have pruned by then is pruned now. `model` takes the place of the model so far. Raises PruningConfigError
        if the configuration does not fit into that many steps.
        """
        self._attach(model if model is not None else self.model)
        self._windows = make_windows(self.configs, self._groups, total_steps)
        self.total_steps = total_steps
        self.completed_steps = completed_steps
        self.target_sparsity = self.plan().final_sparsity
        self._log_zeros()
        self._check_finite(range(len(self._groups)), completed_steps)
        self._mask_moments(optimizer, self.parameters)
        begun = [index for index, group in enumerate(self._groups) if self._window(group).begin <= completed_steps]
        self._update_groups(begun, completed_steps, optimizer)

    def _log_zeros(self) -> None:
        """Say which zeros were there, and which tensors are sparser than they were to become: they stay so."""
        zeros = sum(self.masked.values())
        if zeros:
            logger.info("%s prunable weights are zero already; they are masked and stay zero.", f"{zeros:,}")
        sparser = []
        for group in self._groups:
            weights = sum(target.weights for target in group.members)
            there = sum(self.masked[target.name] for target in group.members)
            if there > count_of(group.final, weights):
                share = f"{100 * there / weights:.2f}% for a target of {100 * group.final:.2f}%"
                sparser += [f"{target.name} ({share})" for target in group.members]
        if sparser:
            more = f" and {len(sparser) - 1} more tensors" if len(sparser) > 1 else ""
            logger.warning("Sparser already than they were to become, and left so: %s%s.", sparser[0], more)

    def resume(self, total_steps: int, directory: str | os.PathLike, model: nn.Module | None = None) -> None:
        """Go on with a training whose masks and state `save` wrote into `directory`; see `load` for the errors."""
        self._attach(model if model is not None else self.model)
        self._windows = make_windows(self.configs, self._groups, total_steps)
        self.total_steps = total_steps
        self.load(directory)
        self.target_sparsity = self.plan().final_sparsity

    def plan(self, total_steps: int | None = None) -> Plan:
        """What would be pruned, by how much and when, starting from the masks as they are. Changes nothing.

        `total_steps` (optimizer steps) is needed before the start. Raises PruningConfigError if the configuration does
        not fit into that many.
        """
        total_steps = next((steps for steps in (total_steps, self.total_steps, self.expected_steps) if steps), None)
        if total_steps is None:
            raise PruningConfigError(["total_steps: expected the optimizer steps of the training, got None"])
        windows = make_windows(self.configs, self._groups, total_steps)
        tensors = [
            PlannedTensor(target.name, target.shape, target.weights, self.masked[target.name], None)
            for target in self.targets
        ]
        all_weights = sum(parameter.numel() for parameter in self.model.parameters())
        return make_plan(self._groups, windows, tensors, total_steps, all_weights)

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Count one completed optimizer step and do what it calls for; call it right after `optimizer.step()`."""
        self.after_optimizer_step(optimizer)
        self.update(self.completed_steps + 1, optimizer)

    def after_optimizer_step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Put masked weights back to zero where the optimizer may have moved them.

        It may have if it is not one that works element by element, or if gradients were not masked before it, or if the
        weights are another optimizer's.
        """
        names = list(self.parameters)
        if optimizer is not None and leaves_zeros(optimizer):
            safe = parameters_of(optimizer)
            names = [
                name
                for name, parameter in self.parameters.items()
                if parameter.requires_grad and not (name in self._gradients_masked and parameter in safe)
            ]
        self.mask_weights(names)
        self._mask_moments(optimizer, names)
        self._gradients_masked.clear()

    def update(self, completed_steps: int, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """Update masks if that is due after `completed_steps` optimizer steps; whether any mask changed.

        New masks are applied to the weights, and to the moments in the optimizer's state.
        """
        if self.total_steps is None:
            raise PruningStateError("The pruner was not started: give it total_steps, or call start(total_steps).")
        due = [index for index, group in enumerate(self._groups) if self._window(group).due(completed_steps)]
        return self._update_groups(due, completed_steps, optimizer)

    def _update_groups(self, due: Sequence[int], completed_steps: int, optimizer: torch.optim.Optimizer | None) -> bool:
        self._check_finite(due, completed_steps)
        self.completed_steps = completed_steps
        changed = [self._update_group(index, completed_steps, optimizer) for index in due]
        return any(changed)

    def _window(self, group: Group) -> Window:
        return self._windows[group.config_index]

    # ---- What is masked ----

    @property
    def at_final_sparsity(self) -> bool:
        """Whether the schedule has ended on every tensor: no mask will change any more."""
        return self.total_steps is not None and self.completed_steps >= self.last_update_step

    @property
    def last_update_step(self) -> int:
        """The completed optimizer steps after which the last mask update is due; 0 where there is none."""
        return max((self._window(group).end for group in self._groups), default=0)

    @property
    def sparsity(self) -> float:
        """The share of masked weights among all targets, now."""
        return sum(self.masked.values()) / max(sum(target.weights for target in self.targets), 1)

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Set the gradients of masked weights to zero. Call it after backward and before gradients are clipped."""
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                zero_masked(parameter.grad, self._mask_for(name, parameter))
        self._gradients_masked.update(self.parameters)

    def mask_gradients_in_backward(self) -> list[torch.utils.hooks.RemovableHandle]:
        """Mask each gradient as soon as backward has accumulated it, until the returned handles are removed."""

        def hook_for(name: str) -> Callable[[torch.Tensor], None]:
            @torch.no_grad()
            def mask_gradient(parameter: torch.Tensor) -> None:
                if parameter.grad is not None:
                    zero_masked(parameter.grad, self._mask_for(name, parameter))
                self._gradients_masked.add(name)

            return mask_gradient

        return [
            parameter.register_post_accumulate_grad_hook(hook_for(name))
            for name, parameter in self.parameters.items()
            if parameter.requires_grad
        ]

    def mask_weights(self, names: Iterable[str] | None = None) -> None:
        """Set masked weights to exactly (positive) zero, in the named tensors or in all."""
        for name in self.parameters if names is None else names:
            parameter = self.parameters[name]
            zero_masked(parameter, self._mask_for(name, parameter))

    def _mask_moments(self, optimizer: torch.optim.Optimizer | None, names: Iterable[str]) -> None:
        for name in names:
            parameter = self.parameters[name]
            zero_moments(optimizer, parameter, self._mask_for(name, parameter))

    def _mask_indices(self, name: str, indices: torch.Tensor, optimizer: torch.optim.Optimizer | None) -> None:
        """Mask the weights at flat indices, all of them kept so far; weights and moments become zero there."""
        parameter = self.parameters[name]
        mask = self._mask_for(name, parameter).flatten().clone()
        mask = mask.index_fill_(0, indices, False).view(parameter.shape)
        self.masks[name] = mask
        self.masked[name] += len(indices)
        zero_masked(parameter, mask, indices)
        zero_moments(optimizer, parameter, mask, indices)

    def _mask_for(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """The mask on the device of `like`, to which it moves for good."""
        if self.masks[name].device != like.device:
            self.masks[name] = self.masks[name].to(like.device)
        return self.masks[name]

    # ---- How masks are decided ----

    def _check_finite(self, due: Iterable[int], completed_steps: int) -> None:
        for target in dict.fromkeys(target for index in due for target in self._groups[index].members):
            weight = self.parameters[target.name].detach()
            if not math.isfinite(weight.sum(dtype=torch.float32)) and not weight.isfinite().all():
                raise PruningStateError(
                    f"{target.name}: expected finite weights, got NaN or infinite ones after {completed_steps} "
                    "optimizer steps; nothing was pruned. Lower the learning rate, or start from a sound checkpoint."
                )

    @torch.no_grad()
    def _update_group(self, index: int, step: int, optimizer: torch.optim.Optimizer | None) -> bool:
        """Update the masks of a group, and weights and moments with them; whether any mask changed."""
        group = self._groups[index]
        rules = PATTERNS[group.pattern.name]
        dropped = []
        for target in group.members:
            if group.pattern.name == "unstructured":
                dropped.append(self.masked[target.name])
            else:
                mask = as_matrices(self._mask_for(target.name, self.parameters[target.name]), target.layout)
                dropped.append(int(rules.dropped(mask, group.pattern).sum()))
        start = self._starts.setdefault(index, group.share_dropped(dropped))
        changed = False
        for pool in group.pools(self._window(group), step, start, dropped):
            more = pool.count - sum(dropped[member] for member in pool.members)
            if more > 0:
                self._drop(group, pool, more, optimizer)
                changed = True
        return changed

    def _drop(self, group: Group, pool: Pool, more: int, optimizer: torch.optim.Optimizer | None) -> None:
        """Drop `more` units of the pool's members, `pool.count` with those dropped already: the lowest scores."""
        members = [group.members[member] for member in pool.members]
        if group.pattern.name == "unstructured":
            weights = sum(target.weights for target in members)
            pieces = [self._key_pieces(group, target) for target in members]
            if weights <= _KEYS_HELD:
                pieces = [_held(source) for source in pieces]
            lowest = lowest_of_kept(pieces, more, weights - pool.count + more, weights)
            if lowest is not None:
                for target, indices in zip(members, lowest, strict=True):
                    self._mask_indices(target.name, indices, optimizer)
                return
            sources = [_demoted(source) for source in pieces]
        else:
            sources = [partial(iter, [self._unit_keys(group, target)]) for target in members]
        threshold = find_threshold(sources, pool.count)
        for target, source in zip(members, sources, strict=True):
            drop, ties = taken(source(), threshold)
            threshold = replace(threshold, ties=ties)
            self.masks[target.name] = self._mask_without(group, target, drop)
            self.masked[target.name] = _count_masked(self.masks[target.name])
            self.mask_weights([target.name])
            self._mask_moments(optimizer, [target.name])

    def _key_pieces(self, group: Group, target: Target) -> KeptChunks:
        """The ranking keys of a tensor's weights and which are kept, piece by piece; can be read many times."""
        criterion = CRITERIA[group.config.method]

        def pieces() -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
            weight = self.parameters[target.name].detach().reshape(-1)
            mask = self._mask_for(target.name, weight).reshape(-1)
            dense = not self.masked[target.name]
            size = _CPU_PIECE if weight.device.type == "cpu" else _ACCELERATOR_PIECE
            for offset in range(0, max(weight.numel(), 1), size):
                piece = Piece(target.name, offset, group.config.pruning_seed)
                keys = order_keys(criterion(weight[offset : offset + size], piece))
                yield keys, None if dense else mask[offset : offset + size]

        return pieces

    def _scores(self, group: Group, target: Target) -> torch.Tensor:
        """The scores of a whole tensor as matrices."""
        weight = self.parameters[target.name].detach()
        piece = Piece(target.name, 0, group.config.pruning_seed)
        scores = CRITERIA[group.config.method](weight.reshape(-1), piece).reshape(weight.shape)
        return as_matrices(scores, target.layout)

    def _unit_keys(self, group: Group, target: Target) -> torch.Tensor:
        rules = PATTERNS[group.pattern.name]
        scores = self._scores(group, target)
        mask = as_matrices(self._mask_for(target.name, scores), target.layout)
        keys = order_keys(rules.scores(scores, mask, group.pattern, group.config.block_norm))
        return demote(keys, ~rules.dropped(mask, group.pattern)).reshape(-1)

    def _mask_without(self, group: Group, target: Target, drop: torch.Tensor) -> torch.Tensor:
        """The mask once the units in `drop` (bool, flat) are dropped."""
        mask = self._mask_for(target.name, drop)
        if group.pattern.name == "unstructured":
            return mask & ~drop.reshape(mask.shape)
        rules = PATTERNS[group.pattern.name]
        matrices = as_matrices(mask, target.layout)
        unit_shape = rules.dropped(matrices, group.pattern).shape
        kept = rules.drop(drop.reshape(unit_shape), self._scores(group, target), matrices, group.pattern)
        return from_matrices(kept, target.layout, target.shape)

    # ---- Files ----

    def save(self, directory: str | os.PathLike) -> None:
        """Write masks (see `mask_files.write_masks`), configuration and state into the directory, made if need be."""
        path = Path(directory)
        save_configs(self.configs, path)
        write_masks(path, self.masks)
        state = {
            "completed_steps": self.completed_steps,
            "total_steps": self.total_steps,
            "sparsity": self.sparsity,
            "starts": {str(index): start for index, start in self._starts.items()},
        }
        write_state(path, state)

    def load(self, directory: str | os.PathLike) -> None:
        """Take masks and state from a directory that `save` wrote, and set masked weights to zero.

        Raises PruningStateError, naming the file and the difference, if a file is missing, broken or of another format
        version, or was saved for another model or configuration. Nothing is changed then.
        """
        path = Path(directory)
        self._check_same_configuration(path)
        masks = read_masks(path / MASKS_NAME, {target.name: target.shape for target in self.targets})
        state = read_state(path / STATE_NAME)
        self.masks = {name: masks[name].to(parameter.device) for name, parameter in self.parameters.items()}
        self.masked = {name: _count_masked(mask) for name, mask in self.masks.items()}
        self.completed_steps = state["completed_steps"]
        self._starts = state["starts"]
        self.mask_weights()

    def _check_same_configuration(self, path: Path) -> None:
        try:
            saved = load_configs(path)
        except (FileNotFoundError, PruningConfigError) as error:
            raise PruningStateError(f"{path}: the saved pruning configuration cannot be read: {error}") from error
        differences = [
            f"{field}: {before[field]!r} was saved, {after[field]!r} is configured"
            for before, after in zip(
                (config.to_dict() for config in saved), (config.to_dict() for config in self.configs), strict=False
            )
            for field in before
            if before[field] != after[field]
        ]
        if len(saved) != len(self.configs):
            differences.append(f"{len(saved)} configurations were saved, {len(self.configs)} are configured")
        if differences:
            raise PruningStateError(
                f"{path / CONFIG_NAME}: saved with another pruning configuration ({'; '.join(differences)}); "
                "go on with the saved one, or start a new training from these weights"
            )


def _held(source: Callable[[], Iterable[_Chunk]]) -> Callable[[], Iterable[_Chunk]]:
    """The same chunks, made once."""
    chunks = list(source())
    return lambda: chunks


def _demoted(source: KeptChunks) -> KeyChunks:
    """The same keys, what is not kept lowest."""
    return lambda: (keys if is_kept is None else demote(keys, is_kept) for keys, is_kept in source())


def _count_masked(mask: torch.Tensor) -> int:
    """How many weights are masked; a mask without data (on the meta device) counts as dense."""
    return 0 if mask.is_meta else mask.numel() - int(mask.count_nonzero())
