"""Tokens that are never used, removed from a model and its tokenizer: `shrink_vocabulary`."""

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ArgumentError, StructureError, first_line, nearest, shown
from .coupled import checked_model
from .fields import ID_FIELD, MISFITS, Path, effect_of, number_fields, saved_buffers, shapes_of
from .model_shapes import check_as_built
from .proof import TOLERANCES, answers, largest_difference, opened, sample_inputs, small_twins
from .shrink import Cut, shrink_model
from .tokens import token_ids, tokens_to_keep, without_tokens
from .units import CoupledUnits, Family, Field, Part

_TEXTS_AT_ONCE = 1000


def shrink_vocabulary(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    keep: Iterable[str] = (),
    optimizer: torch.optim.Optimizer | None = None,
) -> PreTrainedTokenizerBase:
    """Remove the tokens that texts do not use: from a model of transformers, in place, and from its tokenizer.

    Rows of the input embeddings are cut, with those of the output embeddings and their biases; the ids of tokens in
    the model's configuration and its generation configuration change. Returns the smaller tokenizer: save both, and
    plain `from_pretrained` opens them. Each of the texts has the same tokens as before, under new ids, and thus the
    same outputs of the model for tokens that stay. Other texts may be split into more and shorter tokens.

    Special and added tokens, single characters and bytes always stay, and tokens that cannot be spelled with them. Data
    that was tokenized before must be tokenized again.

    Args:
        tokenizer: a fast tokenizer of the kind WordPiece, BPE, Unigram or WordLevel; it is not changed.
        texts: the texts whose tokens stay, such as those of the training data; templates must be applied to them.
        keep: tokens that stay besides, as the tokenizer writes them.
        optimizer: one whose moments are cut with the weights.

    Raises StructureError, before anything is changed, if the tokenizer is of another kind, if the model's vocabulary is
    not that of the tokenizer, if its configuration has no number for the vocabulary alone, or if the smaller model does
    not answer as the whole one does (which is tried on a small twin with random weights); ArgumentError if `texts` is a
    single text.
    """
    vocabulary = smaller_vocabulary(model, tokenizer, texts, keep)
    vocabulary.cut(model, optimizer)
    return vocabulary.tokenizer


@dataclass(frozen=True)
class SmallerVocabulary:
    """A tokenizer with some of the tokens of another, and old id -> new id of the tokens that are left."""

    tokenizer: PreTrainedTokenizerBase
    new_ids: Mapping[int, int]

    def check(self, model: nn.Module) -> None:
        """Raise StructureError if the other tokens cannot be removed from a model, see `shrink_vocabulary`."""
        plain = checked_model(model)
        rows = _vocabulary_of(plain).groups[0].units
        largest = max(self.new_ids)
        if largest >= rows:
            raise StructureError("tokenizer", f"expected ids below {rows}, the model's vocabulary, got {largest}")
        lost = next((number for number in _ids_in(plain) if number not in self.new_ids and 0 <= number < rows), None)
        if lost is not None:
            raise StructureError("model", f"its configuration has the id {lost} of a token that would be removed")
        _check_on_twin(plain)

    def cut(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, int]:
        """Remove the other tokens from a model, in place. Raises as `check` does, before anything is changed.

        Returns the field of the configuration that counts the tokens, and its value before.
        """
        self.check(model)
        plain = checked_model(model)
        vocabulary = _vocabulary_of(plain)
        shrink_model(plain, _cut_to(vocabulary, plain.config, self.new_ids), optimizer)
        generation = getattr(plain, "generation_config", None)
        for name, value in generation.to_dict().items() if generation is not None else ():
            if ID_FIELD.fullmatch(name):
                setattr(generation, name, _renumbered(value, self.new_ids))
        return {".".join(field.path): vocabulary.groups[0].units for field in vocabulary.fields}


def smaller_vocabulary(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], keep: Iterable[str] = ()
) -> SmallerVocabulary:
    """What `shrink_vocabulary` leaves of a tokenizer for a model, which is not changed; raises as that does.

    Only `SmallerVocabulary.check` tries whether the tokens can be removed from the model.
    """
    plain = checked_model(model)
    content = _content_of(tokenizer)
    known = token_ids(content)
    by_id = {number: token for token, number in known.items()}
    given = _checked_texts(texts)
    used = {number for ids in _tokenized(tokenizer, given) for number in ids}
    named = set(_ids_in(plain))
    wanted = {by_id[number] for number in used | named if number in by_id}
    kept = tokens_to_keep(content, wanted | {*_checked_tokens(keep, known), *tokenizer.all_special_tokens})
    rows = _vocabulary_of(plain).groups[0].units
    kept_ids = {*(known[token] for token in kept), *(number for number in named if 0 <= number < rows)}
    new_ids = {old: new for new, old in enumerate(sorted(kept_ids))}
    smaller = _smaller_tokenizer(tokenizer, without_tokens(content, kept, new_ids))
    _check_tokens(tokenizer, smaller, given, {token: new_ids[known[token]] for token in kept}, new_ids)
    return SmallerVocabulary(smaller, new_ids)


# ---- Texts and tokens ----


def _checked_texts(texts: Iterable[str]) -> list[str]:
    found = None if isinstance(texts, (str, bytes)) else list(texts)
    if not found or not all(isinstance(text, str) for text in found):
        wrong = texts if not found else next(text for text in found if not isinstance(text, str))
        raise ArgumentError("texts", f"expected one or more texts, got {shown(wrong)}")
    return found


def _checked_tokens(keep: Iterable[str], known: Mapping[str, int]) -> list[str]:
    tokens = [keep] if isinstance(keep, str) else list(keep)
    unknown = [token for token in tokens if token not in known]
    if unknown:
        raise StructureError(
            "keep", f"expected tokens of the tokenizer, got {unknown[0]!r}{nearest(unknown[0], known)}"
        )
    return tokens


def _tokenized(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterator[list[int]]:
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        some = list(texts[start : start + _TEXTS_AT_ONCE])
        yield from tokenizer(some, truncation=False, padding=False, verbose=False)["input_ids"]


def _content_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        raise StructureError(
            "tokenizer", f"expected a fast tokenizer, which has a tokenizer.json, got {type(tokenizer).__name__}"
        )
    return cast(dict[str, Any], json.loads(backend.to_str()))


def _smaller_tokenizer(tokenizer: PreTrainedTokenizerBase, content: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer with another `tokenizer.json`, opened as from a saved folder."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        FilePath(folder, "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        smaller = type(tokenizer).from_pretrained(folder)
    smaller.name_or_path = tokenizer.name_or_path
    return cast(PreTrainedTokenizerBase, smaller)


def _check_tokens(
    tokenizer: PreTrainedTokenizerBase,
    smaller: PreTrainedTokenizerBase,
    texts: Sequence[str],
    expected: Mapping[str, int],
    new_ids: Mapping[int, int],
) -> None:
    """Raise StructureError if the smaller tokenizer has other tokens than expected, or gives texts other ones."""
    found = smaller.get_vocab()
    different = next((token for token in (*expected, *found) if expected.get(token) != found.get(token)), None)
    if different is not None:
        raise StructureError(
            "tokenizer",
            f"expected {type(tokenizer).__name__} to open with the tokens that are left, but {different!r} has the id "
            f"{found.get(different)} instead of {expected.get(different)}",
        )
    for text, before, after in zip(texts, _tokenized(tokenizer, texts), _tokenized(smaller, texts), strict=True):
        if [new_ids[number] for number in before] != after:
            raise StructureError(
                "tokenizer",
                f"expected the same tokens as before, got others for {shown(text)}; name in keep the tokens that may "
                "not be removed",
            )


# ---- The model ----


def _vocabulary_of(model: PreTrainedModel) -> Family:
    """The tokens of a model, and the field of its configuration that counts them."""
    words = _embedding_names(model)
    if not words:
        raise StructureError("model", f"{type(model).__name__} has no embeddings of tokens")
    before = shapes_of(type(model), model.config, buffers=True)
    if before is None:
        raise StructureError("model", f"{type(model).__name__} cannot be built from its configuration alone")
    buffers = saved_buffers(model)
    check_as_built(model, {name: shape for name, shape in before.items() if name not in buffers})
    rows = before[words[0]][0]
    found: dict[Path, tuple[tuple[str, int], ...]] = {}
    for path, value in number_fields(model.config):
        effect = effect_of(type(model), model.config, {path: 2 * rows}, before, True) if value == rows else None
        if effect is None or not effect.only_resizes or set(effect.sizes.values()) != {(rows, 2 * rows)}:
            continue
        if all((name, 0) in effect.sizes for name in words):
            found[path] = tuple(effect.sizes)
    if len(found) != 1:
        raise StructureError(
            "model",
            f"expected one field of {type(model.config).__name__} that sets the number of rows of {', '.join(words)} "
            f"alone ({rows}), got {', '.join('.'.join(path) for path in found) or 'none'}",
        )
    [(path, keys)] = found.items()
    parts = tuple(Part(name, dim, ((0, 1),)) for name, dim in keys)
    group = CoupledUnits("vocabulary", parts[0].name.rpartition(".")[0], rows, parts, ())
    return Family("vocabulary", (Field(path, 1),), (group,))


def _embedding_names(model: PreTrainedModel) -> list[str]:
    """The names of the input embeddings, and of the output embeddings where they are others; none for other inputs."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    try:  # classes that embed no tokens raise one or the other, by what transformers guesses of their parts
        modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    except (AttributeError, NotImplementedError):
        return []
    found = [names.get(id(getattr(module, "weight", None))) for module in modules]
    return list(dict.fromkeys(name for name in found if name is not None)) if found[0] is not None else []


def _cut_to(family: Family, config: PreTrainedConfig, new_ids: Mapping[int, int]) -> Cut:
    """What is left of a model with these tokens (old id -> new id), with their ids in its configuration."""
    fixed = {path: _renumbered(value, new_ids) for path, value in _id_fields(config.to_dict())}
    kept = torch.tensor(sorted(new_ids), dtype=torch.int64)
    return Cut((replace(family, fixed=fixed),), {family.groups[0].name: kept})


def _id_fields(section: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The fields of a configuration, and of its parts, that hold ids of tokens."""
    for name, value in section.items():
        if isinstance(name, str) and ID_FIELD.fullmatch(name):
            yield (*path, name), value
        elif isinstance(value, dict):
            yield from _id_fields(value, (*path, name))


def _ids_in(model: PreTrainedModel) -> list[int]:
    """The ids of tokens that the model's configuration and its generation configuration name."""
    generation = getattr(model, "generation_config", None)
    fields = [*_id_fields(model.config.to_dict()), *_id_fields(generation.to_dict() if generation else {})]
    return [number for _, value in fields for number in _numbers(value)]


def _numbers(value: Any) -> Iterator[int]:
    if type(value) is int:
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _numbers(one)


def _renumbered(value: Any, new_ids: Mapping[int, int]) -> Any:
    """A value with new ids; what is no id of a token, such as -1, stays."""
    if type(value) is int:
        return new_ids.get(value, value)
    if isinstance(value, dict):
        return {name: _renumbered(one, new_ids) for name, one in value.items()}
    return [_renumbered(one, new_ids) for one in value] if isinstance(value, (list, tuple)) else value


# ---- Whether the smaller model answers as the whole one ----


def _check_on_twin(model: PreTrainedModel) -> None:
    """Raise StructureError if a small twin without some tokens answers otherwise than with them."""
    name = type(model).__name__
    for dtype in TOLERANCES:
        for twin in small_twins(type(model), model.config, dtype):
            inputs = sample_inputs(twin)
            if inputs is not None and any(key.endswith("input_ids") for key in inputs):
                why = _difference_on(twin, inputs)
                if why is None:
                    return
                raise StructureError("model", f"tokens of {name} cannot be removed: {why}")
    raise StructureError("model", f"no inputs were found to try {name} without some of its tokens")


def _difference_on(twin: PreTrainedModel, inputs: Mapping[str, Any]) -> str | None:
    family = _vocabulary_of(twin)
    rows = family.groups[0].units
    texts = {name: ids for name, ids in inputs.items() if name.endswith("input_ids")}
    there = {*torch.cat([ids.reshape(-1) for ids in texts.values()]).tolist(), *_ids_in(twin)}
    kept = sorted({number for number in there if 0 <= number < rows} | set(range(0, rows, 3)))
    new_ids = {old: new for new, old in enumerate(kept)}
    try:
        before = answers(twin, inputs)
        shrink_model(twin, _cut_to(family, twin.config, new_ids))
        renumbered = {
            name: torch.tensor([[new_ids[one] for one in row] for row in ids.tolist()]) for name, ids in texts.items()
        }
        after = answers(opened(twin), {**inputs, **renumbered})
    except StructureError as error:
        return first_line(error)
    except MISFITS as error:
        return f"the smaller model does not run ({first_line(error)})"
    expected = [one[..., kept] if one.shape[-1:] == (rows,) else one for one in before]
    if [one.shape for one in expected] != [one.shape for one in after]:
        return "the smaller model has outputs of other shapes"
    scale = max((float(one.abs().max()) for one in expected if one.numel()), default=0.0)
    difference = largest_difference(expected, after)
    if not difference <= TOLERANCES[twin.dtype] * max(scale, 1e-30):
        return f"the smaller model's outputs differ by {difference / max(scale, 1e-30):.1e} of the largest"
    return None
