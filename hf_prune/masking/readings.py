"""`Readings`: what methods and scopes read in optimizer steps and remember between them, and in which steps."""

from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from ..config.pruning import PruningConfig
from ..engines.engine import Engine
from ..errors import PruningConfigError, PruningStateError
from ..methods.scopes import SCOPES
from ..methods.table import method_of
from .collectors import Collected, Statistics
from .groups import Group
from .local import LocalTensor
from .masks import Masks
from .memory import Memory

# What `Statistics` collects, see its `begin`.
_KINDS = ("inputs", "outputs", "gradients", "products", "similarity")


class Readings:
    """What the groups of a model read and remember. If tensors are sharded, every process must make the same calls.

    Args:
        model: the model that is trained.
        groups: all groups, including those that read nothing.
        parameters: parameter name -> parameter.
        masks: the masks of the parameters.
        engine: how the parameters are held and trained.

    Attributes:
        memory: what is remembered.
        collected: what was read in the step before an update.
        whole_gradients: the names of parameters whose gradients are read in the current step before those of masked
            weights are set to zero.

    Raises:
        PruningConfigError: a method needs to read, or to change, what this way of training does not give access to.
        TargetError: a method reads inputs, and a parameter is not the weight of a linear layer.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        parameters: Mapping[str, nn.Parameter],
        masks: Masks,
        engine: Engine,
    ):
        self._groups, self._masks = groups, masks
        self.memory = Memory()
        self.collected = Collected()
        self.whole_gradients: set[str] = set()
        self._remembering: Sequence[int] = ()
        self._seen: set[str] = set()  # names of parameters whose gradients were seen for remembering
        self._added = False  # whether the current step is remembered
        self._allotted: Container[int] = ()
        self._by_methods: dict[str, set[str]] = {kind: set() for kind in _KINDS}  # what updates read, of all groups
        to_allot: set[str] = set()
        for index, group in enumerate(groups):
            _check(group, parameters, masks, engine)
            for reads in self._collects(index, is_due=False):
                self._by_methods[reads].update(group.read_names)
            to_allot.update(group.read_names if group.reads_to_allot else ())
        self._statistics = Statistics(
            model,
            readers=dict.fromkeys(to_allot, "scope")
            | dict.fromkeys(self._by_methods["products"], "reconstruction or method")
            | dict.fromkeys(self._by_methods["inputs"] | self._by_methods["outputs"], "method"),
            similarity=self._by_methods["similarity"],
        )

    def _reads(self, index: int) -> set[str]:
        """What is read for the next update of a group."""
        group = self._groups[index]
        return group.reads if index in self._allotted else group.reads | group.reads_to_allot

    def _collects(self, index: int, is_due: bool) -> set[str]:
        """What is collected in a step for a group, which is due after it or only remembers it."""
        group = self._groups[index]
        straight_into_memory = {"gradients"} if group.remembers or group.coupled else set()
        return (self._reads(index) if is_due else group.reads) - straight_into_memory

    def begin_step(self, due: Collection[int], remembering: Sequence[int], allotted: Container[int]) -> None:
        """Prepare an optimizer step.

        Args:
            due: the groups that are due after it.
            remembering: the groups that remember it.
            allotted: the groups of which it is decided already how many units each member loses.
        """
        self.collected = Collected()
        self._remembering, self._added, self._allotted = remembering, False, allotted
        if not remembering:
            self.memory.tensors.clear()  # pruning has ended
        self.whole_gradients = {
            target.name
            for group in map(self._groups.__getitem__, self._remembering)
            for target in (group.members if group.regrows and "gradients" in group.reads else ())
        }
        now: dict[str, set[str]] = {kind: set() for kind in _KINDS}
        for index in {*due, *remembering}:
            for reads in self._collects(index, index in due):
                now[reads].update(self._groups[index].read_names)
        if any(now.values()):
            everything = {kind: names | self._by_methods[kind] for kind, names in now.items()}
            self._statistics.begin(**everything | {"products": now["products"]})

    def stop(self) -> None:
        """Stop collecting, when training is over."""
        self._statistics.stop()

    @property
    def wants_gradients(self) -> bool:
        """Whether the gradients of the current step are needed."""
        return (self._statistics.is_collecting and bool(self._statistics.gradient_names)) or any(
            "gradients" in self._groups[index].reads for index in self._remembering
        )

    def see_gradients(self, gradients: Mapping[str, torch.Tensor], loss_scale: float) -> None:
        """Remember the gradients of a whole batch, once in an optimizer step, before any is masked.

        They are of this process's shards, times `loss_scale`. A step that an fp16 scaler will skip, because they are
        not finite, is not remembered.
        """
        reading = [index for index in self._remembering if "gradients" in self._groups[index].reads]
        if not reading or self._added:
            return
        self._added = True
        names = [target.name for index in reading for target in self._groups[index].members if target.name in gradients]
        self._seen.update(names)
        if loss_scale != 1.0:
            bad = sum(int(not gradients[name].isfinite().all()) for name in names)
            if int(self._masks.all_reduce(torch.tensor([bad], dtype=torch.int64))):
                return
        for index in reading:
            for target in self._groups[index].members:
                if target.name in gradients:
                    gradient = gradients[target.name].detach().float().reshape(-1) / loss_scale
                    self._remember(index, target.name, gradient=gradient)

    def keep_gradient(self, name: str, gradient: torch.Tensor) -> None:
        """Keep the masked gradient of a whole batch, if a mask update needs it."""
        self._statistics.keep_gradient(name, gradient)

    def end_step(self, due: Iterable[int]) -> None:
        """Finish an optimizer step: take what was collected for the due groups, and remember all but gradients.

        Raises PruningStateError if nothing was collected for any parameter.
        """
        reading = any(self._collects(index, True) and not self._groups[index].remembers for index in due)
        if reading or self._statistics.is_collecting:
            self.collected = self._statistics.finish()
        for index in self._remembering:
            group = self._groups[index]
            for target in group.members if "gradients" not in group.reads else ():
                if "inputs" not in group.reads or target.name not in self.collected.unusable:
                    self._remember(index, target.name, inputs=self.collected.inputs.get(target.name))
        self._remembering = ()

    def missing(self, index: int) -> set[str]:
        """The names of a group's parameters for which something that an update needs was not collected yet.

        Raises PruningStateError if no gradient of any of them was seen.
        """
        group = self._groups[index]
        names = group.read_names
        missing = {name for name in names if self._reads(index) and name in self.collected.unusable}
        if not group.reads:  # an expert that no token reached gets the share of all
            missing -= self.collected.unreached
        if group.remembers:
            missing |= {name for name in names if self._memory_of(group, name) is None}
            if "gradients" in group.reads and missing == set(names) and self._seen.isdisjoint(names):
                raise PruningStateError(
                    names[0],
                    "expected its gradient in the optimizer steps before a mask update, saw none; it is frozen, or the "
                    "optimizer steps inside backward: use a method that reads only the weights, such as 'magnitude'",
                )
        return missing

    def local(self, index: int, name: str) -> LocalTensor:
        """A tensor of a group, with all that ranking it needs."""
        group = self._groups[index]
        return replace(
            self._with_masked_values(group, name),
            inputs=self.collected.inputs.get(name),
            moments=self.collected.moments.get(name),
            gradient=self.collected.gradients.get(name),
            memory=self._memory_of(group, name) or {},
        )

    def similarity_scores(self, group: Group) -> dict[str, torch.Tensor]:
        """How much each layer of a group changes what it gets, by the name of its units; empty if that was not read."""
        if "similarity" not in group.reads:
            return {}
        similarity = self.collected.similarity
        return {one.name: torch.tensor([1 - similarity[one.path]], dtype=torch.float64) for one in group.coupled}

    def keep_masked_values(self, index: int, tensor: LocalTensor) -> None:
        """After an update of a tensor, remember the values of masked weights, if they may come back."""
        group = self._groups[index]
        if group.regrows:
            values = tensor.weight.masked_fill(tensor.mask, 0)
            self.memory.keep_masked_values(group.config.method, tensor.target.name, values)

    def _memory_of(self, group: Group, name: str) -> dict[str, torch.Tensor] | None:
        names = group.criterion.memory if group.criterion is not None else ()
        return self.memory.of(group.config.method, names, name)

    def _with_masked_values(self, group: Group, name: str) -> LocalTensor:
        """A tensor in which masked weights that may come back have the values that they had."""
        tensor = self._masks.local(name)
        values = self.memory.masked_values(group.config.method, name)
        if values is None:
            return tensor
        values = values.to(tensor.weight.device)
        weight = torch.where(tensor.mask, tensor.weight, values.to(tensor.weight.dtype))
        return replace(tensor, weight=weight, regrowable=tensor.mask | (values != 0))

    def _remember(
        self, index: int, name: str, inputs: torch.Tensor | None = None, gradient: torch.Tensor | None = None
    ) -> None:
        group = self._groups[index]
        assert group.criterion is not None
        tensor = replace(self._with_masked_values(group, name), inputs=inputs, gradient=gradient)
        self.memory.add_step(group.config.method, group.criterion, tensor, group.config.pruning_seed)


def _check(group: Group, parameters: Mapping[str, nn.Parameter], masks: Masks, engine: Engine) -> None:
    """Raise PruningConfigError if a group's method cannot be used with these parameters."""
    method, names = group.config.method, group.read_names
    check_reads(group.config, shows_gradients=not engine.steps_in_backward)
    frozen = [name for name in names if "gradients" in group.reads and not parameters[name].requires_grad]
    if frozen:
        raise PruningConfigError(
            "method",
            f"methods that read gradients cannot be used for weights that are not trained, got {method!r} for "
            f"{frozen[0]}; exclude it, or use 'magnitude' or 'wanda'",
        )
    if group.coupled and group.config.reconstruction is not None:
        _check_reconstruction(group, masks, engine)
    solves = group.criterion is None and group.config.structure is None
    if (solves or group.regrows) and not _writes_between_steps(engine):
        raise PruningConfigError(
            "method",
            f"methods that write weights cannot be used with DeepSpeed or adapters='sparse_merge', got {method!r}; "
            "use 'magnitude'",
        )
    if solves and masks.sharded:
        raise PruningConfigError(
            "method",
            f"solvers need whole tensors and cannot be used where weights are sharded, got {method!r}; use DDP, or "
            "'magnitude'",
        )


def check_reads(config: PruningConfig, shows_gradients: bool = True, shows_inputs: bool = True) -> None:
    """Raise PruningConfigError for a method or scope that reads what a way of training does not give access to."""
    compiled = "" if shows_inputs else "torch_compile"
    hidden_by = {"gradients": "" if shows_gradients else "DeepSpeed"}
    hidden_by |= dict.fromkeys(("inputs", "outputs", "products", "similarity"), compiled)
    for field, name, entry, use in (
        ("method", config.method, method_of(config.method, config.structure), "'magnitude'"),
        ("scope", config.scope, SCOPES[config.scope], "'layer'"),
    ):
        if entry is not None and (way := hidden_by.get(entry.reads or "")):
            read = "inputs" if entry.reads in ("products", "outputs") else entry.reads
            raise PruningConfigError(
                field, f"{field}s that read {read} cannot be used with {way}, got {name!r}; use {use}"
            )
    if config.reconstruction is not None and compiled:
        raise PruningConfigError(
            "reconstruction",
            f"reads inputs and cannot be used with {compiled}, got {config.reconstruction!r}; use none",
        )


def _check_reconstruction(group: Group, masks: Masks, engine: Engine) -> None:
    """Raise PruningConfigError where the layers that read removed units cannot be solved anew."""
    if not _writes_between_steps(engine) or masks.sharded:
        way = "where weights are sharded; use DDP" if _writes_between_steps(engine) else "with DeepSpeed"
        raise PruningConfigError(
            "reconstruction", f"cannot be used {way}, or set none; got {group.config.reconstruction!r}"
        )


def _writes_between_steps(engine: Engine) -> bool:
    """Whether methods may write weights: they read the parameters, and DeepSpeed trains other weights."""
    return engine.writes_weights and not engine.steps_in_backward
