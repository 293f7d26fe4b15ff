"""The pusher: a saved model's folder -> one commit on the Hub, read back and compared.

Order of a push, and what a failure at each point leaves behind:

    look at the Hub        read only: the repository's files and card
    count, make the card   on disk, from the saved files; measurements of other weights are refused
    validate the card      by the Hub
    ---- a dry run ends here; nothing was written so far ----
    create repository      if it is not there; and the branch that --revision names
    commit                 large files first, then all files in one commit: all of them are there, or none
    read back              sizes and hashes of every file
"""

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

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

from ..errors import PushError, one_line
from .card import CARD_NAME, metadata_in, write_files
from .card_merge import Existing
from .hub_errors import HUB_ERRORS, explain_error, explained, may_pass
from .push_plan import NOTHING_THERE, PushPlan, Remote, RemoteFile, content_of, differences, make_push_plan
from .sparsity_json import FIGURES_NAME

_PUSHED_NAME = ".pushed_card.json"

# How many of the last pull requests are looked at.
_PULL_REQUESTS = 5


@dataclass(frozen=True)
class PushResult:
    """What was pushed, and the commit that the Hub holds it in."""

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
    show: Callable[[PushPlan], None] = lambda plan: None,
    say: Callable[[str], None] = lambda text: None,
) -> PushResult:
    """Push a saved model with a card made from what was measured, in one commit, and check what the Hub then holds.

    Args:
        folder: the saved model, with its `run_record.json` if it was trained with `PruningTrainer`: a path, or a
            `SavedModel` that has been read already.
        repo_id: `USER/REPO`; a name alone is one of the user whose token it is. Made if it is not there.
        private: whether a repository that is made is private; None is the user's own default on the Hub. A public one
            that is there already is refused if this is True.
        revision: the branch to commit to; made from the main branch if it is not there.
        create_pr: whether the commit is a pull request.
        with_masks: whether masks and the pruning state go with it, to resume training from there.
        also: more files of the same commit, path on the Hub -> file.
        message: of the commit.
        token: to be used in place of the one that the user is logged in with.
        show: called with the plan before anything is sent.
        say: called with a line for each step.

    Raises:
        ReportError, RecordError, StaleRecordError, CardError: what is in the folder cannot be pushed; nothing was sent.
        PushError: the Hub did not take it; the message says what is and is not there.
    """
    if create_pr and revision is not None:
        raise PushError("revision", f"expected none for a pull request, which makes its own, got {revision!r}")
    api = _api(token)
    plan, remote = _prepare(api, folder, repo_id, private, revision, with_masks, also or {}, token)
    repo_id = plan.repo_id
    show(plan)
    _write_card(Path(folder), plan, say)
    if remote.head is None:
        with explained(f"{repo_id} could not be made, and nothing was sent", token):
            api.create_repo(repo_id, private=private, exist_ok=True)
        say(f"Made the repository {repo_id}")
    if revision is not None and not remote.has_branch:
        with explained(f"The branch {revision} could not be made in {repo_id}, and nothing was sent", token):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        say(f"Made the branch {revision}")
    if remote.head is None or not remote.has_branch:
        _, remote = _look(api, repo_id, revision, token)
    there = _pull_request_with(api, plan, token) if create_pr else None
    if there is not None:
        say(f"{there.pr_revision} holds all of it already")
        commit = there
    elif not plan.changed and not plan.removed:
        say("The Hub holds all of it already")
        commit = _commit_of(api, repo_id, str(remote.head), message)
    else:
        say(f"Sending {_files(len(plan.changed))} to {repo_id}")
        commit = _commit(api, plan, remote, revision, create_pr, message, token)
    _check(api, plan, commit, token)
    say(f"Read back: {_files(len(plan.files))} as they are here")
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
) -> tuple[PushPlan, Remote]:
    """Look at the Hub, plan, and let the Hub look at the card: nothing is written, here or there."""
    repo_id, remote = _look(api, repo_id, revision, token)
    if private and remote.is_private is False:
        raise PushError(
            f"{repo_id}: expected a private repository, it is there and public; nothing was sent. Make it private "
            "in its settings on the Hub, or push without asking for that."
        )
    pushed = _card_pushed_before(api, Path(folder), repo_id, revision, token)
    plan = make_push_plan(folder, repo_id, remote, with_masks, also, pushed)
    _validate_card(api, plan, token)
    return plan, remote


def _write_card(folder: Path, plan: PushPlan, say: Callable[[str], None]) -> None:
    try:
        write_files(folder, {name: content for name, content in plan.files.items() if isinstance(content, bytes)})
    except OSError as error:
        say(f"The card goes to the Hub only: {folder} cannot be written to ({one_line(error)})")


@dataclass(frozen=True)
class _Pushed:
    """The card as it was last pushed from a folder, and where to: what differs from it was changed since."""

    repo_id: str
    revision: str | None
    commit: str
    card: str


def _remember(folder: Path, pushed: _Pushed) -> None:
    with contextlib.suppress(OSError):  # a folder that cannot be written to: both sides will be kept whole
        (folder / _PUSHED_NAME).write_text(json.dumps(asdict(pushed)), encoding="utf-8")


def _card_pushed_before(api: HfApi, folder: Path, repo_id: str, revision: str | None, token: str | None) -> str | None:
    """The card as it was last pushed from the folder to this branch; None if that commit is not there any more."""
    try:
        pushed = _Pushed(**json.loads((folder / _PUSHED_NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    if (pushed.repo_id, pushed.revision) != (repo_id, revision):
        return None
    with explained(f"{repo_id} could not be looked at, and nothing was sent", token):
        try:
            api.model_info(repo_id, revision=pushed.commit)
        except (RevisionNotFoundError, RepositoryNotFoundError):
            return None
    return pushed.card


def _validate_card(api: HfApi, plan: PushPlan, token: str | None) -> None:
    """Let the Hub look at the card's metadata before anything is made there."""
    # Not ModelCard.validate: before 2.2 it asks one Hub only, whatever HF_ENDPOINT says.
    refused = f"The card was not taken by the Hub, and nothing was sent to {plan.repo_id}"
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
) -> PushPlan:
    """What `push_model` would do, with nothing written, here or on the Hub. Raises as it does."""
    return _prepare(_api(token), folder, repo_id, private, revision, with_masks, {}, token)[0]


# ---- What is on the Hub ----


def _api(token: str | None) -> HfApi:
    return HfApi(token=token, library_name="hf-prune", library_version=version("hf-prune"))


def _look(api: HfApi, repo_id: str, revision: str | None, token: str | None) -> tuple[str, Remote]:
    """The whole name of a repository, and its files and card, where it is there."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PushError(f"{repo_id!r}: expected USER/REPO, the name of a repository on the Hub: {error}") from error
    with explained(f"{repo_id} could not be looked at, and nothing was sent", token):
        if "/" not in repo_id:
            repo_id = f"{api.whoami()['name']}/{repo_id}"
        try:
            return repo_id, _remote(api, repo_id, revision, has_branch=True)
        except GatedRepoError:
            raise
        except RevisionNotFoundError:
            return repo_id, _remote(api, repo_id, None, has_branch=False)
        except RepositoryNotFoundError:
            api.whoami()  # a token that the Hub does not know looks like a repository that is not there
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
    """A commit that holds everything already."""
    return CommitInfo(
        commit_url=f"{api.endpoint}/{repo_id}/commit/{oid}",
        commit_message=message,
        commit_description="",
        oid=oid,
        pr_url=pr_url,
        _endpoint=api.endpoint,
    )


def _pull_request_with(api: HfApi, plan: PushPlan, token: str | None) -> CommitInfo | None:
    """The newest pull request that holds all of a plan, or None. So one whose answer was lost is not made twice."""
    with explained(f"The pull requests of {plan.repo_id} could not be looked at, and nothing was sent", token):
        found = api.list_repo_refs(plan.repo_id, include_pull_requests=True).pull_requests or []
        numbered = sorted(((int(ref.ref.rsplit("/", 1)[-1]), ref) for ref in found), key=lambda pair: -pair[0])
        for number, ref in numbered[:_PULL_REQUESTS]:
            if not differences(plan, _files_of(api, plan.repo_id, ref.target_commit)):
                url = f"{api.endpoint}/{plan.repo_id}/discussions/{number}"
                return _commit_of(api, plan.repo_id, ref.target_commit, ref.ref, url)
    return None


def _commit(
    api: HfApi,
    plan: PushPlan,
    remote: Remote,
    revision: str | None,
    create_pr: bool,
    message: str,
    token: str | None,
) -> CommitInfo:
    """All changes in one commit on top of the one that was looked at."""
    additions = [CommitOperationAdd(name, _as_sent(plan.files[name])) for name in plan.changed]
    deletions = [CommitOperationDelete(name) for name in plan.removed]
    try:
        return api.create_commit(
            plan.repo_id,
            [*additions, *deletions],
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
    """What the Hub holds after a commit that failed, looked up, and what to do."""
    advice = " Run the same again: what was uploaded already is not sent twice." if again else ""
    try:
        there = _pull_request_with(api, plan, None) if create_pr else None
        if there is not None:
            return f"On the Hub: {there.pr_revision} of {plan.repo_id} holds all of it; its answer was lost."
        head = str(api.model_info(plan.repo_id, revision=revision).sha)
        files = _files_of(api, plan.repo_id, head)
    except HUB_ERRORS as error:
        return f"What {plan.repo_id} holds now could not be read ({type(error).__name__}).{advice}"
    wrong = differences(plan, files)
    if not wrong and not create_pr:
        return (
            f"On the Hub: all {_files(len(plan.files))} as they are here, in commit {head[:12]}; the commit was made "
            "and its answer lost. Run the same again to make sure: it will find nothing to send."
        )
    if head == before.head:
        return f"On the Hub: {plan.repo_id} is as it was, in commit {head[:12]}; nothing of this push is in it.{advice}"
    return (
        f"On the Hub: somebody else's commit {head[:12]} in {plan.repo_id}; of this push are missing or different: "
        f"{', '.join(wrong)}.{advice}"
    )


def _check(api: HfApi, plan: PushPlan, commit: CommitInfo, token: str | None) -> None:
    """Read the commit back and compare sizes and hashes. Raises PushError if anything is not as it was sent."""
    with explained(f"All files were sent to {plan.repo_id}, but could not be read back", token):
        wrong = differences(plan, _files_of(api, plan.repo_id, commit.oid))
    if wrong:
        raise PushError(
            f"{plan.repo_id}: expected what was sent in commit {commit.oid[:12]}, found otherwise: {', '.join(wrong)}. "
            "Was the folder changed meanwhile? Run the same again."
        )


def _as_sent(content: Path | bytes) -> str | bytes:
    return content if isinstance(content, bytes) else str(content)
