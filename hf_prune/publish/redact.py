"""Removing what must not be published: tokens, secrets and paths of the machine."""

import math
import re
from collections.abc import Mapping
from typing import Any

_SECRETS = ("token", "apikey", "password", "secret")

_TOKEN = re.compile(r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{20,}")

# A path on this machine: from the root, a home folder, a drive, or a parent folder.
_PATH = re.compile(
    r"""((?:^|[\s=:,"'(\[]))((?:file://)?(?:~\w*)?/(?!/)[^\s"',)\]]*|file://[^\s"']+|[A-Za-z]:\\[^\s"']*|\.\./[^\s"']*)"""
)


def without_tokens(value: Any) -> Any:
    """A recipe's content without tokens and passwords, at any depth: recognised by the name of a key or their form."""
    if isinstance(value, Mapping):
        return {
            key: without_tokens(inner)
            for key, inner in value.items()
            if not _is_secret_name(key) and not _is_secret(inner)
        }
    if isinstance(value, (list, tuple)):
        return [without_tokens(inner) for inner in value if not _is_secret(inner)]
    return value


def _is_secret_name(name: Any) -> bool:
    return str(name).lower().replace("_", "").replace("-", "").endswith(_SECRETS)


def _is_secret(value: Any) -> bool:
    return isinstance(value, str) and looks_like_token(value)


def looks_like_token(text: str) -> bool:
    """Whether a text contains what looks like a token of the Hub."""
    return _TOKEN.search(text) is not None


def without_paths(value: Any) -> Any:
    """A recipe's content with paths on this machine reduced to their last part."""
    if isinstance(value, Mapping):
        return {without_paths(key): without_paths(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(inner) for inner in value]
    if isinstance(value, str):
        return _PATH.sub(lambda found: found[1] + re.split(r"[/\\]", found[2].rstrip("/\\"))[-1], value)
    return value


def is_plain(value: Any) -> bool:
    """Whether a value can be published: a number, text without a path, or a list or mapping of those."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and is_plain(key) and is_plain(inner) for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    if isinstance(value, str):
        return _PATH.search(value) is None
    return value is None or isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
