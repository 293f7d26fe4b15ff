"""`PruningConfig`: what to prune, how much and when."""

import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from ..errors import PruningConfigError, nearest, shown
from ..methods.patterns import BLOCK_NORMS, PATTERN_FORMS, Pattern, parse_pattern
from ..methods.penalties import PENALTIES
from ..methods.reconstructions import RECONSTRUCTIONS
from ..methods.schedules import SCHEDULES, resolve_step
from ..methods.scopes import SCOPES
from ..methods.solvers import SOLVERS
from ..methods.table import ENTRY_POINTS, find_in_packages, method_names, needs_a_step
from ..quantise.forms import GRANULARITIES, VALUES, SharedValues, parse_values, shared_values_of
from .checks import (
    Problem,
    as_path,
    expected_one_of,
    is_number,
    is_one_of,
    numbers_as_floats,
    problems_of_fields,
    why_no_expression,
)
from .safe_json import parse_json, read_json
from .shared_values import problems_of_sharing

CONFIG_NAME = "pruning_config.json"

FORMAT_VERSION = 1

# What can be removed as a whole.
STRUCTURES = ("neurons", "heads", "layers", "experts", "hidden")

# Those of which each layer may have another number.
_COUNTED_BY_LAYER = ("neurons", "heads")

# Those whose units are read by linear layers, which can be solved anew without the removed ones.
_RECONSTRUCTED = ("neurons", "heads")

# Those that give tensors or rows counts of their own, which an n:m pattern leaves no room for.
_DIVIDING_SCOPES = ("global", "row", "erk", "sensitivity", "owl")

# What a model is to reach; what is removed is then found.
TARGETS = ("target_speedup", "target_parameters", "target_latency")

_LOWEST_TARGETS = {"target_speedup": 1, "target_parameters": 0, "target_latency": 0}

_MOST_SECONDS = 2  # of the processor, for making matchers of all expressions

# What is pruned of a model with adapters of PEFT.
ADAPTER_WAYS = ("sparse_base", "sparse_merge", "sparse_adapters")


@dataclass(frozen=True)
class PruningConfig:
    """What to prune, how much and when. Frozen, and validated when it is created.

    A `target_*` field says how fast or small the model is to be instead: which neurons, heads and layers are removed is
    then found by measuring the model.

    Times (`begin`, `end`, `frequency`) are optimizer steps: a value of 1 or more is a number of steps and must be
    whole, a value below 1 is a share of training.

    Args:
        method: `magnitude`, `random`, `wanda` (magnitude times the norm of the input), `taylor` (weight times
            gradient), `movement` (how far training moves a weight away from zero; masked weights may come back until
            pruning ends), `sparsegpt` or `alps` (which also change the weights that stay, so that the outputs of their
            layer change least), or `keep`, which keeps the zeros that a model has and prunes no more. Default `auto`:
            magnitude, as with enough training to recover other criteria are seldom better (arXiv 2210.06384); with a
            target taylor, as magnitudes of different layers say little about which one can go.
        structure: `neurons` (of feed-forward networks), `heads` (of attention), `layers`, `experts` or dimensions of
            the `hidden` states are removed as a whole: masked in training, in all tensors that they are part of, and
            cut out of the model that is saved at the end. Default None: single weights, or the pattern's units. Methods
            for structures are `magnitude`, `random`, `activation` (norm of the outputs), `wanda` (activation times the
            norm of the weights that read it), `taylor` (first-order change of the loss, added up over steps) and, for
            layers alone, `block_influence` (how much a layer changes what it gets).
        sparsity: the final share of masked weights, 0 <= s < 1. Not needed for `keep` and for an n:m pattern, which
            determine it. There is no default: no sparsity suits every model.
        initial_sparsity: the sparsity at which the schedule starts. Default None: that of the model (0 if it is dense).
        schedule: `one_shot`, `linear`, `cubic`, `exponential` or `cosine`. Default cubic: most is pruned early, while
            weights are redundant and there is time to recover (Zhu and Gupta, arXiv 1710.01878).
        begin: when masks are first updated. Default 0.1: a short dense warm-up lets a new task head and the learning
            rate settle before magnitudes are trusted.
        end: when the final sparsity is reached; None is the last step. Default 0.5: the model recovers with constant
            masks in the second half of training; the GMP* recipe (arXiv 2210.06384), too, ends with a long phase of
            recovery, and 0.7 was about one point worse (benchmarks/README.md).
        frequency: the interval between mask updates. Default 0.01: 41 updates with the defaults above, so that no
            single one prunes much, at a cost that does not grow with the length of training.
        scope: `layer` (every tensor at the same sparsity), `global` (one ranking of all weights), `erk`
            (Erdős–Rényi-kernel), `sensitivity` (tensors that the loss depends on stay denser), `owl` (layers with more
            outliers stay denser), or `row` (every output of every tensor at the same sparsity; for `hf_prune.prune`,
            and in training for the methods that solve a tensor). In training, what `sensitivity` and `owl` see in the
            optimizer step before the first mask update decides how much each tensor loses in the end.
            Default layer: it cannot empty a tensor, and needs no comparison across tensors.
            Of neurons and heads, `layer` removes as many from each layer; `global` ranks those of all layers together,
            and each keeps at least one: the smaller model opens after `import hf_prune`. With a target, `global` finds
            numbers for each layer.
        pattern: `unstructured`, `n:m` such as `2:4` (n of every m along the input dimension are kept), or
            `block:RxC` such as `block:4x1` (R outputs by C inputs).
        block_norm: the norm that combines the scores of a block, `l1` or `l2`. Default l2: pruning a block changes the
            layer's output by about its l2 norm.
        targets: regular expressions that must match whole parameter names. Default None: the linear layers,
            convolutions and experts in the model's repeated stack of layers. With layers, those of which none matches
            a tensor stay.
        exclude: regular expressions for parameters that are not pruned.
        overrides: regular expression -> final sparsity of the tensors that it matches, each ranked by itself; the first
            match wins. With neurons or heads, of the units of the layers of which it matches a tensor. A string is read
            as a JSON object.
        penalty: a penalty on the weights to prune, added to the loss from `begin` to `end`: `l1` (absolute values),
            `l2` (half the squares) or `group_lasso` (the norms of the pattern's units). Default None.
        penalty_weight: the factor of the penalty; it grows with the schedule, from zero at `begin`, and is zero again
            from `end` on, when nothing more is pruned. There is no default: it depends on the size of the loss.
        pruning_seed: the seed of the method `random`. Default 0.
        adapters: what is pruned in a model with PEFT adapters. `sparse_base`: the frozen base weights; the adapters
            stay separate. `sparse_merge`: the sums of base weights and adapters, so that merging keeps every zero.
            `sparse_adapters`: the adapters' own matrices. Default None: `sparse_base` if the model has adapters, as
            PEFT alone then gives the same outputs.
        reconstruction: `least_squares`: at each mask update of neurons or heads, the layers that read the removed ones
            are solved anew on the tokens of the step before it, so that their outputs change least. For single weights
            it is what `hf_prune.prune` can do after any method, from calibration data. Default None: it needs memory
            and time that a model with enough training may not need.
        round_to: of neurons and heads, as many leave each layer that the number of those that stay is a multiple of it:
            8 for tensor cores, or 4 for the pattern 2:4 afterwards; `sparsity` is then reached to the nearest multiple.
            The name is that of Torch-Pruning. Default None: `sparsity` is exact.
        shared_values: how many values other than zero the weights of a tensor may have once the last masks are made, 2
            to 256: the weights that are kept are clustered, and trained on as values that they share
            (docs/shared_values.md). `int8` and `int4`: the values are -127 to 127, or -7 to 7, times a scale for each
            row. Default None: each keeps a value of its own.
        initial_shared_values: how many values weights share at first, up to 256: the number is halved at equal
            intervals, and is `shared_values` once half of the training that is left is over. Default None:
            `shared_values` from the start.
        shared_values_granularity: which weights have values, or a scale, of their own: all of a `tensor`, each `row`
            (the weights of one output), `rows:R` (R neighbouring rows) or `group:G` (G neighbouring weights of a row).
            Default None: `tensor`, and `row` for int8 and int4, as most runtimes have it.
        target_speedup: how many times faster than the dense model a forward pass is to be, above 1.
        target_parameters: how many parameters are to be left, or which share of them (below 1).
        target_latency: how many milliseconds a forward pass is to take.
        target_batch_size: the batch size that is timed for a target. Default None: 1, as in a service that answers one
            request at a time; larger batches gain more.
        target_length: the length in tokens that is timed for a target. Default None: the median of the data's.

    Raises:
        PruningConfigError: if a value is invalid; it lists all problems.
    """

    method: str = field(
        default="auto",
        metadata={"help": f"One of {', '.join(method_names())}; auto: magnitude, or taylor with a target."},
    )
    sparsity: float | None = field(default=None, metadata={"help": "Final share of masked weights, 0 <= s < 1."})
    initial_sparsity: float | None = field(default=None, metadata={"help": "Sparsity at which the schedule starts."})
    schedule: str = field(default="cubic", metadata={"help": f"One of {', '.join(SCHEDULES)}."})
    begin: float = field(default=0.1, metadata={"help": "First mask update: steps, or a share of training below 1."})
    end: float | None = field(default=0.5, metadata={"help": "Last mask update: steps, or a share below 1."})
    frequency: float = field(default=0.01, metadata={"help": "Interval of updates: steps, or a share below 1."})
    scope: str = field(default="layer", metadata={"help": f"One of {', '.join(SCOPES)}."})
    pattern: str = field(default="unstructured", metadata={"help": "unstructured, n:m such as 2:4, or block:RxC."})
    block_norm: str = field(default="l2", metadata={"help": "Norm of a block's scores: l1 or l2."})
    targets: list[str] | None = field(default=None, metadata={"help": "Regular expressions of what to prune."})
    exclude: list[str] = field(default_factory=list, metadata={"help": "Regular expressions of what not to prune."})
    overrides: dict | str | None = field(default=None, metadata={"help": "JSON object: expression -> final sparsity."})
    penalty: str | None = field(default=None, metadata={"help": f"One of {', '.join(PENALTIES)}."})
    penalty_weight: float | None = field(default=None, metadata={"help": "Factor of the penalty."})
    pruning_seed: int = field(default=0, metadata={"help": "Seed of the method random."})
    adapters: str | None = field(default=None, metadata={"help": f"With PEFT: one of {', '.join(ADAPTER_WAYS)}."})
    structure: str | None = field(default=None, metadata={"help": f"None, or one of {', '.join(STRUCTURES)}."})
    reconstruction: str | None = field(default=None, metadata={"help": f"One of {', '.join(RECONSTRUCTIONS)}."})
    round_to: int | None = field(default=None, metadata={"help": "Units left in a layer: a multiple of it."})
    shared_values: int | str | None = field(default=None, metadata={"help": f"Values of a tensor: {VALUES}."})
    initial_shared_values: int | None = field(default=None, metadata={"help": "Values that are shared at first."})
    shared_values_granularity: str | None = field(
        default=None, metadata={"help": f"What shares values: {GRANULARITIES}."}
    )
    target_speedup: float | None = field(default=None, metadata={"help": "Times the speed of the dense model."})
    target_parameters: float | None = field(default=None, metadata={"help": "Parameters to be left, or their share."})
    target_latency: float | None = field(default=None, metadata={"help": "Milliseconds of a forward pass."})
    target_batch_size: int | None = field(default=None, metadata={"help": "Batch size that is timed for a target."})
    target_length: int | None = field(default=None, metadata={"help": "Length in tokens that is timed for a target."})

    def __post_init__(self) -> None:
        numbers_as_floats(self, "sparsity", "initial_sparsity", "begin", "end", "frequency", "penalty_weight", *TARGETS)
        if (values := parse_values(self.shared_values)) is not None:
            object.__setattr__(self, "shared_values", values)
        if self.method == "auto":
            object.__setattr__(self, "method", "taylor" if self._given_targets else "magnitude")
        problems = [
            *self._parse_overrides(),
            *self._check_choices(),
            *self._check_target(),
            *self._check_sparsities(),
            *self._check_times(),
            *self._check_penalty(),
            *self._check_reconstruction(),
            *self._check_round_to(),
            *problems_of_sharing(
                self.shared_values,
                self.initial_shared_values,
                self.shared_values_granularity,
                self.structure,
                bool(self._given_targets),
                self.adapters,
            ),
            *self._check_expressions(),
        ]
        if problems:
            raise PruningConfigError(problems=problems)
        if self.parsed_pattern.name == "n:m" and self.method != "keep":
            object.__setattr__(self, "sparsity", float(self.parsed_pattern.unit_sparsity))

    def _parse_overrides(self) -> list[Problem]:
        """Turn overrides into a dict of plain values, from JSON where they are text."""
        overrides: Any = self.overrides
        if overrides is None:
            return []
        if isinstance(overrides, str):
            try:
                overrides = parse_json(overrides)
            except ValueError as error:
                problem = f"expected a JSON object of expression -> sparsity, got {overrides!r} ({error})"
                return [("overrides", problem)]
        if overrides is not None and not isinstance(overrides, Mapping):
            return [("overrides", f"expected a mapping of expression -> sparsity, got {overrides!r}")]
        plain = {key: float(value) if is_number(value) else value for key, value in (overrides or {}).items()}
        object.__setattr__(self, "overrides", plain if overrides is not None else None)
        return [
            ("overrides", f"expected 0 <= s < 1 for {key!r}, got {value!r}")
            for key, value in plain.items()
            if not _is_sparsity(value)
        ]

    def _pattern_or_none(self) -> Pattern | None:
        try:
            return parse_pattern(self.pattern)
        except (ValueError, TypeError):
            return None

    def _check_choices(self) -> Iterator[Problem]:
        if self.structure is not None and not is_one_of(self.structure, STRUCTURES):
            hint = "; unused tokens are removed by hf_prune.shrink_vocabulary, or `vocabulary: data` in a recipe"
            hint = hint if self.structure == "vocabulary" else ""
            yield "structure", expected_one_of(self.structure, STRUCTURES, or_none=True) + hint
        broken = {name: find_in_packages(getattr(self, name)) for name in ("method", "schedule", "scope")}
        of_units = self.has_target or is_one_of(self.structure, STRUCTURES)
        methods = method_names(self.structure if is_one_of(self.structure, STRUCTURES) else None)
        if self.has_target:  # those of every structure
            methods = tuple(name for name in method_names("neurons") if name in method_names("layers"))
        if not is_one_of(self.method, methods):
            hint = f"; a package can declare methods in the entry-point group {ENTRY_POINTS}: is it installed?"
            if of_units:
                hint = "" if self.has_target else f" with the structure {self.structure!r}"
            elif nearest(self.method, methods):
                hint = ""
            hint = "; hf_prune.shrink cuts out units that are zero already" if self.method == "keep" else hint
            yield "method", broken["method"] or expected_one_of(self.method, methods) + hint
        for name, allowed in (
            ("schedule", SCHEDULES),
            ("scope", SCOPES),
            ("block_norm", BLOCK_NORMS),
        ):
            value = getattr(self, name)
            if not is_one_of(value, allowed):
                yield name, broken.get(name) or expected_one_of(value, allowed)
        if self.adapters is not None and not is_one_of(self.adapters, ADAPTER_WAYS):
            yield "adapters", expected_one_of(self.adapters, ADAPTER_WAYS, or_none=True)
        pattern = self._pattern_or_none()
        if pattern is None:
            yield "pattern", f"expected {PATTERN_FORMS}, got {self.pattern!r}"
        yield from self._check_structure()
        if is_one_of(self.method, SOLVERS) and is_one_of(self.scope, SCOPES) and SCOPES[self.scope].ranks_together:
            yield (
                "scope",
                f"must not rank tensors together with the method {self.method!r}, which solves one tensor at a time; "
                f"got {self.scope!r}, use 'layer'",
            )
        if pattern is not None and pattern.name == "n:m" and self.scope in _DIVIDING_SCOPES:
            yield (
                "scope",
                f"expected 'layer' with the pattern {self.pattern!r}, which fixes the sparsity of every tensor, got "
                f"{self.scope!r}",
            )

    def _check_structure(self) -> Iterator[Problem]:
        if not self.has_target and not is_one_of(self.structure, STRUCTURES):
            return
        beside = "a target" if self.has_target else f"the structure {self.structure!r}"
        of_layers = self.structure in _COUNTED_BY_LAYER
        for name, default in (("pattern", "unstructured"), ("overrides", None), ("penalty", None)):
            if getattr(self, name) != default and not (name == "overrides" and of_layers):
                yield name, f"expected {default!r} with {beside}, got {getattr(self, name)!r}"
        scopes = ("layer", "global") if of_layers or self.has_target else ("layer",)
        if is_one_of(self.scope, SCOPES) and self.scope not in scopes:
            allowed = " or ".join(map(repr, scopes))
            given = "a target" if self.has_target else f"the structure {self.structure!r}"
            yield "scope", f"expected {allowed} with {given}, got {self.scope!r}"
        if self.adapters is not None:
            yield "adapters", f"must not be set with {beside}, got {self.adapters!r}"

    @property
    def _given_targets(self) -> list[str]:
        """The names of the targets that are set, to whatever value."""
        return [name for name in TARGETS if getattr(self, name) is not None]

    @property
    def has_target(self) -> bool:
        """Whether the configuration says what the model is to reach, and not what is pruned."""
        return any(_is_target(getattr(self, name), name) for name in TARGETS)

    def for_structure(self, structure: str, sparsity: float, **others: Any) -> "PruningConfig":
        """The configuration that removes a share of a structure's units as this one, with a target, was asked to.

        `others` are further fields; the scope is `layer`, for it is known how many leave each.
        """
        without: dict[str, Any] = dict.fromkeys((*TARGETS, "target_batch_size", "target_length"))
        return dataclasses.replace(self, structure=structure, sparsity=sparsity, scope="layer", **{**without, **others})

    def _check_target(self) -> Iterator[Problem]:
        given = [name for name in self._given_targets if _is_target(getattr(self, name), name)]
        for name in self._given_targets:
            if name not in given:
                yield name, f"expected a number above {_LOWEST_TARGETS[name]}, got {getattr(self, name)!r}"
        parameters = self.target_parameters
        if is_number(parameters) and parameters >= 1 and parameters != int(parameters):
            yield (
                "target_parameters",
                f"expected a whole number of parameters, or a share of the model's below 1, got {parameters!r}",
            )
        for name in ("target_batch_size", "target_length"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                yield name, f"expected a whole number, 1 or more, got {value!r}"
            elif value is not None and not self._given_targets:
                yield name, f"must not be set without a target ({', '.join(TARGETS)}), got {value!r}"
        if not given:
            return
        if len(given) > 1:
            yield given[1], f"must not be set with {given[0]}: one target is reached at a time"
        for name in ("structure", "sparsity", "initial_sparsity", "targets", "exclude"):
            if getattr(self, name) not in (None, []):
                yield name, f"must not be set with {given[0]}, which finds what is removed, got {getattr(self, name)!r}"

    def _check_sparsities(self) -> Iterator[Problem]:
        for name in ("sparsity", "initial_sparsity"):
            value = getattr(self, name)
            if value is not None and not _is_sparsity(value):
                yield name, f"expected 0 <= s < 1, got {value!r}"
        pattern = self._pattern_or_none()
        final = self.sparsity
        if self.method == "keep":
            for name in ("sparsity", "initial_sparsity", "overrides"):
                if getattr(self, name) is not None:
                    reason = "with method 'keep', which keeps the zeros that the model has"
                    yield name, f"must not be set {reason}, got {getattr(self, name)!r}"
        elif pattern is not None and pattern.name == "n:m":
            fixed = float(pattern.unit_sparsity)
            if _is_sparsity(final) and final != fixed:
                yield "sparsity", f"expected {fixed} or None with the pattern {self.pattern!r}, got {final!r}"
            if self.overrides:
                yield "overrides", f"must not be set with the pattern {self.pattern!r}, got {self.overrides!r}"
            final = fixed
        elif final is None and not self._given_targets:
            yield "sparsity", "expected 0 <= s < 1, got None; or set a target, such as target_speedup"
        if _is_sparsity(final) and _is_sparsity(self.initial_sparsity) and self.initial_sparsity > final:
            yield "initial_sparsity", f"expected at most sparsity ({final}), got {self.initial_sparsity}"

    def _check_times(self) -> Iterator[Problem]:
        usable = True
        for name, lowest in (("begin", "0 <="), ("end", "0 <="), ("frequency", "0 <")):
            value = getattr(self, name)
            if value is None and name == "end":
                continue
            in_range = is_number(value) and (value > 0 or (value == 0 and name != "frequency"))
            if not in_range or (value >= 1 and value != int(value)):
                usable = False
                yield (
                    name,
                    f"expected a whole number of optimizer steps (1 or more) or a share of training ({lowest} x < 1), "
                    f"got {value!r}",
                )
        if not usable or self.end is None or self.schedule == "one_shot" or self.method == "keep":
            return
        if (self.begin >= 1) == (self.end >= 1) and self.begin > self.end:
            yield "end", f"expected at least begin ({_as_time(self.begin)}), got {_as_time(self.end)}"

    def _check_penalty(self) -> Iterator[Problem]:
        if self.penalty is None:
            if self.penalty_weight is not None:
                yield "penalty_weight", f"must not be set without a penalty, got {self.penalty_weight!r}"
            return
        broken = find_in_packages(self.penalty)
        if not is_one_of(self.penalty, PENALTIES):
            yield "penalty", broken or expected_one_of(self.penalty, PENALTIES, or_none=True)
        elif self.method == "keep" or self.schedule == "one_shot":
            yield "penalty", f"must not be set with method 'keep' or schedule 'one_shot', got {self.penalty!r}"
        if not is_number(self.penalty_weight) or self.penalty_weight <= 0:
            yield "penalty_weight", f"expected a number greater than 0 with a penalty, got {self.penalty_weight!r}"

    def _check_reconstruction(self) -> Iterator[Problem]:
        if self.reconstruction is None:
            return
        broken = find_in_packages(self.reconstruction)
        if not is_one_of(self.reconstruction, RECONSTRUCTIONS):
            yield "reconstruction", broken or expected_one_of(self.reconstruction, RECONSTRUCTIONS, or_none=True)
        elif self.structure is not None and not is_one_of(self.structure, _RECONSTRUCTED):
            yield (
                "reconstruction",
                f"must not be set with a structure other than {' or '.join(_RECONSTRUCTED)}, got "
                f"{self.reconstruction!r} with {self.structure!r}",
            )

    def _check_round_to(self) -> Iterator[Problem]:
        if self.round_to is None:
            return
        if type(self.round_to) is not int or self.round_to < 2:
            yield "round_to", f"expected a whole number, 2 or more, or None, got {self.round_to!r}"
        elif self.has_target:
            yield "round_to", f"must not be set with a target, which finds what is removed, got {self.round_to!r}"
        elif not is_one_of(self.structure, _COUNTED_BY_LAYER):
            yield "round_to", f"expected None without the structure neurons or heads, got {self.round_to!r}"

    @property
    def sharing(self) -> SharedValues | None:
        """Which values the weights that are kept share; None without `shared_values`."""
        if self.shared_values is None:
            return None
        return shared_values_of(self.shared_values, self.shared_values_granularity, self.initial_shared_values)

    def _check_expressions(self) -> Iterator[Problem]:
        expressions: list[tuple[str, Any]] = []
        for name in ("targets", "exclude"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                object.__setattr__(self, name, list(value))
                expressions += [(name, expression) for expression in value]
            elif value is not None or name == "exclude":
                yield name, f"expected a list of regular expressions, got {value!r}"
        if isinstance(self.overrides, dict):
            expressions += [("overrides", expression) for expression in self.overrides]
        began = time.process_time()
        for name, expression in expressions:
            why = why_no_expression(expression)
            if why is not None:
                yield name, f"expected a regular expression, got {shown(expression)} ({why})"
            if time.process_time() - began > _MOST_SECONDS:
                yield (
                    name,
                    f"expected regular expressions that are ready within {_MOST_SECONDS} seconds, got slower ones",
                )
                break
        if not isinstance(self.pruning_seed, int) or isinstance(self.pruning_seed, bool):
            yield "pruning_seed", f"expected a whole number, got {self.pruning_seed!r}"

    @property
    def parsed_pattern(self) -> Pattern:
        """The pattern as an object."""
        return parse_pattern(self.pattern)

    def window(self, total_steps: int) -> tuple[int, int, int]:
        """`begin`, `end` and `frequency` in optimizer steps for a training of `total_steps`.

        Raises PruningConfigError if the window does not lie within training.
        """
        begin = resolve_step(self.begin, total_steps)
        reads_a_step = needs_a_step(self.method, self.scope, self.structure, self.reconstruction)
        if reads_a_step and self.begin > 0:
            begin = max(begin, 1)  # a share of few steps, and there must be a step to read
        at_once = self.schedule == "one_shot" or self.method == "keep"
        end = begin if at_once else resolve_step(self.end, total_steps)
        frequency = max(resolve_step(self.frequency, total_steps), 1)
        problems = [
            (name, f"expected at most the last step of training ({total_steps}), got {_as_time(value)}")
            for name, value, step in (("begin", self.begin, begin), ("end", self.end, end))
            if step > total_steps and not (name == "end" and at_once)
        ]
        if reads_a_step and begin == 0:
            reader = self.reconstruction
            if needs_a_step(self.method, self.scope, self.structure):
                reader = self.method if needs_a_step(self.method, "layer", self.structure) else self.scope
            problems.append(
                ("begin", f"expected 1 or more for {reader!r}, which needs the data of one step first, got step 0")
            )
        if begin > end and not problems:
            problems.append(("end", f"expected at least begin (step {begin} of {total_steps}), got step {end}"))
        if problems:
            raise PruningConfigError(problems=problems)
        return begin, end, frequency

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values that JSON and YAML can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PruningConfig":
        """Make a configuration from a mapping of fields. Raises PruningConfigError for what is none."""
        problems = problems_of_fields(values, cls)
        if problems:
            raise PruningConfigError(problems=problems)
        return cls(**values)

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write `pruning_config.json` into a directory, which is created if needed."""
        save_configs([self], directory)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike) -> "PruningConfig":
        """Read the configuration in a directory's `pruning_config.json`; for several, use `load_configs`."""
        configs = load_configs(directory)
        if len(configs) != 1:
            raise PruningConfigError(
                f"{Path(directory, CONFIG_NAME)}: expected one configuration, got {len(configs)}; use load_configs"
            )
        return configs[0]


class SavedConfig(PruningConfig):
    """A configuration that is only read: its method may be one of a package that is not installed here."""

    def _check_choices(self) -> Iterator[Problem]:
        is_name = isinstance(self.method, str)
        return (problem for problem in super()._check_choices() if problem[0] != "method" or not is_name)


def save_configs(configs: Sequence[PruningConfig], directory: str | os.PathLike, frozen: Sequence[str] = ()) -> None:
    """Write configurations into `pruning_config.json` in a directory, which is created if needed.

    `frozen` are the names of weights that the default targets left out because they were not trained.
    """
    path = as_path(directory) / CONFIG_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"format_version": FORMAT_VERSION, "configs": [config.to_dict() for config in configs]}
    if frozen:
        content["frozen"] = list(frozen)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_configs(directory: str | os.PathLike) -> list[PruningConfig]:
    """Read all configurations in a directory's `pruning_config.json`.

    Raises FileNotFoundError if there is none, and PruningConfigError, naming the file, if it cannot be used.
    """
    return _load(directory, PruningConfig)


def load_saved_configs(directory: str | os.PathLike) -> list[PruningConfig]:
    """Read configurations as `load_configs` does, whether their methods are known here or not."""
    return _load(directory, SavedConfig)


def _load(directory: str | os.PathLike, kind: type[PruningConfig]) -> list[PruningConfig]:
    path = as_path(directory) / CONFIG_NAME
    content = _read(path)
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise PruningConfigError(
            f"{path}: expected format_version {FORMAT_VERSION}, got {version!r}; a newer hf-prune may read it"
        )
    sections = content.get("configs")
    if not isinstance(sections, list) or not all(isinstance(values, dict) for values in sections):
        raise PruningConfigError(f"{path}: expected a list of mappings under configs, got {sections!r}")
    try:
        return [kind.from_dict(values) for values in sections]
    except PruningConfigError as error:
        raise PruningConfigError(problems=error.problems, at=str(path)) from error


def written_expressions(directory: str | os.PathLike) -> list[str]:
    """The regular expressions in a directory's `pruning_config.json`, unchecked. Raises as `load_configs` does."""
    sections = _read(Path(directory, CONFIG_NAME)).get("configs")
    fields = [
        section.get(name)
        for section in (sections if isinstance(sections, list) else [])
        if isinstance(section, dict)
        for name in ("targets", "exclude", "overrides")
    ]
    return [text for field in fields if isinstance(field, (list, dict)) for text in field if isinstance(text, str)]


def load_frozen(directory: str | os.PathLike) -> list[str]:
    """The names of frozen weights that `save_configs` wrote. Raises as `load_configs` does."""
    path = Path(directory, CONFIG_NAME)
    names = _read(path).get("frozen", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise PruningConfigError(f"{path}: expected a list of names under frozen, got {names!r}")
    return names


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except ValueError as error:
        raise PruningConfigError(f"{path}: expected JSON, got a file that does not parse ({error})") from error
    return content if isinstance(content, dict) else {}


def _as_time(value: float | None) -> str:
    return str(int(value)) if value is not None and value >= 1 else str(value)


def _is_target(value: Any, name: str) -> TypeGuard[float]:
    return is_number(value) and value > _LOWEST_TARGETS[name]


def _is_sparsity(value: Any) -> TypeGuard[float]:
    return is_number(value) and 0 <= value < 1
