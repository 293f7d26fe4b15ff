"""The text of a config.json with and without the entry of packed weights: everything else stays byte by byte."""

import json

from ..config.safe_json import parse_json
from ..errors import PackedError
from .block import VERSION
from .values import ROUNDED_TO

METHOD = "hf_prune"

_KEY = "quantization_config"


def _entry(embeddings: str | None) -> str:
    """What config.json says of packed weights, as text that follows its last other entry."""
    said = {"quant_method": METHOD, "format_version": VERSION, **({"embeddings": embeddings} if embeddings else {})}
    return f',\n  "{_KEY}": {json.dumps(said)}'


def with_entry(text: str, dtype: str | None = None, embeddings: str | None = None) -> str:
    """A config.json with the entry of packed weights, and perhaps another data type or rounded embeddings.

    Raises PackedError if it is no JSON object, or of a quantised model.
    """
    content = _parsed(text)
    if _KEY in content:
        raise PackedError("expected the configuration of a dense model, got one that is quantised or packed")
    if dtype is not None:
        name = "torch_dtype" if "torch_dtype" in content else "dtype"
        text = json.dumps({**content, name: dtype}, indent=2, ensure_ascii=False) + "\n"
    body = text.rstrip().removesuffix("}").rstrip()
    return body + _entry(embeddings) + text[len(body) :]


def rounded_embeddings(content: dict) -> str | None:
    """What a configuration says that embeddings were rounded to; None if it says nothing of it."""
    said = content[_KEY].get("embeddings") if says_packed(content) else None
    return said if said in ROUNDED_TO else None


def says_packed(content: dict) -> bool:
    """Whether a configuration says that the weights are packed."""
    entry = content.get(_KEY)
    return isinstance(entry, dict) and entry.get("quant_method") == METHOD


def without_entry(text: str) -> str:
    """The config.json that `with_entry` was given; where it was edited since, the same content in other text."""
    content = _parsed(text)
    if content.get(_KEY, {}).get("quant_method") != METHOD:
        raise PackedError(f'expected the configuration of a packed model, with "quant_method": "{METHOD}"')
    entry = _entry(rounded_embeddings(content))
    if text.count(entry) == 1:
        return text.replace(entry, "")
    del content[_KEY]
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _parsed(text: str) -> dict:
    try:
        content = parse_json(text, finite=False)
    except ValueError as error:
        raise PackedError(f"expected JSON, got a file that cannot be used ({error})") from error
    if not isinstance(content, dict) or not content or not isinstance(content.get(_KEY, {}), dict):
        raise PackedError("expected JSON, got a file that cannot be used (it is no object with entries)")
    return content
