"""What a format is that models are exported to, and what is exported."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# A batch: inputs of a model by name.
Batch = Mapping[str, torch.Tensor]

# A model that was opened in a runtime: inputs by name -> outputs by name or position.
Runtime = Callable[..., Any]


@dataclass(frozen=True)
class Work:
    """What is exported: a model in evaluation mode with its tokenizer, batches of samples, whether int8 is wanted."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    batches: Sequence[Batch]
    int8: bool = False

    @property
    def is_generative(self) -> bool:
        """Whether the model generates text, step by step with a cache."""
        return self.model.can_generate()


@dataclass(frozen=True)
class ExportFormat:
    """One format.

    Attributes:
        runtime: the runtime that it is opened in, as tables name it.
        extra: the extra of hf-prune that has what it needs.
        modules: what must be importable.
        write: writes the files of a model into a folder that exists.
        open: the runtimes in a folder, by the stage of a forward pass: `model`; `prefill` and `decode` of a language
            model; `encoder`, `prefill` and `decode` of an encoder-decoder.
        int8: what int8 is there, in words; None if it is not offered.
        int8_modules: what must be importable for int8.
        packages: those whose versions are told.
        generates: whether language models keep their cache of keys and values.
        translates: whether encoder-decoders that generate text are exported.
        model_types: those of the configurations that it is written for; empty for any.
        computes_in: the data type that the runtime computes float32 models in, on this machine.
    """

    runtime: str
    extra: str
    modules: tuple[str, ...]
    write: Callable[[Work, Path], None]
    open: Callable[[Path], dict[str, Runtime]]
    int8: str | None = None
    int8_modules: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    generates: bool = True
    translates: bool = False
    model_types: tuple[str, ...] = ()
    computes_in: Callable[[], str] = lambda: "float32"
