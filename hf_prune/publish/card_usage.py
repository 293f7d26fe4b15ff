"""The Python code in a model card: how to use the model, to count its zeros, and to go on with training."""

import json
from collections.abc import Mapping
from typing import Any

from .markdown import cleaned
from .sparsity_json import PACKED_FOLDER, Figures
from .tasks import task_of

# Tasks whose pipeline takes one text, and its arguments in the usage section.
_TEXT_PIPELINES = {
    "text-classification": '"A film that stays with you."',
    "token-classification": '"Ada Lovelace was born in London."',
    "text-generation": '"The film begins", max_new_tokens=20',
}


def usage_code(figures: Figures, location: str) -> str:
    """How to open the model, by a pipeline where its task has one that takes a text."""
    task = task_of(figures.architecture)
    if task in _TEXT_PIPELINES and figures.has_tokenizer:
        return (
            f"{_first_import(figures)}from transformers import pipeline\n\n"
            f'pipe = pipeline("{task}", model={_as_python(location)})\n'
            f"print(pipe({_TEXT_PIPELINES[task]}))"
        )
    return _opening(figures, location)


def packed_code(figures: Figures, location: str) -> str:
    """How to open the packed weights that lie beside these."""
    packed = figures.model_copy(update={"dense_bytes": figures.file_bytes})
    return _opening(packed, location, f', subfolder="{PACKED_FOLDER}"')


def _opening(figures: Figures, location: str, arguments: str = "") -> str:
    name = figures.architecture or "AutoModel"
    return (
        f"{_first_import(figures)}from transformers import {name}\n\n"
        f"model = {name}.from_pretrained({_as_python(location)}{arguments})"
    )


def _first_import(figures: Figures) -> str:
    """The import without which a model that is packed, or whose layers differ, does not open."""
    why = ["unpacks the weights"] if figures.dense_bytes is not None else []
    why += ["builds each layer at its own size"] if figures.needs_import else []
    return f"import hf_prune  # {' and '.join(why)}\n" if why else ""


def count_code(figures: Figures, location: str) -> str:
    """How to count the zeros of the model, or its parameters where it is only smaller."""
    if figures.only_smaller:
        return (
            f"{_opening(figures, location)}\n"
            'print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters")'
        )
    return (
        f"{_opening(figures, location)}\n"
        "tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}.values()  # tied weights\n"
        "zeros = sum(int((tensor == 0).sum()) for tensor in tensors)\n"
        'print(f"{zeros / sum(tensor.numel() for tensor in tensors):.2%} of all weights are zero")'
    )


# The fields of a configuration that a training which goes on takes over.
_GO_ON = ("targets", "exclude", "shared_values", "shared_values_granularity")


def continue_code(figures: Figures) -> str:
    """How to train on and keep the zeros, and the shared values."""
    choices = [
        {"method": "keep"} | {name: config.get(name) for name in _GO_ON}
        for config in figures.pruning
        if figures.removed is None or not config.get("structure")
    ] or [{"method": "keep"}]
    kept = list(dict.fromkeys(_call({key: value for key, value in choice.items() if value}) for choice in choices))
    config = kept[0] if len(kept) == 1 else f"[{', '.join(kept)}]"
    return (
        "from hf_prune import PruningConfig, PruningTrainer\n\n"
        "trainer = PruningTrainer(\n"
        "    model=model,\n"
        "    args=args,  # your own TrainingArguments and data\n"
        "    train_dataset=train_dataset,\n"
        f"    pruning_config={config},\n"
        ")\n"
        "trainer.train()"
    )


def _call(values: Mapping[str, Any]) -> str:
    return f"PruningConfig({', '.join(f'{name}={_as_python(value)}' for name, value in values.items())})"


def _as_python(value: Any) -> str:
    """Strings, and lists of them, as Python literals: the notation of JSON is the same."""
    return json.dumps(cleaned(value), ensure_ascii=False)
