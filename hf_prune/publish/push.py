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
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, validate_repo_id

from ..config.safe_json import read_json
from ..errors import PushError, one_line
from ..saved.files import write_file
from .card import CARD_NAME, metadata_in, write_files
from .card_merge import Existing
from .hub_errors import HUB_ERRORS, explain_error, explained, may_pass
from .push_plan import NOTHING_THERE, PushPlan, Remote, RemoteFile, content_of, differences, make_push_plan
from .sparsity_json import FIGURES_NAME

_PUSHED_NAME = ".pushed_card.json"

# What git allows in the name of a branch, roughly.
_BRANCH = re.compile(r"(?![-/.])(?!.*(?://|\.\.|@\{|/\.))[^\s~^:?*\[\\]+(?<![/.])(?<!\.lock)")

# How many of the last pull requests are compared.
_PULL_REQUESTS = 5


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
    api = _api(token)
    plan, remote = _prepare(api, folder, repo_id, private, revision, with_masks, also or {}, token, include)
    repo_id = plan.repo_id
    operations = _operations(plan)
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
    there = _pull_request_with(api, plan, token) if create_pr else None
    if there is not None:
        say(f"Nothing to upload: {there.pr_revision} has all files already")
        commit = there
    elif not plan.changed and not plan.removed:
        say("Nothing to upload: the Hub has all files already")
        commit = _commit_of(api, repo_id, str(remote.head), message)
    else:
        say(f"Uploading {_files(len(plan.changed))} to {repo_id}")
        commit = _commit(api, plan, operations, remote, revision, create_pr, message, token)
    _check(api, plan, commit, token)
    say(f"Verified on the Hub: {_files(len(plan.files))}")
    if not create_pr:
        card = content_of(plan.files[CARD_NAME]).decode()
        _remember(Path(folder), _Pushed(repo_id, revision, commit.oid, card))
    return PushResult(plan, commit)


def _files(number: int) -> str:
    return f"{number} file{'' if number == 1 else 's'}"


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
    _validate_card(api, plan, token)
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


def _validate_card(api: HfApi, plan: PushPlan, token: str | None) -> None:
    """Let the Hub validate the card's metadata before anything is written there."""
    # Not ModelCard.validate: before 2.2 it ignores HF_ENDPOINT.
    refused = f"The Hub refused the card, and nothing was uploaded to {plan.repo_id}"
    with explained(refused, token):
        body = {"repoType": "model", "content": content_of(plan.files[CARD_NAME]).decode()}
        headers = build_hf_headers(token=token)
        response = get_session().post(f"{api.endpoint}/api/validate-yaml", json=body, headers=headers)
        if response.status_code != 400:
            hf_raise_for_status(response)
            return
        problems = "; ".join(problem["message"] for problem in response.json()["errors"])
    raise PushError(f"{refused}: {problems}")


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
    return _prepare(_api(token), folder, repo_id, private, revision, with_masks, also or {}, token, include)[0]


def check_push(
    repo_id: str, private: bool | None = None, revision: str | None = None, token: str | None = None
) -> None:
    """Ask the Hub whether a push may be made later: for the name, the login and the right to write there.

    Nothing is written there. Raises PushError, which says what to do.
    """
    api = _api(token)
    repo_id, remote = _look(api, repo_id, private, revision, token)
    with explained(f"{repo_id} cannot be pushed to", token):
        if remote.head is not None:
            api.auth_check(repo_id, write=True)
            return
        user = api.whoami()
    why = _why_not_created(repo_id.split("/")[0], user)
    if why is not None:
        raise PushError(f"{repo_id} cannot be created: {why}")


def _why_not_created(owner: str, user: dict[str, Any]) -> str | None:
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


def _api(token: str | None) -> HfApi:
    return HfApi(token=token, library_name="hf-prune", library_version=version("hf-prune"))


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


def _read(api: HfApi, repo_id: str, revision: str | None, token: str | None) -> tuple[str, Remote]:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PushError("repo", f"expected USER/REPO, the name of a repository on the Hub: {error}") from error
    with explained(f"{repo_id} could not be read, and nothing was uploaded", token):
        if "/" not in repo_id:
            repo_id = f"{api.whoami()['name']}/{repo_id}"
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
    files = _files_of(api, repo_id, head)
    card = None
    if CARD_NAME in files:
        text = _download(api, repo_id, CARD_NAME, head)
        figures = _download(api, repo_id, FIGURES_NAME, head) if FIGURES_NAME in files else None
        card = Existing(text, metadata_in(figures))
    return Remote(head, files, has_branch, card, info.private)


def _download(api: HfApi, repo_id: str, name: str, revision: str) -> str:
    return Path(api.hf_hub_download(repo_id, name, revision=revision)).read_text(encoding="utf-8-sig")


def _files_of(api: HfApi, repo_id: str, revision: str) -> dict[str, RemoteFile]:
    try:
        entries = list(api.list_repo_tree(repo_id, recursive=True, revision=revision))
    except EntryNotFoundError:  # a repository without any file
        return {}
    return {
        entry.path: RemoteFile(entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id, entry.lfs is not None)
        for entry in entries
        if isinstance(entry, RepoFile)
    }


def _commit_of(api: HfApi, repo_id: str, oid: str, message: str, pr_url: str | None = None) -> CommitInfo:
    """A commit that has all files already."""
    return CommitInfo(
        commit_url=f"{api.endpoint}/{repo_id}/commit/{oid}",
        commit_message=message,
        commit_description="",
        oid=oid,
        pr_url=pr_url,
        _endpoint=api.endpoint,
    )


def _pull_request_with(api: HfApi, plan: PushPlan, token: str | None) -> CommitInfo | None:
    """The newest pull request that has all files of a plan, or None: if its response was lost, it is not made twice."""
    with explained(f"The pull requests of {plan.repo_id} could not be read, and nothing was uploaded", token):
        found = api.list_repo_refs(plan.repo_id, include_pull_requests=True).pull_requests or []
        numbered = sorted(((int(ref.ref.rsplit("/", 1)[-1]), ref) for ref in found), key=lambda pair: -pair[0])
        for number, ref in numbered[:_PULL_REQUESTS]:
            if not differences(plan, _files_of(api, plan.repo_id, ref.target_commit)):
                url = f"{api.endpoint}/{plan.repo_id}/discussions/{number}"
                return _commit_of(api, plan.repo_id, ref.target_commit, ref.ref, url)
    return None


def _operations(plan: PushPlan) -> list[CommitOperationAdd | CommitOperationDelete]:
    """The changes of a commit; the client checks names here, and reads each file that is added."""
    additions = [CommitOperationAdd(name, _as_sent(plan.files[name])) for name in plan.changed]
    return [*additions, *(CommitOperationDelete(name) for name in plan.removed)]


def _commit(
    api: HfApi,
    plan: PushPlan,
    operations: Sequence[CommitOperationAdd | CommitOperationDelete],
    remote: Remote,
    revision: str | None,
    create_pr: bool,
    message: str,
    token: str | None,
) -> CommitInfo:
    """All changes in one commit on top of the one that was read."""
    try:
        return api.create_commit(
            plan.repo_id,
            operations,
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=remote.head,
        )
    except HUB_ERRORS as error:
        there = _what_is_there(api, plan, remote, revision, create_pr, again=may_pass(error))
        raise PushError(f"The push to {plan.repo_id} failed: {explain_error(error, token)}\n{there}") from error


def _what_is_there(
    api: HfApi, plan: PushPlan, before: Remote, revision: str | None, create_pr: bool, again: bool
) -> str:
    """What is on the Hub after a failed commit, and what to do."""
    advice = " Push again: files that were uploaded are not uploaded twice." if again else ""
    try:
        there = _pull_request_with(api, plan, None) if create_pr else None
        if there is not None:
            return f"On the Hub: {there.pr_revision} of {plan.repo_id} has all files; only the Hub's response was lost."
        head = str(api.model_info(plan.repo_id, revision=revision).sha)
        files = _files_of(api, plan.repo_id, head)
    except HUB_ERRORS as error:
        return f"The present files of {plan.repo_id} could not be read ({type(error).__name__}).{advice}"
    wrong = differences(plan, files)
    if not wrong and not create_pr:
        return (
            f"On the Hub: commit {head[:12]} has all {_files(len(plan.files))}; it was made, and only the Hub's "
            "response was lost. Push again to make sure: there will be nothing to upload."
        )
    if head == before.head:
        return f"On the Hub: {plan.repo_id} is unchanged, at commit {head[:12]}; it has nothing of this push.{advice}"
    return (
        f"On the Hub: {plan.repo_id} is at somebody else's commit {head[:12]}; missing or different files of this "
        f"push: {', '.join(wrong)}.{advice}"
    )


def _check(api: HfApi, plan: PushPlan, commit: CommitInfo, token: str | None) -> None:
    """Read the commit back and compare sizes and hashes. Raises PushError if a file differs."""
    with explained(f"All files were uploaded to {plan.repo_id}, but could not be read back", token):
        wrong = differences(plan, _files_of(api, plan.repo_id, commit.oid))
    if wrong:
        raise PushError(
            f"{plan.repo_id}: files in commit {commit.oid[:12]} differ from those here: {', '.join(wrong)}. Was the "
            "folder changed during the push? Push again."
        )


def _as_sent(content: Path | bytes) -> str | bytes:
    return content if isinstance(content, bytes) else str(content)
