"""Removing what must not be published: tokens, secrets and paths of the machine."""

import math
import re
from collections.abc import Mapping
from typing import Any

_SECRETS = ("token", "apikey", "password", "secret")

# Characters that are not in the user's name and password of a URL; nor are those of templates, such as {user}.
_OUTSIDE = r"\s/@?#\"'`<>{}$\\"

# Files that programs keep passwords in, whatever else is in there.
_PASSWORD_FILES = ("netrc", ".netrc", "_netrc", "kaggle.json", ".git-credentials", ".pgpass", ".pypirc", ".npmrc")

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
        ("a key of Azure", r"sig=[A-Za-z0-9%/+]{40,90}(?:%3[Dd]|=)"),  # of a shared access signature, in a URL
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
        ("a token of Discord", r"\.(?:(?<=[MNO][\w-]{23}\.)|(?<=[MNO][\w-]{25}\.))[\w-]{6}\.[\w-]{27,38}(?![\w-])"),
        ("a webhook of Discord", r"/api/webhooks/\d{15,}/[\w-]{60,}"),
        ("a key of Mailgun", r"key-[0-9a-f]{32}(?![0-9a-f])"),
        ("a key of Mailgun", r"-(?<=[0-9a-f]{32}-)[0-9a-f]{8}-[0-9a-f]{8}(?![0-9a-f-])"),
        ("a key of Mailchimp", r"-us(?<=[0-9a-f]{32}-us)\d{1,2}(?!\w)"),
        ("a key of Square", r"sq0(?:csp|atp)-[\w-]{22,}"),
        ("a key of Twilio", r"SK[0-9a-f]{32}(?![0-9a-f])"),
        ("a token of Twilio", r"TWILIO_AUTH_TOKEN\W{1,8}[0-9a-f]{32}"),
        ("a token of Shopify", r"shp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}"),
        ("a key of Pinecone", r"pcsk_\w{50,}"),
        ("a key of Pinecone", r"PINECONE_API_KEY\W{1,8}[0-9a-f-]{36}"),
        ("a key of Kaggle", r"KGAT_[0-9a-f]{32}"),
        ("a key of Kaggle", r"KAGGLE_KEY\W{1,8}[0-9a-f]{32}"),
        ("a key of Kaggle", r'"username"\s{0,9}:\s{0,9}"[^"]{1,99}"\s{0,9},\s{0,9}"key"\s{0,9}:\s{0,9}"[0-9a-f]{32}"'),
        ("a key of Weights & Biases", r"WANDB_API_KEY\W{1,8}[0-9a-f]{40}"),
        ("a key of Weights & Biases", r"wandb_v1_\w{40,}"),
        ("a key of Weights & Biases", r"wandb\.login\([^)]{0,40}[\"'][0-9a-f]{40}"),
        ("a password of netrc", r"machine\s{1,9}\S{1,99}\s{1,9}login\s{1,9}\S{1,99}\s{1,9}password\s{1,9}\S"),
        ("a password in a URL", rf"://[^{_OUTSIDE}:]{{1,64}}:(?!pass(?:word)?@|\*+@)[^{_OUTSIDE}]{{3,128}}@[\w\[]"),
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


def is_password_file(name: str) -> bool:
    """Whether a file of this name is one that a program keeps a password in."""
    return name.rpartition("/")[2].lower() in _PASSWORD_FILES


def find_secret(content: bytes) -> str | None:
    """What kind of secret the content seems to contain, such as "a private key"; None if none is seen.

    Text in UTF-16 and UTF-32 is searched too, and `&` as JSON may have it.
    """
    found = _find(content)
    return _find(content.replace(b"\0", b"")) if found is None and b"\0" in content else found


def _find(content: bytes) -> str | None:
    content = content.replace(b"\\u0026", b"&")
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
