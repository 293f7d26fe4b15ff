"""`Pruner`: holds the masks of a model, and updates them on schedule."""

import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..config.checks import as_path
from ..config.pruning import PruningConfig
from ..engines.choose import engine_of
from ..engines.optimizers import is_at_step, is_micro_batch, zero_masked
from ..errors import PlacementError, PruningStateError
from ..model.names import named_parameters, shape_of
from ..model.targets import refuse_reparametrised
from ..saved.pruning_state import PruningState
from ..structure.chosen import Chosen
from ..structure.proof import Example
from ..structure.shrink import Cut
from .filing import Filing
from .finding import as_configs, check_model, counted_targets, find_groups, identities
from .groups import Group, Window, as_steps, make_windows, sharing_window
from .masks import Masks
from .notices import (
    tell_of_few_units,
    tell_of_left_out,
    tell_of_nothing_to_prune,
    tell_of_weaker,
    tell_of_zeros,
)
from .penalty_terms import WeightPenalties
from .plan import Plan, make_plan, plan_tensor
from .readings import Readings
from .resuming import state_of_what_is_left
from .searching import Searching
from .sharing import Sharing
from .structures import SmallerModel, Structures
from .updating import Updates
from .watch import Watch
from .zeroing import Zeroing

logger = logging.getLogger(__name__)

_NOT_STARTED = "The pruner has not been started: pass total_steps to Pruner, or call start(total_steps)."


class Pruner:
    """Prunes the tensors of a model on a schedule, and keeps pruned weights at exactly zero.

    In your own training loop:

        pruner = Pruner(model, config, total_steps=1000)
        loss.backward()
        pruner.mask_gradients()      # before gradients are clipped
        optimizer.step()
        pruner.step(optimizer)       # one optimizer step is completed; masks are updated if due
        optimizer.zero_grad()

    The model's modules, parameter names and state dict are never changed.

    Args:
        model: the model, on any device.
        config: one configuration, or several, which prune different tensors, or the same ones one after another.
        total_steps: the number of optimizer steps of the training. If given, pruning starts at once: an update due at
            step 0 is made here. If not, call `start` before training.
        example: a batch that the model runs with, or a function that returns one. For a target (`target_speedup` and
            others) it is what the model is measured with, some 32 samples of the data. For structures it is used where
            no inputs to try what can be removed can be made from the model's configuration.

    Attributes:
        targets: the tensors to prune, in the model's order.
        parameters: parameter name -> parameter.
        masks: parameter name -> bool tensor of the parameter's shape, True where a weight is kept; for a sharded
            parameter, the mask of this process's shard. Zeros that the model has when pruning starts are masked and
            stay zero. Masks are changed in place.
        masked: parameter name -> number of masked weights, on all processes together.
        sharded: whether the parameters are sharded over processes (FSDP2, ZeRO-3). Every process must then make the
            same calls.
        completed_steps: the number of completed optimizer steps.
        total_steps: the number of optimizer steps of the training; None before the start.
        expected_steps: what `plan` uses as `total_steps` before the start, if it is known.
        left_out: parameter name -> why it is not pruned, for weights of layers that are not targets by default.
        target_sparsity: the share of masked weights at the end of the schedule; None before the start.
        configs: the configurations. In place of one with a target there are, once the structure is chosen, those of the
            structures that are removed.
        codebooks: parameter name -> the values that its weights share, ascending (float32, on the CPU); empty before
            they do. A tensor whose configuration has no `shared_values` has none, nor has one of which groups of
            weights, such as rows, have values of their own.
        penalties: name such as `l1_penalty` -> what was added to the loss in the current optimizer step, for the
            weights that this process counts.

    Raises:
        TargetError: an expression or a shape does not fit the model.
        PruningConfigError: a configuration does not fit into the training, or two prune a tensor at the same time.
        ArgumentError: an argument has the wrong type.
        PruningStateError: a weight is NaN or infinite when masks are to be updated (no mask is changed then), or
            processes that hold the same weights have different masks.
        PlacementError: a parameter is sharded in a way that is not supported.
    """

    def __init__(
        self,
        model: nn.Module,
        config: PruningConfig | Sequence[PruningConfig],
        total_steps: int | None = None,
        example: Mapping[str, Any] | Example | None = None,
    ):
        check_model(model)
        get_example: Example = example if callable(example) else lambda: example
        self._search = Searching(as_configs(config), get_example)
        self.configs = self._search.configs
        self._state = PruningState()
        self.total_steps: int | None = None
        self.expected_steps: int | None = None
        self.target_sparsity: float | None = None
        self._windows: list[Window] = []
        self._structures = Structures(get_example)
        refuse_reparametrised(model)
        self._attach(model)
        tell_of_left_out(self.left_out)
        if total_steps is not None:
            self.start(total_steps)

    def _attach(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Find the targets in this model, and mask the zeros that they have."""
        self.model = model
        found = find_groups(model, self.configs, self._structures)
        self._groups, self.left_out = found.groups, found.left_out
        self._engine = engine_of(model, optimizer)
        self._engine.prepare(model)
        self.parameters = {name: parameter for name, parameter in named_parameters(model) if name in found.targets}
        self.targets = [found.targets[name] for name in self.parameters]
        trained = {name for name, parameter in self.parameters.items() if parameter.requires_grad}
        from_zero = found.adapters | (trained - found.kept)
        self._masks = Masks(self.targets, self.parameters, self._engine, from_zero, found.of_units)
        self._structures.mask_zero_units(self._groups, self._masks)
        self._structures.pass_by(self._groups, self._masks, model)
        self._counted = counted_targets(found, self.masked)
        self._fresh = [name for name in self._masks.fresh if name not in found.adapters]
        self._state = PruningState(self.completed_steps)
        self._readings = Readings(model, self._groups, self.parameters, self._masks, self._engine)
        self._updates = Updates(
            model, self._groups, self.parameters, self._masks, self._engine, self._readings, self._structures
        )
        self._penalties = WeightPenalties(self._groups, self.parameters, self._masks, self._engine)
        self._sharing = Sharing(found.shared_values, self.parameters, self._masks, self._engine)
        self._sharing.check_optimizer(optimizer)
        self._watch = Watch()
        self._zeroing = Zeroing(self.parameters, self._masks, self._engine, self._watch)
        self._filing = Filing(
            self._groups, self.left_out, self._masks, self._readings, self._sharing, self._structures, self._watch
        )
        if not self.targets and self.removed is None and not self._search.waits:
            tell_of_nothing_to_prune()

    # ---- The structure for a target ----

    @property
    def chosen(self) -> Chosen | None:
        """What was chosen for a target; None before `search`, and without one."""
        return self._search.chosen

    def search(
        self,
        directory: str | os.PathLike | None = None,
        device: torch.device | None = None,
        model: nn.Module | None = None,
        dense_fields: Mapping[str, int] | None = None,
    ) -> Chosen | None:
        """Choose the structure for a target (`target_speedup` and others), once: measure the model and search.

        `start` and `plan` call it. Every process must; the first one measures, and all get the same. The state of
        random numbers, and the model, are left as they were.

        Args:
            directory: where `latency_table.json` is kept, and used again under the same conditions.
            device: where the model is measured, if not where it is.
            model: replaces the current model.
            dense_fields: fields of the model's configuration, and their values in the dense model that the target
                refers to, if unused tokens were removed from it before, such as `{"vocab_size": 30522}`.

        Raises PruningConfigError for a target that cannot be reached, StructureError if nothing can be removed from the
        model, and PlacementError for a model that is sharded over processes.
        """
        if self._search.waits:
            model = model if model is not None else self.model
            self._search.find(model, as_path(directory) if directory is not None else None, device, dense_fields)
            self._prune_as_chosen(model)
        return self.chosen

    def _prune_as_chosen(self, model: nn.Module) -> None:
        self.configs = self._search.configs
        self._attach(model)

    def measure_target(self) -> Chosen | None:
        """Time the smaller model in turns with a dense one, after training; returns what was chosen, with the times.

        Every process must call it; the first one measures. Of a model that is sharded over processes, one of the sizes
        that will be saved is timed, with new weights.
        """
        smaller = self.smaller_model() if self.sharded and self.chosen is not None else None
        self._search.time_again(self.model, self.removed, smaller)
        return self.chosen

    # ---- The smaller model ----

    @property
    def can_shrink(self) -> bool:
        """Whether a structure is pruned whose last units are masked, and which is not cut out yet."""
        return self.total_steps is not None and self._units_are_masked() and not self.sharded

    def _units_are_masked(self) -> bool:
        """Whether there are units to cut out: a structure is pruned, and its last units are masked."""
        groups = [index for index, group in enumerate(self._groups) if group.coupled]
        return bool(groups) and set(self._unfinished()).isdisjoint(groups)

    def shrink(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Cut the masked units of structures out of the model, in place: it is smaller and faster from then on.

        The masks of other configurations go on. A parameter that is cut becomes a new one, without a gradient; the
        optimizer gets it in place of the old one, and its moments are cut. Nothing is changed if no structure is
        pruned, or if its units were cut out already.

        Raises StructureError, before anything is changed, if the optimizer keeps state of other shapes than its
        parameters', PlacementError if parameters are sharded, and PruningStateError if units are still to be masked.
        """
        if self.sharded:
            raise PlacementError("a model that is sharded over processes cannot be shrunk in place; it is when saved")
        if not any(group.coupled for group in self._groups):
            return
        if not self.can_shrink:
            raise PruningStateError(
                "The pruner has not masked all units yet: shrink the model when can_shrink is true, which it is after "
                f"step {self.last_update_step} at the latest."
                if self._windows
                else _NOT_STARTED
            )
        self._go_on_with(*self._structures.cut(self._groups, self._masks, self.model, optimizer))
        self._begin_step()

    def cut_as_saved(self, directory: str | os.PathLike, model: nn.Module | None = None) -> None:
        """Before a checkpoint's weights are loaded: cut out of the model what was cut out of that in the checkpoint.

        `model` replaces the current model. Nothing is done if nothing was. Raises PruningStateError if the model is
        neither the one that was pruned nor the one that was left of it.
        """
        if self._search.take(as_path(directory)):
            of = model if model is not None else self.model
            self._structures.note_removed(as_path(directory), of)
            self._prune_as_chosen(of)
        if model is not None and model is not self.model:
            self.stop_collecting()
            self._attach(model)
        if self.removed is None and self._structures.cut_as_saved(as_path(directory), self.model):
            self._attach(self.model)

    def smaller_model(self) -> SmallerModel | None:
        """The model without its masked units, to be saved in place of one that is sharded; every process must call it.

        None if no structure is pruned, if it is not finished, or if its units were cut out already.
        """
        if not self._units_are_masked():
            return None
        return self._structures.smaller_model(self._groups, self._masks, self.configs, self.chosen)

    def _go_on_with(self, masks: Mapping[str, torch.Tensor], cut: Cut) -> None:
        """Go on with a model out of which units were cut, with these masks."""
        before = identities(self._groups, cut.name_of)
        shapes = {cut.name_of(target.name): target.shape for target in self.targets}
        state, shared = self._state, self._sharing.cut(cut)
        self.stop_collecting()
        self._attach(self.model)
        self._state = state_of_what_is_left(state, before, shapes, self._groups)
        self._masks.take({name: masks[name] for name in self.parameters})
        self._sharing.take(*shared)
        self._expect()
        self.mask_weights()
        self._watch.sample(self.masks, self.parameters)

    @property
    def removed(self) -> dict[str, Any] | None:
        """What was cut out of the model, as in `pruning_structure.json`; None if nothing was."""
        return self._structures.removed

    def layer_pairs(self, layers: int) -> list[list[int]] | None:
        """Pairs of hidden states to compare, of this model and of a teacher of `layers`, where layers are removed.

        A layer that is kept is compared with the same one of the teacher, the last with the last; 0 are the embeddings.
        None where layers are no structure that is pruned, or if the teacher has another number of layers.
        """
        return self._structures.layer_pairs(layers)

    # ---- When ----

    def start(
        self,
        total_steps: int,
        model: nn.Module | None = None,
        completed_steps: int = 0,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        """Start pruning for a training of `total_steps` optimizer steps: mask the zeros that the model has.

        Updates due at step 0 are made. After `completed_steps` of training without pruning, what the schedule would
        have pruned by then is pruned now. `model` replaces the current model. Raises PruningConfigError if the
        configuration does not fit into that many steps.
        """
        total_steps = as_steps(total_steps)
        if model is not None:
            check_model(model)
        self.stop_collecting()
        self.search(model=model)
        told = self.left_out
        self._attach(model if model is not None else self.model, optimizer)
        if self.left_out != told:
            tell_of_left_out(self.left_out)
        self._windows = make_windows(self.configs, self._groups, total_steps)
        self.total_steps = self._state.total_steps = total_steps
        self._state.completed_steps = completed_steps
        self.target_sparsity = self.plan().final_sparsity
        tell_of_zeros(self._groups, self.masked, self._fresh)
        tell_of_few_units(self._groups, self._window)
        tell_of_weaker(self._groups)
        self._masks.check_finite(self._updates.names(range(len(self._groups))), completed_steps)
        self._zeroing.mask_moments(optimizer, self.parameters)
        self.mask_weights()
        self._watch.sample(self.masks, self.parameters)
        self._masks.compare(self.parameters)
        begun = [index for index, group in enumerate(self._groups) if self._window(group).begin <= completed_steps]
        self._state.owed = {index for index in begun if self._groups[index].needs_a_step}
        self._update_groups([index for index in begun if index not in self._state.owed], completed_steps, optimizer)
        self._begin_sharing()
        self._begin_step()

    def resume(
        self,
        total_steps: int,
        directory: str | os.PathLike,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        zeros_loaded: bool = False,
    ) -> None:
        """Resume a training whose masks and state `save` wrote into `directory`; see `load` for the errors.

        `total_steps` may differ from those of the training that saved them: what the schedule would have pruned by now
        is then pruned after the next optimizer step. With `zeros_loaded`, the weights must be those that were saved
        with these masks: masked weights that are not zero raise PruningStateError.
        """
        total_steps = as_steps(total_steps)
        self.stop_collecting()
        if self._search.take(as_path(directory)):
            self._structures.note_removed(as_path(directory), model if model is not None else self.model)
            self.configs = self._search.configs
        self._attach(model if model is not None else self.model, optimizer)
        self.cut_as_saved(directory)
        self._windows = make_windows(self.configs, self._groups, total_steps)
        self.total_steps = total_steps
        self._load(directory, zeros_loaded)
        self._expect()

    def _expect(self) -> None:
        """Compute the target sparsity anew."""
        plan = self.plan()
        self.target_sparsity = self._structures.with_removed(plan.final_sparsity * plan.weights, plan.weights)

    def plan(self, total_steps: int | None = None) -> Plan:
        """What would be pruned, how much and when, starting from the current masks. Changes nothing.

        For a target, the structure is chosen first, see `search`.

        `total_steps` (optimizer steps) is needed before the start. Raises PruningConfigError if it is missing, or if
        the configuration does not fit into that many steps.
        """
        known = (total_steps, self.total_steps, self.expected_steps)
        total_steps = as_steps(next((steps for steps in known if steps is not None), None))
        self.search()
        windows = make_windows(self.configs, self._groups, total_steps)
        tensors = [plan_tensor(one, self.masked[one.name], one in self._counted) for one in self.targets]
        all_weights = sum(math.prod(shape_of(parameter)) for parameter in self.model.parameters())
        plan = make_plan(self._groups, windows, tensors, total_steps, all_weights, self._state.allotted)
        begin = sharing_window(self._groups, windows, total_steps)[0]
        return replace(plan, left_out=self.left_out).with_sharing(self._sharing.forms, begin)

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Count one completed optimizer step, and update masks if due; call it right after `optimizer.step()`.

        Under `accelerator.accumulate`, with the optimizer that accelerate has prepared, a micro-batch that does not end
        an optimizer step is not counted. Raises PruningStateError for more steps than `total_steps`.
        """
        if not is_at_step(optimizer):
            return
        if self.total_steps is not None and self.completed_steps >= self.total_steps:
            raise PruningStateError(
                f"expected at most the {self.total_steps} optimizer steps that pruning was started for (total_steps), "
                "got one more; count optimizer steps, not micro-batches, and pass the optimizer that accelerate has "
                "prepared to step()"
            )
        self.after_optimizer_step(optimizer)
        self.update(self.completed_steps + 1, optimizer)

    def after_optimizer_step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Set masked weights back to zero if the optimizer, or anything else, may have changed them.

        The optimizer may have if it does not work element by element, if gradients were not masked before the step, if
        the weights are not this optimizer's, or if its moments could not be zeroed before. What else changes weights,
        such as an EMA or `load_state_dict`, is noticed from a sample of the masked weights, with a warning.

        Weights that share values get those of the clusters that they are in now.
        """
        self._sharing.check_optimizer(optimizer)
        self._zeroing.after_optimizer_step(optimizer)
        self._sharing.step(self.completed_steps + 1, self._sharing_window())
        self._penalties.start_step()

    def update(self, completed_steps: int, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """Update masks if due after `completed_steps` optimizer steps; returns whether any mask changed.

        New masks are applied to the weights, and to the moments in the optimizer's state.
        """
        if self.total_steps is None:
            raise PruningStateError(_NOT_STARTED)
        due = self._due(completed_steps)
        self._readings.end_step(due)
        changed = self._update_groups(due, completed_steps, optimizer)
        self._begin_sharing()
        self._begin_step()
        return changed

    def _begin_sharing(self) -> None:
        """Let weights share values, where a configuration says so, once no mask will change any more."""
        if self.at_final_sparsity:
            self._engine.prepare(self.model)
            self._sharing.begin(self.completed_steps, self._sharing_window())

    def _sharing_window(self) -> tuple[int, int]:
        return sharing_window(self._groups, self._windows, self.total_steps or 0)

    def _due(self, step: int) -> list[int]:
        due = (index for index in self._unfinished() if self._window(self._groups[index]).due(step))
        return sorted(self._state.owed.union(due))

    def _unfinished(self) -> list[int]:
        """The groups whose last update is still to be made."""
        return [index for index in range(len(self._groups)) if index not in (self._state.finished or ())]

    def _begin_step(self) -> None:
        """Start to collect and remember what methods need from the next step."""
        self._readings.begin_step(self._due(self.completed_steps + 1), self._remembering(), self._state.allotted)
        self._structures.begin_step()

    def _remembering(self) -> list[int]:
        """The groups whose methods remember something of the next step, because an update follows at or after it."""
        return [index for index in self._unfinished() if self._groups[index].remembers and self._windows]

    def stop_collecting(self) -> None:
        """Remove the hooks that collect what methods read, when training is over."""
        self._readings.stop()

    @property
    def needs_gradients(self) -> bool:
        """Whether the gradients of the current step are needed; `mask_gradients` collects them."""
        return self._readings.wants_gradients or bool(self._summing())

    def _summing(self) -> list[int]:
        """The groups of units whose scores are added up over steps, because an update follows at or after the next."""
        of_units = (index for index in self._unfinished() if self._groups[index].coupled and self._windows)
        return [index for index in of_units if "gradients" in self._groups[index].reads]

    def _update_groups(self, due: Sequence[int], completed_steps: int, optimizer: torch.optim.Optimizer | None) -> bool:
        if due:
            self._engine.prepare(self.model)
        self._masks.check_finite(self._updates.names(due), completed_steps)
        self._state.completed_steps = completed_steps
        changed = self._updates.make(due, self._state, self._windows, optimizer, self._zeroing.moments_known)
        self._watch.sample(self.masks, changed)
        self._masks.compare(changed)
        return bool(changed)

    def _window(self, group: Group) -> Window:
        return self._windows[group.config_index]

    # ---- What is masked ----

    @property
    def masks(self) -> dict[str, torch.Tensor]:
        """Parameter name -> mask, as described above."""
        return self._masks.parts

    @property
    def masked(self) -> dict[str, int]:
        """Parameter name -> number of masked weights, on all processes together."""
        return self._masks.masked

    @property
    def sharded(self) -> bool:
        """Whether the parameters are sharded over processes."""
        return self._masks.sharded

    @property
    def completed_steps(self) -> int:
        """The number of completed optimizer steps."""
        return self._state.completed_steps

    @property
    def codebooks(self) -> dict[str, torch.Tensor]:
        """Parameter name -> the values that its weights share, as described above."""
        return self._sharing.codebooks

    @property
    def at_final_sparsity(self) -> bool:
        """Whether the last update of every tensor was made: no mask will change any more."""
        return self.total_steps is not None and not self._unfinished()

    @property
    def last_update_step(self) -> int:
        """The completed optimizer steps after which the last mask update is due; 0 if there is none."""
        return max((self._window(group).end for group in self._groups), default=0)

    @property
    def sparsity(self) -> float:
        """The share of masked weights, now, in the tensors that weights or units are taken of."""
        masked = sum(self.masked[target.name] for target in self._counted)
        return self._structures.with_removed(masked, sum(target.weights for target in self._counted))

    @torch.no_grad()
    def mask_gradients(self, loss_scale: float = 1.0) -> None:
        """Set the gradients of masked weights to zero. Call it after backward and before gradients are clipped.

        Once in an optimizer step, the gradients of penalties are added, times `loss_scale`, the scale of an fp16 scaler
        that has not unscaled the gradients yet; the values of the penalties are in `penalties`.

        Under `accelerator.accumulate` it does nothing before the last micro-batch of a step, whose gradients are those
        of the whole batch. If the optimizer steps inside backward (DeepSpeed), this does nothing: see
        `mask_gradients_in_backward`.
        """
        if self._engine.steps_in_backward or is_micro_batch():
            return
        whole = {name: one.grad for name, one in self.parameters.items() if one.grad is not None}
        gradients = {name: self._engine.part(gradient) for name, gradient in whole.items()}
        self._readings.see_gradients(gradients, loss_scale)
        summing = [self._groups[index] for index in self._summing()]
        self._structures.add_gradients(summing, self._masks, gradients, loss_scale)
        for name, gradient in gradients.items():
            zero_masked(gradient, self._masks.for_tensor(name, gradient))
            self._readings.keep_gradient(name, gradient)  # of the loss, without penalties
            self._penalties.add(name, gradient, self._windows, self._state, loss_scale)  # zero where masked
        self._zeroing.gradients_masked.update(self.parameters)

    @property
    def penalties(self) -> dict[str, torch.Tensor]:
        """What penalties added to the loss in this step, as described above."""
        return self._penalties.terms

    @property
    def has_penalties(self) -> bool:
        """Whether a configuration puts a penalty on weights."""
        return bool(self._penalties)

    def mask_gradients_in_backward(self, optimizer: Any = None) -> list[Any]:
        """Mask each gradient as soon as backward has computed it, until the returned handles are removed (`remove()`).

        If the optimizer steps inside backward (DeepSpeed), the gradients of penalties are added here too, once in an
        optimizer step; this needs the optimizer, as accelerate wraps it.
        """

        def edit(name: str, gradient: torch.Tensor, loss_scale: float) -> None:
            if name in self._readings.whole_gradients:
                return  # `mask_gradients` masks it, after it was read
            if self._engine.steps_in_backward:
                self._penalties.add(name, gradient, self._windows, self._state, loss_scale)
            zero_masked(gradient, self._masks.for_tensor(name, gradient))
            self._zeroing.gradients_masked.add(name)

        return list(self._engine.hook_gradients(self.parameters, edit, optimizer))

    @property
    def steps_in_backward(self) -> bool:
        """Whether the optimizer steps inside backward (DeepSpeed); gradients can then be masked by hooks only."""
        return self._engine.steps_in_backward

    def mask_weights(self, names: Iterable[str] | None = None) -> None:
        """Set masked weights to exactly +0.0, in the named tensors or in all."""
        if names is None:
            self._engine.prepare(self.model)
        self._zeroing.mask_weights(self.parameters if names is None else names)

    def hold_zeros(self) -> int:
        """Set masked weights to zero that something has changed since the last step, such as an EMA, with a warning.

        Call it before a model is saved; every process must. Returns the number of weights that were not zero, on all
        processes together if tensors are sharded. Weights that share values get these again, too.
        """
        self._engine.prepare(self.model)
        found = self._zeroing.hold()
        self._sharing.hold()
        return found

    # ---- Files ----

    def save(self, directory: str | os.PathLike) -> None:
        """Write masks, configuration and state into the directory, which is created if needed.

        If tensors are sharded, every process must call it: each writes the masks of its shards, and returns when all
        have. Without sharding, the process that calls it writes everything. A warning says so if something has changed
        masked weights since the last step: a model that is saved beside these masks is not as sparse as they say. So
        does one where the units of a structure are masked, but were not cut out of the model (`shrink`).
        """
        if self.can_shrink:
            logger.warning(
                "%s: the masked units are still in the model, which has its full size. Call shrink(optimizer) and save "
                "the model again, and it is the smaller one.",
                directory,
            )
        self._save(directory)

    def _save(self, directory: str | os.PathLike) -> None:
        goes_on = self.total_steps is not None and self.completed_steps < self.total_steps
        self._filing.save(directory, self.configs, self._state, self.chosen, bool(self._remembering()), goes_on)

    def save_from_all(self, directory: str | os.PathLike, should_save: bool) -> None:
        """Save when all processes call this: every process if tensors are sharded, else those with `should_save`."""
        if self.sharded or should_save:
            self._save(directory)

    def load(self, directory: str | os.PathLike) -> None:
        """Load masks and state from a directory that `save` wrote, and set masked weights to zero.

        Raises PruningStateError, naming the file and the difference, if a file is missing, broken or of another format
        version, or was saved for another model or configuration, or if pruning has not ended and no step is left for
        it. Nothing is changed then.
        """
        if self._search.waits and self._search.take(as_path(directory)):
            self._prune_as_chosen(self.model)
        self._load(directory, zeros_loaded=False)

    def _load(self, directory: str | os.PathLike, zeros_loaded: bool) -> None:
        self._state = self._filing.load(
            directory, self.configs, self._windows, self.total_steps, zeros_loaded, self.model
        )
        self.mask_weights()
        self._watch.sample(self.masks, self.parameters)
        self._masks.compare(self.parameters)
        self.stop_collecting()
        if self.total_steps is not None:
            self._begin_step()
