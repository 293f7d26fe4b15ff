"""`Pruner`: owns the masks of a model and the rule of when and how they change."""

import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .allocation import Pool
from .config import CONFIG_NAME, PruningConfig, PruningConfigError, load_configs, save_configs
from .criteria import NEEDS
from .distributed import PlacementError, processes, rank, total
from .engines import engine_of
from .mask_files import (
    STATE_NAME,
    PruningStateError,
    mask_files,
    read_masks,
    read_state,
    write_mask_shard,
    write_masks,
    write_state,
)
from .optimizers import leaves_zeros, zero_masked
from .patterns import count_of
from .plan import Group, Plan, PlannedTensor, Window, make_groups, make_plan, make_windows
from .ranking import Held, update_masks
from .regions import Region
from .replicas import compare_replicas
from .selection import alone
from .statistics import Statistics
from .targets import Target, find_targets, named_parameters, shape_of

logger = logging.getLogger(__name__)


# Groups that are ranked together where tensors are sharded: they share the turns in which processes add up.
_GROUPS_AT_ONCE = 64


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
        masks: parameter name -> bool tensor of the parameter's shape, True where a weight is kept; of a sharded
            parameter, the mask of the part that this process holds. Zeros that the model has when pruning starts are
            masked and stay zero. They are changed in place.
        masked: parameter name -> number of masked weights, on all processes together.
        sharded: whether processes hold parts of the parameters (FSDP2, ZeRO-3). Then every process must make the same
            calls.
        completed_steps, total_steps: optimizer steps done and to do; `total_steps` is None before the start.
        expected_steps: what `plan` takes for `total_steps` before the start, where that can be told beforehand.
        target_sparsity: the share of masked weights that the schedule ends with; None before the start.

    Raises:
        TargetError: an expression or a shape does not fit the model.
        PruningConfigError: a configuration does not fit into the training, or two are at work on a tensor at once.
        PruningStateError: a weight is NaN or infinite; raised when masks are to be updated, before any is changed. Or
            processes that hold the same weights came to different masks.
        PlacementError: a parameter is sharded in a way that is not supported.
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
        self._statistics = Statistics(model, inputs=(), gradients=())
        self._attach(model)
        if total_steps is not None:
            self.start(total_steps)

    def _attach(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Find the targets in this model and mask the zeros that are there."""
        self.stop_collecting()
        self.model = model
        self._engine = engine_of(model, optimizer)
        self._engine.prepare(model)
        self._moments_known = self._engine.reaches_moments
        self._groups: list[Group] = []
        chosen: dict[str, Target] = {}
        for index, config in enumerate(self.configs):
            found = find_targets(model, config.targets, config.exclude)
            self._groups += make_groups(index, config, found)
            chosen.update({target.name: target for target in found})
        self.parameters = {name: parameter for name, parameter in named_parameters(model) if name in chosen}
        self.targets = [chosen[name] for name in self.parameters]
        self._holdings = {name: self._engine.holding(name, one) for name, one in self.parameters.items()}
        self.sharded = any(holding.sharded for holding in self._holdings.values())
        self._total = total if self.sharded else alone
        self._check_holdings()
        self.masks = {name: (self._weight(name) != 0).contiguous() for name in self.parameters}
        self.masked: dict[str, int] = {}
        self._masked_here = {name: _count_masked(mask) for name, mask in self.masks.items()}
        self._sum_masked(self.masks)
        self._starts: dict[int, float] = {}
        self._owed: set[int] = set()  # groups whose update waits for what their criterion reads
        self._collected: dict[str, torch.Tensor] = {}  # for the update that is under way
        self._gradients_masked: set[str] = set()  # names, since the last optimizer step
        self._statistics = self._make_statistics(model)
        if not self.targets:
            logger.warning("Nothing to prune: the model has no weights that the pruning configuration selects.")

    def _make_statistics(self, model: nn.Module) -> Statistics:
        wanted: dict[str, set[str]] = {"inputs": set(), "gradients": set()}
        for group in self._groups:
            if group.config.method in NEEDS:
                wanted[NEEDS[group.config.method]].update(target.name for target in group.members)
        if wanted["gradients"] and self._engine.steps_in_backward:
            raise PruningConfigError(
                ["method: expected one that reads no gradients under DeepSpeed, which has used them up, got 'taylor'"]
            )
        return Statistics(model, **wanted)

    def _check_holdings(self) -> None:
        """Make sure that the parts of all processes are each tensor once."""
        counted = [self._holdings[name].region.weights * self._counts(name) for name in self.parameters]
        for target, weights in zip(self.targets, self._sum(counted), strict=True):
            if weights != target.weights:
                raise PlacementError(
                    f"{target.name}: expected {target.weights} weights on all processes together, found {weights}; it "
                    "is sharded in a way that is not supported"
                )

    def _weight(self, name: str) -> torch.Tensor:
        """What this process holds of a parameter, as it is trained."""
        return self._engine.weight(self.parameters[name])

    def _counts(self, name: str) -> bool:
        """Whether this process counts what it holds of a tensor; without shards every process counts for itself."""
        return self._holdings[name].counted or not self.sharded

    def _sum(self, numbers: Sequence[int]) -> list[int]:
        """Numbers added up over all processes, where tensors are sharded."""
        return self._total(torch.tensor(numbers, dtype=torch.int64)).tolist()

    def _sum_masked(self, names: Iterable[str]) -> None:
        names = list(names)
        here = [self._masked_here[name] if self._counts(name) else 0 for name in names]
        self.masked.update(zip(names, self._sum(here), strict=True))

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
        self._attach(model if model is not None else self.model, optimizer)
        self._windows = make_windows(self.configs, self._groups, total_steps)
        self.total_steps = total_steps
        self.completed_steps = completed_steps
        self.target_sparsity = self.plan().final_sparsity
        self._log_zeros()
        self._check_finite(range(len(self._groups)), completed_steps)
        self._mask_moments(optimizer, self.parameters)
        compare_replicas(self.masks, self._holdings)
        begun = [index for index, group in enumerate(self._groups) if self._window(group).begin <= completed_steps]
        self._owed = {index for index in begun if self._groups[index].config.method in NEEDS}
        self._update_groups([index for index in begun if index not in self._owed], completed_steps, optimizer)
        self._collect_if_due()

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

    def resume(
        self,
        total_steps: int,
        directory: str | os.PathLike,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        """Go on with a training whose masks and state `save` wrote into `directory`; see `load` for the errors."""
        self._attach(model if model is not None else self.model, optimizer)
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
        all_weights = sum(math.prod(shape_of(parameter)) for parameter in self.model.parameters())
        return make_plan(self._groups, windows, tensors, total_steps, all_weights)

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Count one completed optimizer step and do what it calls for; call it right after `optimizer.step()`."""
        self.after_optimizer_step(optimizer)
        self.update(self.completed_steps + 1, optimizer)

    def after_optimizer_step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Put masked weights back to zero where the optimizer may have moved them.

        It may have if it is not one that works element by element, or if gradients were not masked before it, or if the
        weights are another optimizer's, or if its moments could not be reached before.
        """
        names = list(self.parameters)
        if optimizer is not None and leaves_zeros(optimizer) and self._moments_known:
            safe = self._engine.trained_by(optimizer, self.parameters.values())
            names = [
                name
                for name, parameter in self.parameters.items()
                if parameter.requires_grad and not (name in self._gradients_masked and parameter in safe)
            ]
        self._moments_known = True
        self.mask_weights(names)
        self._mask_moments(optimizer, names)
        self._gradients_masked.clear()

    def update(self, completed_steps: int, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """Update masks if that is due after `completed_steps` optimizer steps; whether any mask changed.

        New masks are applied to the weights, and to the moments in the optimizer's state.
        """
        if self.total_steps is None:
            raise PruningStateError("The pruner was not started: give it total_steps, or call start(total_steps).")
        changed = self._update_groups(self._due(completed_steps), completed_steps, optimizer)
        self._collect_if_due()
        return changed

    def _due(self, step: int) -> list[int]:
        due = (index for index, group in enumerate(self._groups) if self._window(group).due(step))
        return sorted(self._owed.union(due))

    def _collect_if_due(self) -> None:
        """Collect what criteria read in the step to come, if masks are to be updated after it."""
        if any(self._groups[index].config.method in NEEDS for index in self._due(self.completed_steps + 1)):
            self._statistics.begin()

    def stop_collecting(self) -> None:
        """Take away the hooks that collect what criteria read; training is over."""
        self._statistics.stop()

    @property
    def needs_gradients(self) -> bool:
        """Whether the gradients of the step that is under way are wanted: `mask_gradients` takes them."""
        return self._statistics.is_collecting and bool(self._statistics.gradient_names)

    def _update_groups(self, due: Sequence[int], completed_steps: int, optimizer: torch.optim.Optimizer | None) -> bool:
        if due:
            self._engine.prepare(self.model)
        self._check_finite(due, completed_steps)
        self.completed_steps = completed_steps
        due = self._collect(due)
        changed: list[str] = []
        for batch in self._batches(due):
            names = self._update_batch(batch, completed_steps, optimizer)
            self._sum_masked(names)
            changed += names
        self._collected = {}
        compare_replicas({name: self.masks[name] for name in changed}, self._holdings)
        return bool(changed)

    def _collect(self, due: Sequence[int]) -> list[int]:
        """Take what criteria read from the step before; the groups that can be updated: the others are owed theirs."""
        if not any(self._groups[index].config.method in NEEDS for index in due):
            return list(due)
        self._collected, unusable = self._statistics.finish()
        owed = {
            index
            for index in due
            if self._groups[index].config.method in NEEDS
            and any(target.name in unusable for target in self._groups[index].members)
        }
        self._owed = (self._owed - set(due)) | owed
        if owed:
            logger.warning(
                "What the method reads of %s was not seen in this step, or is not finite: its masks are updated later.",
                min(unusable),
            )
        return [index for index in due if index not in owed]

    def _batches(self, due: Sequence[int]) -> Iterator[list[int]]:
        """Groups that are ranked together: alone, one at a time; never two that have a tensor in common."""
        batch: list[int] = []
        names: set[str] = set()
        for index in due:
            members = {target.name for target in self._groups[index].members}
            if batch and (not self.sharded or len(batch) == _GROUPS_AT_ONCE or names & members):
                yield batch
                batch, names = [], set()
            batch.append(index)
            names |= members
        if batch:
            yield batch

    def _window(self, group: Group) -> Window:
        return self._windows[group.config_index]

    # ---- What is masked ----

    @property
    def at_final_sparsity(self) -> bool:
        """Whether the schedule has ended on every tensor: no mask will change any more."""
        return self.total_steps is not None and self.completed_steps >= self.last_update_step and not self._owed

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
        """Set the gradients of masked weights to zero. Call it after backward and before gradients are clipped.

        Where the optimizer steps inside backward (DeepSpeed), it does nothing: see `mask_gradients_in_backward`.
        """
        if self._engine.steps_in_backward:
            return
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                gradient = self._engine.part(parameter.grad)
                zero_masked(gradient, self._mask_for(name, gradient))
                self._statistics.keep_gradient(name, gradient)
        self._gradients_masked.update(self.parameters)

    def mask_gradients_in_backward(self, optimizer: Any = None) -> list[Any]:
        """Mask each gradient as soon as backward has it, until the returned handles are removed (`remove()`).

        DeepSpeed needs its optimizer, as accelerate wraps it.
        """

        def mask_of(name: str, gradient: torch.Tensor) -> torch.Tensor:
            self._gradients_masked.add(name)
            return self._mask_for(name, gradient)

        return list(self._engine.hook_gradients(self.parameters, mask_of, optimizer))

    @property
    def steps_in_backward(self) -> bool:
        """Whether the optimizer steps inside backward, where gradients can be masked by hooks alone (DeepSpeed)."""
        return self._engine.steps_in_backward

    def mask_weights(self, names: Iterable[str] | None = None) -> None:
        """Set masked weights to exactly (positive) zero, in the named tensors or in all."""
        if names is None:
            self._engine.prepare(self.model)
        for name in self.parameters if names is None else names:
            parameter = self.parameters[name]
            self._engine.mask_weight(parameter, self._mask_for(name, self._engine.part(parameter)))

    def _mask_moments(self, optimizer: torch.optim.Optimizer | None, names: Iterable[str]) -> None:
        for name in names if self._moments_known else ():
            parameter = self.parameters[name]
            self._engine.mask_moments(optimizer, parameter, self._mask_for(name, self._engine.part(parameter)))

    def _mask_for(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """The mask on the device of `like`, to which it moves for good."""
        if self.masks[name].device != like.device:
            self.masks[name] = self.masks[name].to(like.device)
        return self.masks[name]

    # ---- How masks are decided ----

    def _check_finite(self, due: Iterable[int], completed_steps: int) -> None:
        names = list(dict.fromkeys(target.name for index in due for target in self._groups[index].members))
        bad = self._sum([int(not _is_finite(self._weight(name))) for name in names])
        for name, is_bad in zip(names, bad, strict=True):
            if is_bad:
                raise PruningStateError(
                    f"{name}: expected finite weights, got NaN or infinite ones after {completed_steps} "
                    "optimizer steps; nothing was pruned. Lower the learning rate, or start from a sound checkpoint."
                )

    @torch.no_grad()
    def _update_batch(self, due: Sequence[int], step: int, optimizer: torch.optim.Optimizer | None) -> list[str]:
        """Update the masks of groups, and weights and moments with them; the names of tensors that were ranked."""
        groups = [self._groups[index] for index in due]
        held = {target.name: self._held(target) for group in groups for target in group.members}

        def pools_of(place: int, gone: list[int]) -> list[Pool]:
            group = groups[place]
            start = self._starts.setdefault(due[place], group.share_dropped(gone))
            return group.pools(self._window(group), step, start, gone)

        names = []
        for target, positions in update_masks(groups, held, pools_of, self._total):
            names.append(target.name)
            parameter, mask = self.parameters[target.name], self.masks[target.name]
            self._engine.mask_weight(parameter, mask, positions)
            if self._moments_known:
                self._engine.mask_moments(optimizer, parameter, mask, positions)
            newly = _count_masked(mask) - self._masked_here[target.name] if positions is None else len(positions)
            self._masked_here[target.name] += newly
        return names

    def _held(self, target: Target) -> Held:
        weight = self._weight(target.name).reshape(-1)
        return Held(
            target=target,
            holding=self._holdings[target.name],
            weight=weight,
            mask=self._mask_for(target.name, weight).reshape(-1),
            masked=self.masked[target.name],
            counted=self._counts(target.name),
            statistic=self._collected.get(target.name),
        )

    # ---- Files ----

    def save(self, directory: str | os.PathLike) -> None:
        """Write masks (see `mask_files`), configuration and state into the directory, made if need be.

        Where tensors are sharded, every process must call it, and writes the masks of its parts; without shards, the
        process that calls it writes everything.
        """
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        if self.sharded:
            masks = {name: mask for name, mask in self.masks.items() if self._counts(name) and mask.numel()}
            write_mask_shard(path, masks, self._regions, rank(), processes())
        else:
            write_masks(path, self.masks)
        if self.sharded and rank() > 0:
            return
        save_configs(self.configs, path)
        state = {
            "completed_steps": self.completed_steps,
            "total_steps": self.total_steps,
            "sparsity": self.sparsity,
            "starts": {str(index): start for index, start in self._starts.items()},
            "owed": sorted(self._owed),
        }
        write_state(path, state)

    def save_from_all(self, directory: str | os.PathLike, should_save: bool) -> None:
        """Save where every process calls this: each its parts if tensors are sharded, else those that should save."""
        if self.sharded or should_save:
            self.save(directory)

    def load(self, directory: str | os.PathLike) -> None:
        """Take masks and state from a directory that `save` wrote, and set masked weights to zero.

        Raises PruningStateError, naming the file and the difference, if a file is missing, broken or of another format
        version, or was saved for another model or configuration. Nothing is changed then.
        """
        path = Path(directory)
        self._check_same_configuration(path)
        masks = read_masks(path, {target.name: target.shape for target in self.targets}, self._regions)
        state = read_state(path / STATE_NAME)
        self.masks = {name: masks[name].to(parameter.device) for name, parameter in self.parameters.items()}
        self._masked_here = {name: _count_masked(mask) for name, mask in self.masks.items()}
        self._sum_masked(self.masks)
        self.completed_steps = state["completed_steps"]
        self._starts = state["starts"]
        self._owed = state["owed"]
        self.mask_weights()
        compare_replicas(self.masks, self._holdings)
        self.stop_collecting()
        if self.total_steps is not None:
            self._collect_if_due()

    @property
    def _regions(self) -> dict[str, Region]:
        return {name: holding.region for name, holding in self._holdings.items()}

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


def state_files(directory: Path) -> list[Path]:
    """What `Pruner.save` has written into a directory."""
    others = [directory / name for name in (CONFIG_NAME, STATE_NAME)]
    return [*mask_files(directory), *(path for path in others if path.exists())]


def _is_finite(weight: torch.Tensor) -> bool:
    return math.isfinite(weight.sum(dtype=torch.float32)) or bool(weight.isfinite().all())


def _count_masked(mask: torch.Tensor) -> int:
    """How many weights are masked; a mask without data (on the meta device) counts as dense."""
    return 0 if mask.is_meta else mask.numel() - int(mask.count_nonzero())
