"""Pushing: a saved model's folder -> one commit on the Hub, read back and compared.

The steps of a push:

    read the repository    its files and card, if it exists
    count, make the card   on disk, from the saved files; measurements of other weights are refused
    choose the files       those that the model's own classes read; secrets are refused
    validate the card      by the Hub
    ---- a dry run ends here; nothing was written so far ----
    create repository      if it does not exist; and the branch that --revision names
    commit                 large files first, then all files in one commit: all or none
    read back              sizes and hashes of every file
"""

import contextlib
import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..config.safe_json import read_json
from ..errors import PushError, one_line
from ..saved.files import write_file
from .card import CARD_NAME, metadata_in, write_files
from .card_merge import Existing
from .commits import (
    api_of,
    check_commit,
    commit_changes,
    commit_of,
    files_in_words,
    files_of,
    operations_of,
    pull_request_with,
    validate_card,
)
from .hub_errors import explained
from .push_plan import NOTHING_THERE, PushPlan, Remote, content_of, make_push_plan
from .sparsity_json import FIGURES_NAME

_PUSHED_NAME = ".pushed_card.json"

# What git allows in the name of a branch, roughly.
_BRANCH = re.compile(r"(?![-/.])(?!.*(?://|\.\.|@\{|/\.))[^\s~^:?*\[\\]+(?<![/.])(?<!\.lock)")


@dataclass(frozen=True)
class PushResult:
    """The plan that was pushed, and the commit on the Hub."""

    plan: PushPlan
    commit: CommitInfo


def push_model(
    folder: str | os.PathLike,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    with_masks: bool = False,
    also: Mapping[str, Path] | None = None,
    message: str = "Upload pruned model",
    token: str | None = None,
    include: Collection[str] = (),
    show: Callable[[PushPlan], None] = lambda plan: None,
    say: Callable[[str], None] = lambda text: None,
) -> PushResult:
    """Push a saved model and its card in one commit, and check the files on the Hub afterwards.

    Args:
        folder: the saved model, with its `run_record.json` if it was trained with `PruningTrainer`: a path, or a
            `SavedModel`.
        repo_id: `USER/REPO`; a name alone belongs to the user of the token. Created if it does not exist.
        private: whether a new repository is private; None is the user's default on the Hub. If True, an existing
            public repository is refused.
        revision: the branch to commit to; created from the main branch if it does not exist.
        create_pr: whether to open a pull request instead of committing.
        with_masks: whether to upload masks and pruning state, to resume training from the Hub.
        also: additional files of the same commit, path on the Hub -> file.
        message: the commit message.
        token: used instead of the token that the user is logged in with.
        include: names, or patterns such as `*.csv`, of further files of the folder to upload, relative to it.
        show: called with the plan before anything is uploaded.
        say: called with a line for each step.

    Raises:
        ReportError, RecordError, StaleRecordError, CardError: if the folder cannot be pushed; nothing was uploaded.
        PushError: if the Hub refuses the push or it fails; the message says what is on the Hub.
    """
    if create_pr and revision is not None:
        raise PushError("revision", f"must not be set with a pull request, which has its own, got {revision!r}")
    api = api_of(token)
    plan, remote = _prepare(api, folder, repo_id, private, revision, with_masks, also or {}, token, include)
    repo_id = plan.repo_id
    operations = operations_of(plan)
    show(plan)
    _write_card(Path(folder), plan, say)
    if remote.head is None:
        with explained(f"{repo_id} could not be created, and nothing was uploaded", token):
            api.create_repo(repo_id, private=private, exist_ok=True)
        say(f"Created the repository {repo_id}")
    if revision is not None and not remote.has_branch:
        with explained(f"The branch {revision} could not be created in {repo_id}, and nothing was uploaded", token):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        say(f"Created the branch {revision}")
    if remote.head is None or not remote.has_branch:
        _, remote = _read(api, repo_id, revision, token)
    there = pull_request_with(api, plan, token) if create_pr else None
    if there is not None:
        say(f"Nothing to upload: {there.pr_revision} has all files already")
        commit = there
    elif not plan.changed and not plan.removed:
        say("Nothing to upload: the Hub has all files already")
        commit = commit_of(api, plan, str(remote.head), message)
    else:
        say(f"Uploading {files_in_words(len(plan.changed))} to {repo_id}")
        commit = commit_changes(api, plan, operations, remote, revision, create_pr, message, token)
    check_commit(api, plan, commit, token)
    say(f"Verified on the Hub: {files_in_words(len(plan.files))}")
    if not create_pr:
        card = content_of(plan.files[CARD_NAME]).decode()
        _remember(Path(folder), _Pushed(repo_id, revision, commit.oid, card))
    return PushResult(plan, commit)


def _prepare(
    api: HfApi,
    folder: str | os.PathLike,
    repo_id: str,
    private: bool | None,
    revision: str | None,
    with_masks: bool,
    also: Mapping[str, Path],
    token: str | None,
    include: Collection[str],
) -> tuple[PushPlan, Remote]:
    """Read the repository, plan the push, and let the Hub validate the card: nothing is written, here or there."""
    repo_id, remote = _look(api, repo_id, private, revision, token)
    pushed = _card_pushed_before(api, Path(folder), repo_id, revision, token)
    plan = make_push_plan(folder, repo_id, remote, with_masks, also, pushed, include)
    validate_card(api, plan, token)
    return plan, remote


def _write_card(folder: Path, plan: PushPlan, say: Callable[[str], None]) -> None:
    try:
        write_files(folder, {name: content for name, content in plan.files.items() if isinstance(content, bytes)})
    except OSError as error:
        say(f"The card is uploaded, but not saved here: {folder} is not writable ({one_line(error)})")


@dataclass(frozen=True)
class _Pushed:
    """The card that was last pushed from a folder, and where to: differences from it are later changes."""

    repo_id: str
    revision: str | None
    commit: str
    card: str


def _remember(folder: Path, pushed: _Pushed) -> None:
    with contextlib.suppress(OSError):  # a read-only folder: later merges keep both cards
        write_file(folder / _PUSHED_NAME, json.dumps(asdict(pushed)).encode())


def _card_pushed_before(api: HfApi, folder: Path, repo_id: str, revision: str | None, token: str | None) -> str | None:
    """The card that was last pushed from the folder to this branch; None if that commit no longer exists."""
    try:
        pushed = _Pushed(**read_json(folder / _PUSHED_NAME))
    except (OSError, ValueError, TypeError):
        return None
    texts = isinstance(pushed.commit, str) and isinstance(pushed.card, str)
    if not texts or (pushed.repo_id, pushed.revision) != (repo_id, revision):
        return None
    with explained(f"{repo_id} could not be read, and nothing was uploaded", token):
        try:
            api.model_info(repo_id, revision=pushed.commit)
        except (RevisionNotFoundError, RepositoryNotFoundError):
            return None
    return pushed.card


def plan_push(
    folder: str | os.PathLike,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    with_masks: bool = False,
    token: str | None = None,
    include: Collection[str] = (),
    also: Mapping[str, Path] | None = None,
) -> PushPlan:
    """What `push_model` would do; nothing is written, here or on the Hub. Raises as `push_model` does."""
    return _prepare(api_of(token), folder, repo_id, private, revision, with_masks, also or {}, token, include)[0]


def check_push(
    repo_id: str, private: bool | None = None, revision: str | None = None, token: str | None = None
) -> None:
    """Ask the Hub whether a push may be made later: for the name, the login and the right to write there.

    Nothing is written there. Raises PushError, which says what to do.
    """
    api = api_of(token)
    repo_id, remote = _look(api, repo_id, private, revision, token)
    with explained(f"{repo_id} cannot be pushed to", token):
        if remote.head is not None:
            api.auth_check(repo_id, write=True)
            return
        user = api.whoami()
    why = why_not_created(repo_id.split("/")[0], user)
    if why is not None:
        raise PushError(f"{repo_id} cannot be created: {why}")


def why_not_created(owner: str, user: dict[str, Any]) -> str | None:
    """Why a user, as `whoami` describes it, may not create a repository of an owner; None if nothing forbids it."""
    token = (user.get("auth") or {}).get("accessToken") or {}
    roles = {org["name"].lower(): org.get("roleInOrg") for org in user.get("orgs") or []}
    if token.get("role") == "read":
        return "the token permits only reading; use one with write access"
    if owner.lower() not in (user["name"].lower(), *roles):
        return f"{owner} is neither {user['name']}, the user of the token, nor one of its organizations"
    if roles.get(owner.lower()) == "read":
        return f"{user['name']} may only read what belongs to {owner}; its administrators grant write access"
    scopes = (token.get("fineGrained") or {}).get("scoped") or []
    rights = [scope["permissions"] for scope in scopes if scope["entity"].get("name", "").lower() == owner.lower()]
    if token.get("role") == "fineGrained" and not any("repo.write" in one for one in rights):
        return f"the token permits no writing to repositories of {owner}; permit it, or use another"
    return None


# ---- What is on the Hub ----


def _look(
    api: HfApi, repo_id: str, private: bool | None, revision: str | None, token: str | None
) -> tuple[str, Remote]:
    """The full name of a repository, and its files and card, if it exists.

    Raises PushError for a name that cannot be one of a repository or a branch, and for a public repository if a private
    one is requested.
    """
    if revision is not None and not _BRANCH.fullmatch(revision):
        raise PushError("revision", f"expected the name of a branch, got {revision!r}")
    repo_id, remote = _read(api, repo_id, revision, token)
    if revision is not None and revision.startswith("refs/") and not remote.has_branch:
        raise PushError("revision", f"{revision!r} does not exist in {repo_id}; give the name of a branch")
    if private and remote.is_private is False:
        raise PushError(
            f"{repo_id}: a private repository was requested, but it exists and is public; nothing was uploaded. Make "
            "it private in its settings on the Hub, or push without requesting a private one."
        )
    return repo_id, remote


def full_name(api: HfApi, repo_id: str, token: str | None, key: str = "repo") -> str:
    """A repository's name with that of its owner. Raises PushError for what cannot be a name, by the key."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PushError(key, f"expected USER/REPO, the name of a repository on the Hub: {error}") from error
    with explained(f"{repo_id} could not be read, and nothing was uploaded", token):
        return repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"


def _read(api: HfApi, repo_id: str, revision: str | None, token: str | None) -> tuple[str, Remote]:
    repo_id = full_name(api, repo_id, token)
    with explained(f"{repo_id} could not be read, and nothing was uploaded", token):
        try:
            return repo_id, _remote(api, repo_id, revision, has_branch=True)
        except GatedRepoError:
            raise
        except RevisionNotFoundError:
            return repo_id, _remote(api, repo_id, None, has_branch=False)
        except RepositoryNotFoundError:
            api.whoami()  # an invalid token looks like a repository that does not exist
            return repo_id, NOTHING_THERE


def _remote(api: HfApi, repo_id: str, revision: str | None, has_branch: bool) -> Remote:
    info = api.model_info(repo_id, revision=revision)
    head = str(info.sha)
    files = files_of(api, repo_id, head)
    card = None
    if CARD_NAME in files:
        text = _download(api, repo_id, CARD_NAME, head)
        figures = _download(api, repo_id, FIGURES_NAME, head) if FIGURES_NAME in files else None
        card = Existing(text, metadata_in(figures))
    return Remote(head, files, has_branch, card, info.private)


def _download(api: HfApi, repo_id: str, name: str, revision: str) -> str:
    return Path(api.hf_hub_download(repo_id, name, revision=revision)).read_text(encoding="utf-8-sig")
