"""A forward pass in any runtime: its outputs, how far they are from another's, and how long it takes."""

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedConfig, PreTrainedModel

from ..structure.timing import time_in_turns
from .samples import is_encoder_decoder

# Tokens that are generated after a prompt where outputs are compared and latency is measured.
NEW_TOKENS = 8

# Rounds of timing, and after which seconds no more begin.
_ROUNDS, _LEAST_ROUNDS, _SECONDS = 20, 3, 15.0

# What runs a model: `model`; `prefill` and `decode` of a language model; `encoder`, `prefill` and `decode` of an
# encoder-decoder -> a function of inputs by name.
Stages = Mapping[str, Callable[..., Any]]


def stages_of(model: PreTrainedModel) -> Stages:
    """A PyTorch model as the stages that an export of it has."""
    run = _runs(model)
    if is_encoder_decoder(model):
        return {"encoder": _runs(model.get_encoder()), "prefill": run, "decode": run}
    return {"prefill": run, "decode": run} if model.can_generate() else {"model": run}


def _runs(module: Any) -> Callable[..., Any]:
    """A function that runs a module without gradients, with those inputs that its forward pass takes."""
    taken = inspect.signature(type(module).forward).parameters

    def run(**inputs: Any) -> Any:
        with torch.inference_mode():
            return module(**{name: value for name, value in inputs.items() if name in taken})

    return run


def run_pass(
    stages: Stages, config: PreTrainedConfig, batch: Mapping[str, torch.Tensor], following: torch.Tensor | None = None
) -> torch.Tensor:
    """The main output of a pass: logits, or else the first floating-point output.

    A language model gets a prompt, and then 8 tokens one by one: those of `following`, or the most likely ones. The
    output are the logits after the prompt and after each token (samples, 9, vocabulary). The prompt of an
    encoder-decoder are the `decoder_input_ids` of the batch, after its encoder has read the other inputs.
    """
    if "model" in stages:
        return main_output(stages["model"](**batch))
    inputs_of = _of_decoder(stages, batch) if "encoder" in stages else _of_language_model
    ids = batch["decoder_input_ids" if "encoder" in stages else "input_ids"]
    cache: Any = _new_cache(config, "encoder" in stages)
    before = 0
    logits = []
    for step in range(NEW_TOKENS + 1):
        inputs = inputs_of(ids, before)
        found = stages["decode" if step else "prefill"](**inputs, past_key_values=cache, use_cache=True)
        cache = found.past_key_values
        before += ids.shape[1]
        logits.append(found.logits[:, -1:])
        ids = logits[-1].argmax(-1) if following is None else following[:, step : step + 1]
    return torch.cat(logits, dim=1)


def _new_cache(config: PreTrainedConfig, has_encoder: bool) -> Any:
    """A cache of no tokens."""
    if not has_encoder:
        return DynamicCache(config=config)
    return EncoderDecoderCache(DynamicCache(config=config.get_text_config(decoder=True)), DynamicCache())


def _of_language_model(ids: torch.Tensor, before: int) -> dict[str, Any]:
    """What a language model takes for tokens after so many others: an attention mask and positions as well."""
    samples, length = ids.shape
    return {
        "input_ids": ids,
        "attention_mask": torch.ones(samples, before + length, dtype=torch.int64),
        "position_ids": torch.arange(before, before + length).expand(samples, length),
    }


def _of_decoder(stages: Stages, batch: Mapping[str, torch.Tensor]) -> Callable[[torch.Tensor, int], dict[str, Any]]:
    """The encoder reads the batch: what the decoder takes for tokens, with what was read."""
    read = {name: value for name, value in batch.items() if name != "decoder_input_ids"}
    given = {"encoder_outputs": stages["encoder"](**read), "attention_mask": read["attention_mask"]}
    return lambda ids, before: {"decoder_input_ids": ids, **given}


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
