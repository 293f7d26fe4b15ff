"""Errors of the Hub's client -> a line that says why and what to do, without secrets."""

import contextlib
import re
from collections.abc import Iterator

from huggingface_hub import get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from ..errors import PushError, one_line

# What the client raises for a connection that fails: its HTTP library's own base class.
_TransportError: type[Exception] = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")

HUB_ERRORS: tuple[type[Exception], ...] = (_TransportError, OSError, RuntimeError, ValueError)


@contextlib.contextmanager
def explained(meaning: str, token: str | None) -> Iterator[None]:
    """Turn the client's errors into a PushError: what failed, why, and what to do."""
    try:
        yield
    except HUB_ERRORS as error:
        raise PushError(f"{meaning}: {explain_error(error, token)}") from error


def may_pass(error: BaseException) -> bool:
    """Whether a retry may succeed: not if the Hub has refused the request."""
    if type(error) is RuntimeError and error.__cause__ is not None:
        return may_pass(error.__cause__)
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status is None or status >= 500 or status in (408, 409, 412, 429)


def explain_error(error: BaseException, token: str | None = None) -> str:
    """An error of the client in one line, without any token, and what to do about it."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if type(error) is RuntimeError and error.__cause__ is not None:  # the client's, around what happened to a file
        return f"{_without_secrets(one_line(error), token)} {explain_error(error.__cause__, token)}"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it to reach the Hub."
    if isinstance(error, LocalTokenNotFoundError):
        return "no token was found; log in with `hf auth login`, or set HF_TOKEN."
    text = _without_secrets(one_line(error), token)
    if isinstance(error, GatedRepoError):
        return f"access to the repository is restricted, and must be granted on its page ({text})"
    if status == 401 or (isinstance(error, RepositoryNotFoundError) and get_token() is None and token is None):
        return f"the Hub does not accept the token; log in with `hf auth login`, or set HF_TOKEN ({text})"
    if status == 403:
        return f"the token does not permit this; use one with write access ({text})"
    if status == 404:
        return f"the repository does not exist, or the token has no access to it ({text})"
    if status in (409, 412):
        return f"the repository was changed by somebody else in the meantime ({text})"
    if status is not None and status >= 500:
        return f"the Hub has a server error; try again later ({text})"
    if isinstance(error, _TransportError) and status is None:
        return f"the connection failed ({type(error).__name__}: {text})"
    return text


def _without_secrets(text: str, token: str | None) -> str:
    """The text without tokens and the signed parts of addresses."""
    for secret in filter(None, (token, get_token())):
        text = text.replace(secret, "[token]")
    text = re.sub(r"\bhf_\w{8,}", "[token]", text)
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\")]+", r"\1", text)
