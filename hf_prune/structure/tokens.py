"""The `tokenizer.json` of a fast tokenizer: which tokens must stay beside those that are used, and the file without
the others.

`content` is what `json.loads` gives for the file (the format of the `tokenizers` library, version 1.0).
"""

import copy
import re
from collections.abc import Collection, Iterator, Mapping
from itertools import pairwise
from typing import Any

from ..errors import StructureError

# A byte of a text that no other token covers (`byte_fallback`).
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def token_ids(content: Mapping[str, Any]) -> dict[str, int]:
    """Token -> id, of the vocabulary and the added tokens."""
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, list):
        vocabulary = {token: place for place, (token, _) in enumerate(vocabulary)}
    return {**vocabulary, **{token["content"]: token["id"] for token in content["added_tokens"]}}


def tokens_to_keep(content: Mapping[str, Any], used: Collection[str]) -> set[str]:
    """The tokens that stay so that every text whose tokens are `used` gets the same tokens again.

    Beside the used ones these are: added tokens, and those that the post-processor adds; single characters and bytes,
    and tokens that cannot be spelled with them, so that any other text has tokens; of byte-pair encodings, the tokens
    that a token is merged from; of unigram models, one with the lowest score, which sets that of unknown characters.

    Raises StructureError, with the key `tokenizer`, for a kind of tokenizer whose tokens cannot be removed.
    """
    model = content["model"]
    kinds = {"WordPiece": _of_pieces, "BPE": _of_merges, "Unigram": _of_scores, "WordLevel": _of_words}
    if model.get("type") not in kinds:
        raise StructureError(
            "tokenizer", f"expected a tokenizer of the kind {', '.join(kinds)}, got {model.get('type')!r}"
        )
    ids = token_ids(content)
    by_id = {number: token for token, number in ids.items()}
    added = {token["content"] for token in content["added_tokens"]}
    kept = {token for token in used if token in ids} - added
    kept |= kinds[model["type"]](model, kept) | added
    kept |= {by_id[number] for number in _ids_of(content.get("post_processor")) if number in by_id}
    if model.get("unk_token") in ids:
        kept.add(model["unk_token"])
    return kept


def _of_pieces(model: Mapping[str, Any], kept: set[str]) -> set[str]:
    prefix = model["continuing_subword_prefix"]

    def spelled(token: str) -> list[str]:
        inside = token.startswith(prefix)
        letters = token.removeprefix(prefix) if inside else token
        return [f"{prefix}{letter}" if inside or place else letter for place, letter in enumerate(letters)]

    return {token for token in model["vocab"] if not _can_go(token, spelled, model["vocab"])}


def _of_words(model: Mapping[str, Any], kept: set[str]) -> set[str]:
    if model.get("unk_token") not in model["vocab"]:
        raise StructureError("tokenizer", "expected a token for unknown words (unk_token), got none")
    return set()


def _of_scores(model: Mapping[str, Any], kept: set[str]) -> set[str]:
    scores = dict(reversed(model["vocab"]))
    unknown = model.get("unk_id")
    found = {token for token in scores if not _can_go(token, list, scores)}
    found.add(min(scores, key=lambda token: scores[token]))
    return found | ({model["vocab"][unknown][0]} if unknown is not None else set())


def _of_merges(model: Mapping[str, Any], kept: set[str]) -> set[str]:
    if model.get("continuing_subword_prefix"):
        raise StructureError("tokenizer", "expected byte-pair merges without a continuing_subword_prefix, got one")
    if model.get("dropout"):
        raise StructureError("tokenizer", f"expected merges without dropout, got dropout {model['dropout']!r}")
    vocabulary, suffix = model["vocab"], model.get("end_of_word_suffix") or ""
    ranks = {pair: rank for rank, pair in enumerate(_pairs(model))}

    def letters_of(token: str) -> list[str]:
        ends = bool(suffix) and token.endswith(suffix) and token != suffix
        letters = list(token.removesuffix(suffix) if ends else token)
        return [*letters[:-1], letters[-1] + suffix] if ends else letters

    found = {token for token in vocabulary if len(letters_of(token)) == 1 or _BYTE.fullmatch(token)}
    for token in kept & vocabulary.keys():
        found.update(_merged(letters_of(token), ranks))
    return found & vocabulary.keys()


def _merged(parts: list[str], ranks: Mapping[tuple[str, str], int]) -> Iterator[str]:
    """The tokens that merges make of letters, one after another."""
    while len(parts) > 1:
        pairs = list(pairwise(parts))
        best = min(range(len(pairs)), key=lambda place: ranks.get(pairs[place], len(ranks)))
        if pairs[best] not in ranks:
            return
        parts = [*parts[:best], "".join(pairs[best]), *parts[best + 2 :]]
        yield parts[best]


def _pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges, which files write as `"a b"` or as `["a", "b"]`."""
    pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
    return [(one, other) for one, other in pairs]


def _can_go(token: str, spelled: Any, vocabulary: Collection[str]) -> bool:
    """Whether a token can be written with other tokens of single characters."""
    letters = spelled(token)
    return len(letters) > 1 and all(letter in vocabulary for letter in letters) and not _BYTE.fullmatch(token)


def without_tokens(content: Mapping[str, Any], kept: Collection[str], new_ids: Mapping[int, int]) -> dict[str, Any]:
    """The content of the `tokenizer.json` that has the kept tokens alone, with new ids (old id -> new id)."""
    left = copy.deepcopy(dict(content))
    model = left["model"]
    if model["type"] == "BPE":
        pairs, tokens = zip(model["merges"], _pairs(model), strict=True), set(kept)
        model["merges"] = [pair for pair, (one, other) in pairs if {one, other, one + other} <= tokens]
    if isinstance(model["vocab"], list):
        if model.get("unk_id") is not None:
            model["unk_id"] = new_ids[model["unk_id"]]
        model["vocab"] = [[token, score] for token, score in model["vocab"] if token in kept]
    else:
        model["vocab"] = {token: new_ids[number] for token, number in model["vocab"].items() if token in kept}
    for token in left["added_tokens"]:
        token["id"] = new_ids[token["id"]]
    if left.get("padding"):
        left["padding"]["pad_id"] = new_ids.get(left["padding"]["pad_id"], 0)
    for processor in _processors(left.get("post_processor")):
        for token in processor.get("special_tokens", {}).values():
            token["ids"] = [new_ids[number] for number in token["ids"]]
        for name in ("sep", "cls"):
            if name in processor:
                token, number = processor[name]
                processor[name] = [token, new_ids[number]]
    return left


def _processors(processor: Any) -> Iterator[dict[str, Any]]:
    """A post-processor, or those that it consists of."""
    if processor and "processors" in processor:
        for one in processor["processors"]:
            yield from _processors(one)
    elif processor:
        yield processor


def _ids_of(processor: Any) -> Iterator[int]:
    """The ids of the tokens that a post-processor adds."""
    for one in _processors(processor):
        for token in one.get("special_tokens", {}).values():
            yield from token["ids"]
        yield from (one[name][1] for name in ("sep", "cls") if name in one)
