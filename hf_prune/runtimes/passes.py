"""A forward pass in any runtime: its outputs, how far they are from another's, and how long it takes."""

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from ..structure.timing import time_in_turns

# Tokens that are generated after a prompt where outputs are compared and latency is measured.
NEW_TOKENS = 8

# Rounds of timing, and after which seconds no more begin.
_ROUNDS, _LEAST_ROUNDS, _SECONDS = 20, 3, 15.0

# What runs a model: `model`, or `prefill` and `decode` of a language model -> a function of inputs by name.
Stages = Mapping[str, Callable[..., Any]]


def stages_of(model: PreTrainedModel) -> Stages:
    """A PyTorch model as the stages that an export of it has."""
    taken = inspect.signature(type(model).forward).parameters

    def run(**inputs: Any) -> Any:
        with torch.inference_mode():
            return model(**{name: value for name, value in inputs.items() if name in taken})

    return {"prefill": run, "decode": run} if model.can_generate() else {"model": run}


def run_pass(
    stages: Stages, config: PreTrainedConfig, batch: Mapping[str, torch.Tensor], following: torch.Tensor | None = None
) -> torch.Tensor:
    """The main output of a pass: logits, or else the first floating-point output.

    A language model gets a prompt, and then 8 tokens one by one: those of `following`, or the most likely ones. The
    output are the logits after the prompt and after each token (samples, 9, vocabulary).
    """
    if "model" in stages:
        return main_output(stages["model"](**batch))
    ids = batch["input_ids"]
    samples, length = ids.shape
    cache: Any = DynamicCache(config=config)
    position = torch.arange(length).expand(samples, length)
    logits = []
    for step in range(NEW_TOKENS + 1):
        found = stages["decode" if step else "prefill"](
            input_ids=ids,
            attention_mask=torch.ones(samples, length + step, dtype=torch.int64),
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
        )
        cache = found.past_key_values
        logits.append(found.logits[:, -1:])
        ids = logits[-1].argmax(-1) if following is None else following[:, step : step + 1]
        position = position[:, -1:] + 1
    return torch.cat(logits, dim=1)


def main_output(outputs: Any) -> torch.Tensor:
    """The logits of a model, or else its first floating-point output."""
    if isinstance(outputs, Mapping) and "logits" in outputs:
        return outputs["logits"]
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    return next(value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point())


def difference(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The largest difference of outputs, as a share of the largest expected one; infinite for other shapes or NaN."""
    if [one.shape for one in found] != [one.shape for one in expected]:
        return float("inf")
    scale = max(float(one.abs().max()) for one in expected)
    pairs = zip(found, expected, strict=True)
    largest = [float((one.float() - other).abs().nan_to_num(nan=torch.inf).max()) for one, other in pairs]
    return max(largest) / max(scale, 1e-30)


def agreement(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The share of outputs whose largest value, a class or the next token, is the expected one's."""
    same = [(one.argmax(-1) == other.argmax(-1)).flatten() for one, other in zip(found, expected, strict=True)]
    return float(torch.cat(same).float().mean())


def time_passes(
    models: Sequence[tuple[Stages, PreTrainedConfig]], batch: Mapping[str, torch.Tensor], following: torch.Tensor | None
) -> list[float]:
    """The least seconds of a pass of each of several models, in turns.

    With one thread, CPU seconds of all threads of this process, which other programs do not add to; otherwise those of
    the clock.
    """
    calls = [partial(run_pass, stages, config, batch, following) for stages, config in models]
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    return [min(taken) for taken in time_in_turns(calls, _ROUNDS, _SECONDS, _LEAST_ROUNDS, clock)]
