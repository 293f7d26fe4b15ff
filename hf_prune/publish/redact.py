"""Removing what must not be published: tokens, secrets and paths of the machine."""

import math
import re
from collections.abc import Mapping
from typing import Any

_SECRETS = ("token", "apikey", "password", "secret")

# Forms of secrets. Each begins with fixed letters: so a vocabulary of 10 MB is searched in a fraction of a second.
_FORMS = tuple(
    (kind, re.compile(form.encode()))
    for kind, form in (
        ("a private key", r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY"),
        ("a private key", r"PuTTY-User-Key-File-\d"),
        ("a private key", r"AGE-SECRET-KEY-1[0-9A-Z]{50,}"),
        ("a Hub token", r"hf_[A-Za-z0-9]{20,}"),
        ("a Hub token", r"api_org_[A-Za-z0-9]{30,}"),
        ("a key of AWS", r"AKIA[A-Z0-9]{16}(?![A-Za-z0-9])"),
        ("a key of AWS", r"ASIA[A-Z0-9]{16}(?![A-Za-z0-9])"),
        ("a key of AWS", r"AWS_SECRET_ACCESS_KEY\W{1,8}[A-Za-z0-9/+]{40}"),
        ("a key of AWS", r"aws_secret_access_key\W{1,8}[A-Za-z0-9/+]{40}"),
        ("a key of AWS", r"SecretAccessKey\W{1,8}[A-Za-z0-9/+]{40}"),
        ("a key of Google Cloud", r"AIza[\w-]{35}"),
        ("a key of Google Cloud", r"GOCSPX-[\w-]{28}"),
        ("a key of Google Cloud", r"ya29\.[\w-]{20,}"),
        ("a key of Azure", r"AccountKey=[A-Za-z0-9+/]{86}"),
        ("a key of Azure", r"SharedAccessKey=[A-Za-z0-9+/]{43}"),
        ("a key of Azure", r"8Q~[A-Za-z0-9_.~-]{31}"),
        ("a key of DigitalOcean", r"do[opr]_v1_[0-9a-f]{64}"),
        ("a token of GitHub", r"gh[pousr]_[A-Za-z0-9]{36}"),
        ("a token of GitHub", r"github_pat_\w{50,}"),
        ("a token of GitLab", r"gl(?:pat|dt|rt|ft|soat|cbt|ptt|agent|oas)-[\w-]{20,}"),
        ("a key of OpenAI or Anthropic", r"sk-(?:proj|svcacct|admin|ant|or-v1)-[\w-]{20,}"),
        ("a key of OpenAI or Anthropic", r"sk-[A-Za-z0-9]{32,}"),
        ("a key of Groq", r"gsk_[A-Za-z0-9]{50,}"),
        ("a key of xAI", r"xai-[A-Za-z0-9]{70,}"),
        ("a key of Perplexity", r"pplx-[A-Za-z0-9]{40,}"),
        ("a key of NVIDIA", r"nvapi-[\w-]{60,}"),
        ("a token of Replicate", r"r8_[A-Za-z0-9]{37}(?![A-Za-z0-9])"),
        ("a key of LangSmith", r"lsv2_(?:pt|sk)_[0-9a-f]{32}"),
        ("a token of Slack", r"xox[abeoprs]-[\w-]{10,}"),
        ("a token of Slack", r"xapp-\d-[\w-]{10,}"),
        ("a webhook of Slack", r"hooks\.slack\.com/services/T\w+/B\w+/\w+"),
        ("a key of Stripe", r"sk_(?:live|test)_[A-Za-z0-9]{20,}"),
        ("a key of Stripe", r"rk_(?:live|test)_[A-Za-z0-9]{20,}"),
        ("a key of SendGrid", r"SG\.[\w-]{22}\.[\w-]{43}"),
        ("a token of npm", r"npm_[A-Za-z0-9]{36}"),
        ("a token of PyPI", r"pypi-AgE[\w-]{50,}"),
        ("a token of Docker", r"dckr_(?:pat|oat)_[\w-]{27,}"),
        ("a token of Vault", r"hvs\.[\w-]{24,}"),
        ("a token of Grafana", r"glsa_[A-Za-z0-9]{32}_[0-9a-f]{8}"),
        ("a token of Databricks", r"dapi[0-9a-f]{32}"),
        ("a token of Telegram", r":AA(?<=\d{8}:AA)[\w-]{33}(?![\w-])"),
        ("a key of Weights & Biases", r"WANDB_API_KEY\W{1,8}[0-9a-f]{40}"),
        ("a JSON Web Token", r"eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"),
    )
)

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
    return isinstance(value, str) and find_secret(value.encode(errors="replace")) is not None


def find_secret(content: bytes) -> str | None:
    """What kind of secret the content seems to contain, such as "a private key"; None if none is seen."""
    for kind, form in _FORMS:
        for found in form.finditer(content):
            before, first = (
                content[max(found.start() - 1, 0) : found.start()],
                content[found.start() : found.start() + 1],
            )
            if not (before.isalnum() and first.isalpha()):  # or it is the end of a longer word
                return kind
    return None


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
