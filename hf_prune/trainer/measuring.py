"""`MeasuringMixin`: records what evaluations of a Trainer return, with a digest of the weights that were evaluated.

evaluation_loop        records an evaluation: the weights, the data, and the metrics that are computed in the loop
evaluate, predict      where a class overrides them: what they return takes the place of the metrics of the loop
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from transformers import Trainer

from ..engines.choose import is_shared_model, weights_digest
from ..model.anatomy import has_adapters
from ..publish.logs import MeasuredEvaluation
from .base import TrainerBase

# The methods whose results count, with the prefix of their metrics.
_PREFIXES = {"evaluate": "eval", "predict": "test"}


class MeasuringMixin(TrainerBase):
    """Records each evaluation of a Trainer with a pruner, for its card."""

    def __init__(self, *args: Any, **kwargs: Any):
        self._evaluated: list[MeasuredEvaluation] = []
        super().__init__(*args, **kwargs)

    def __init_subclass__(cls, **kwargs: Any):
        """Record what `evaluate` and `predict` of this class return, if they are not the Trainer's own."""
        super().__init_subclass__(**kwargs)
        for name, prefix in _PREFIXES.items():
            method = getattr(cls, name, None)
            if method is not None and method is not getattr(Trainer, name) and not hasattr(method, "is_recorded"):
                setattr(cls, name, _recorded(method, prefix))

    @property
    def _makes_card(self) -> bool:
        """Whether this class makes card and push: with pruning, and not for adapters, whose zeros are elsewhere."""
        return self.pruner is not None and not has_adapters(self.accelerator.unwrap_model(self.model))

    def _digest(self) -> str:
        """The digest of the model's current weights, on the first process; every process must call it."""
        model = self.accelerator.unwrap_model(self.model)
        if not self.is_world_process_zero() and not is_shared_model(model):
            return ""
        return weights_digest(model)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as the extended class does, and record the metrics with a digest of the weights, for the card."""
        output = super().evaluation_loop(*args, **kwargs)
        if self._makes_card:
            bound = inspect.signature(super().evaluation_loop).bind(*args, **kwargs).arguments
            of_its_own = getattr(self, "evaluator", None) is not None  # sentence-transformers: it has data of its own
            self._evaluated.append(
                MeasuredEvaluation(
                    digest=self._digest(),
                    prefix=bound.get("metric_key_prefix", "eval"),
                    values=dict(output.metrics or {}),
                    samples=None if of_its_own else output.num_samples,
                    dataset=None if of_its_own else getattr(bound["dataloader"], "dataset", None),
                )
            )
        return output

    def _record_returned(self, prefix: str, returned: Any, begun: int) -> None:
        """Record what an `evaluate` or `predict` returned, which began when `begun` evaluations were recorded.

        It may have computed metrics after the loop, or without one. The metrics of several loops, such as those of
        several data sets, are left as they are.
        """
        made = self._evaluated[begun:]
        digest = "" if made else self._digest()
        metrics = returned if isinstance(returned, Mapping) else getattr(returned, "metrics", None)
        if not isinstance(metrics, Mapping):
            return
        named = any(str(name).startswith(f"{prefix}_") for name in metrics)
        values = {str(name) if named else f"{prefix}_{name}": value for name, value in metrics.items()}
        places = [place for place, one in enumerate(self._evaluated) if place >= begun and one.prefix == prefix]
        if len(places) == 1:
            self._evaluated[places[0]] = dataclasses.replace(self._evaluated[places[0]], values=values)
        elif not made:
            self._evaluated.append(MeasuredEvaluation(digest, prefix, values, samples=None, dataset=None))


def _recorded(method: Callable[..., Any], prefix: str) -> Callable[..., Any]:
    """A method of a Trainer whose result is recorded as that of an evaluation."""
    signature = inspect.signature(method)

    @functools.wraps(method)
    def recorded(self: MeasuringMixin, *args: Any, **kwargs: Any) -> Any:
        begun = len(self._evaluated)
        returned = method(self, *args, **kwargs)
        if self._makes_card:
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            self._record_returned(bound.arguments.get("metric_key_prefix", prefix), returned, begun)
        return returned

    # Classes further down inherit it and must not record twice. Type checkers know no attributes of functions.
    recorded.is_recorded = True  # type: ignore[attr-defined]
    return recorded
