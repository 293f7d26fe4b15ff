"""Models and tokenizers of recipes: loaded, checked and ready to be trained."""

import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..config.safe_json import read_json
from ..errors import RecipeError, TargetError, nearest, nearest_beside, one_line
from ..model.devices import why_not_device, why_not_name
from ..model.limits import too_large
from ..model.opening import LOADING_ERRORS, why_not_opened
from ..model.targets import check_expressions
from .names import resolve_name
from .schema import ModelSection, Recipe
from .tasks import Task

# What options of commands call the types that a model can be computed in.
_DTYPES = ("auto", "float32", "bfloat16", "float16")


def check_computing(dtype: str, device: str | None, computes: bool = True) -> None:
    """Raise RecipeError for what `--dtype` and `--device` cannot be, in words of torch where those say why.

    Where nothing is computed, the device need not be on this machine.
    """
    if dtype not in _DTYPES:
        raise RecipeError("--dtype", f"expected one of {', '.join(_DTYPES)}, got {dtype!r}")
    if device is None:
        return
    problem = why_not_device(device) if computes else why_not_name(device)
    if problem is not None:
        raise RecipeError("--device", problem)


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """Load the tokenizer that a recipe names, or that of its model."""
    field = "model.name" if section.tokenizer is None else "model.tokenizer"
    name = section.tokenizer or section.name
    assert name is not None  # the recipe was checked
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_name(field, name), trust_remote_code=False, **_gguf(section))
    except LOADING_ERRORS as error:
        raise RecipeError(field, f"the tokenizer cannot be loaded: {why_not_opened(error)}") from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        # transformers loads this from a folder without a tokenizer: every word would be unknown.
        raise RecipeError(field, "expected a tokenizer with a vocabulary, found special tokens only")
    return tokenizer


def _gguf(section: ModelSection) -> dict[str, Any]:
    return {"gguf_file": section.gguf_file} if section.gguf_file is not None else {}


def load_model(
    section: ModelSection, task: Task, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, list[str]]:
    """Load the model for a task; also returns the names of weights that its file does not contain."""
    if section.config is not None:
        problem = too_large(section.config)
        if problem is not None:
            raise RecipeError("model.config", problem)
        return _new_model(section.config, task, tokenizer), []
    assert section.name is not None  # the recipe was checked
    model_name = resolve_name("model.name", section.name)
    _check_config(Path(model_name, "config.json"))
    try:
        model, loading = task.auto_class.from_pretrained(
            model_name,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # of a head for other labels, drawn at random; others are refused below
            **task.model_options(),
            **_gguf(section),
        )
    except LOADING_ERRORS as error:
        hint = "" if Path(model_name).exists() else nearest_beside(Path(model_name))
        raise RecipeError("model.name", f"{why_not_opened(error)}{hint}") from error
    base = {id(parameter) for parameter in model.base_model.parameters()}
    for name, in_file, in_model in loading["mismatched_keys"]:
        if id(model.get_parameter(name)) in base:
            shapes = f"{tuple(in_file)} in the file and {tuple(in_model)} by its config.json"
            raise RecipeError("model.name", f"the shape of {name} is {shapes}; the file does not fit the config")
    new_weights = sorted({*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])})
    return unquantised(model) if section.gguf_file is not None else model, new_weights


def _check_config(path: Path) -> None:
    """Raise RecipeError for a model's config.json that cannot be read or asks for too many layers."""
    try:
        problem = too_large(read_json(path, finite=False)) if path.is_file() else None
    except ValueError as error:
        problem = one_line(error)
    if problem is not None:
        raise RecipeError("model.name", f"{path}: {problem}")


def _new_model(config: dict[str, Any], task: Task, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A new model of a configuration, its weights drawn at random, for the tokens of a tokenizer."""
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    start = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.bos_token_id
    tokens = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": end,
        "decoder_start_token_id": start,
    }
    try:
        known = AutoConfig.for_model(config["model_type"])
        unknown = [name for name in config if not hasattr(known, name)]
        if not unknown:
            return task.auto_class.from_config(AutoConfig.for_model(**tokens | config))
    except LOADING_ERRORS as error:
        raise RecipeError("model.config", f"no model can be created from it: {one_line(error)}") from error
    hint = nearest(unknown[0], list(known.to_dict()))
    raise RecipeError(f"model.config.{unknown[0]}", f"unknown field of {type(known).__name__}{hint}")


def unquantised(model: PreTrainedModel) -> PreTrainedModel:
    """A model that was loaded from a quantised file, as a float32 model that can be saved."""
    config = type(model.config).from_dict(
        {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}
    )
    config.name_or_path = model.config.name_or_path
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain


def check_finite(model: PreTrainedModel) -> None:
    """Raise RecipeError for a model with a weight that is NaN or infinite."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise RecipeError("model.name", f"expected finite weights, got NaN or infinite ones in {name}")


def set_generation(model: PreTrainedModel, recipe: Recipe) -> None:
    """Set the recipe's generation options in the model's generation configuration, which is saved with it."""
    if model.can_generate():
        for name, value in recipe.generation.options.items():
            setattr(model.generation_config, name, value)


def set_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Use the end-of-text token for padding if there is no padding token, as is usual for decoders."""
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise RecipeError(
                "model.name", "the tokenizer must have a padding token or an end-of-text token, and has neither"
            )
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id


def check_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Raise RecipeError if texts of `max_length` tokens do not fit into the model, or hold special tokens only."""
    special = tokenizer.num_special_tokens_to_add()
    if max_length <= special:
        raise RecipeError("dataset.max_length", f"expected more than the {special} special tokens, got {max_length}")
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise RecipeError(
            "dataset.max_length", f"expected at most the {positions} positions of the model, got {max_length}"
        )


def freeze(model: PreTrainedModel, expressions: list[str]) -> None:
    """Freeze the parameters that the expressions match. Raises RecipeError for an expression that matches none."""
    parameters = dict(model.named_parameters(remove_duplicate=False))  # a tied one by each of its names
    try:
        check_expressions("model.freeze", expressions, parameters)
    except TargetError as error:
        raise RecipeError(problems=error.problems) from error
    for name, parameter in parameters.items():
        if any(re.fullmatch(expression, name) for expression in expressions):
            parameter.requires_grad_(False)
