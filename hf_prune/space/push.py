"""Pushing a page: its files in one commit to a Space, verified, and nothing that somebody else wrote there replaced.

A file that records which files hf-prune made lies in the Space, so that changes by others are told from its own.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from ..config.safe_json import parse_json
from ..errors import PushError, SpaceError
from ..publish.card import CARD_NAME
from ..publish.commits import (
    address_of,
    api_of,
    check_commit,
    commit_changes,
    commit_of,
    files_in_words,
    files_of,
    operations_of,
    validate_card,
)
from ..publish.hub_errors import explained
from ..publish.push import full_name, why_not_created
from ..publish.push_plan import NOTHING_THERE, UNKNOWN, PushPlan, Remote, RemoteFile, content_of, is_there
from .app import EXPLAIN_NAME, SETTINGS_NAME
from .files import APP_NAME, REQUIREMENTS_NAME

MADE_NAME = ".hf_prune_space.json"

_FORMAT_VERSION = 1

# What people change in a Space; the other files follow from the options of the command.
_KEPT = (APP_NAME, REQUIREMENTS_NAME, CARD_NAME)

_OWN = (*_KEPT, SETTINGS_NAME, EXPLAIN_NAME)

_MESSAGE = "Upload page of a pruned model"


@dataclass(frozen=True)
class PushedPage:
    """The plan that was pushed, the commit, and the address of the Space."""

    plan: PushPlan
    commit: CommitInfo
    address: str


def push_page(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> PushedPage:
    """Push the files of a page to a Space in one commit, and check them on the Hub afterwards.

    Args:
        files: what `make_page` returned.
        repo_id: `USER/NAME` of the Space; created if it does not exist.
        private: whether a new Space is private; None is the user's default on the Hub. If True, an existing public
            one is refused.
        token: used instead of the token that the user is logged in with.
        say: called with a line for each step.

    Raises SpaceError for a Space that hf-prune did not make, and PushError if the Hub refuses the push or it fails.
    """
    api = api_of(token)
    plan, remote = _plan(api, files, repo_id, private, token)
    operations = operations_of(plan)
    if remote.head is None:
        with explained(f"The Space {plan.repo_id} could not be created, and nothing was uploaded", token):
            api.create_repo(plan.repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        say(f"Created the Space {plan.repo_id}")
        remote = _read(api, plan.repo_id, token)
    if plan.changed or plan.removed:
        say(f"Uploading {files_in_words(len(plan.changed))} to the Space {plan.repo_id}")
        commit = commit_changes(api, plan, operations, remote, None, False, _MESSAGE, token)
    else:
        say(f"Nothing to upload: the Space {plan.repo_id} has all files already")
        commit = commit_of(api, plan, str(remote.head), _MESSAGE)
    check_commit(api, plan, commit, token)
    say(f"Verified on the Hub: {files_in_words(len(plan.files))}")
    return PushedPage(plan, commit, address_of(api, plan))


def plan_page(
    files: Mapping[str, Path | bytes], repo_id: str, private: bool | None = None, token: str | None = None
) -> PushPlan:
    """What `push_page` would do; nothing is written, here or on the Hub. Raises as `push_page` does."""
    return _plan(api_of(token), files, repo_id, private, token)[0]


def _plan(
    api: HfApi, files: Mapping[str, Path | bytes], repo_id: str, private: bool | None, token: str | None
) -> tuple[PushPlan, Remote]:
    repo_id = full_name(api, repo_id, token, "--space")
    remote = _read(api, repo_id, token)
    _check_right(api, repo_id, remote, token)
    if private and remote.is_private is False:
        raise PushError(
            f"{repo_id}: a private Space was requested, but it exists and is public; nothing was uploaded. Make it "
            "private in its settings on the Hub, or push without requesting a private one."
        )
    made = _made_before(api, repo_id, remote, token)
    plan = page_plan(files, repo_id, remote, made)
    if CARD_NAME in plan.files:
        validate_card(api, plan, token)
    return plan, remote


def page_plan(files: Mapping[str, Path | bytes], repo_id: str, remote: Remote, made: Mapping[str, str]) -> PushPlan:
    """The files of a page, compared with those of a Space; `made` has the digests of those that hf-prune made there.

    A file that somebody has changed since stays as it is.
    """
    changed_there = {
        name for name in _KEPT if name in remote.files and name in made and remote.files[name].digest != made[name]
    }
    ours = {name: content for name, content in files.items() if name not in changed_there}
    digests = {name: _digest(content) for name, content in ours.items()}
    digests |= {name: made[name] for name in changed_there}
    marker = {"format_version": _FORMAT_VERSION, "files": digests}
    ours[MADE_NAME] = (json.dumps(marker, indent=1, sort_keys=True) + "\n").encode()
    return PushPlan(
        repo_id=repo_id,
        files=dict(sorted(ours.items())),
        weights={},
        left_out=dict.fromkeys(sorted(changed_there), "changed on the Hub; delete it there to have it written anew"),
        changed=[name for name in sorted(ours) if not is_there(ours[name], remote.files.get(name), None)],
        removed=sorted(name for name in _OWN if name in remote.files and name in made and name not in files),
        is_new=remote.head is None if remote is not UNKNOWN else None,
        sparsity=None,
        repo_type="space",
    )


def _digest(content: Path | bytes) -> str:
    """What git calls a file."""
    data = content_of(content)
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


# ---- What is on the Hub ----


def _read(api: HfApi, repo_id: str, token: str | None) -> Remote:
    with explained(f"The Space {repo_id} could not be read, and nothing was uploaded", token):
        try:
            info = api.space_info(repo_id)
        except RepositoryNotFoundError:
            api.whoami()  # an invalid token looks like a repository that does not exist
            return NOTHING_THERE
        head = str(info.sha)
        return Remote(head, files_of(api, repo_id, head, "space"), True, None, info.private)


def _check_right(api: HfApi, repo_id: str, remote: Remote, token: str | None) -> None:
    """Raise PushError if the token may not write to the Space or create it: before the model is uploaded."""
    with explained(f"The Space {repo_id} cannot be pushed to", token):
        if remote.head is not None:
            api.auth_check(repo_id, repo_type="space", write=True)
            return
        why = why_not_created(repo_id.split("/")[0], api.whoami())
    if why is not None:
        raise PushError(f"The Space {repo_id} cannot be created: {why}")


def _made_before(api: HfApi, repo_id: str, remote: Remote, token: str | None) -> dict[str, str]:
    """The digests of the files that hf-prune made in a Space. Raises SpaceError for one that it did not make."""
    if MADE_NAME not in remote.files:
        if _is_empty(remote.files):
            return {}
        raise SpaceError(
            "--space", f"{repo_id} is a Space that hf-prune did not make, and is not changed; give another name"
        )
    with explained(f"The Space {repo_id} could not be read, and nothing was uploaded", token):
        path = api.hf_hub_download(repo_id, MADE_NAME, repo_type="space", revision=remote.head)
        content: Any = parse_json(Path(path).read_text(encoding="utf-8"))
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict) or content.get("format_version") != _FORMAT_VERSION:
        raise SpaceError("--space", f"{repo_id}: {MADE_NAME} is none that this hf-prune can read; give another name")
    return {name: digest for name, digest in files.items() if isinstance(digest, str)}


def _is_empty(files: Mapping[str, RemoteFile]) -> bool:
    """Whether a Space has only what the Hub puts into a new one."""
    return files.keys() <= {".gitattributes", CARD_NAME}
