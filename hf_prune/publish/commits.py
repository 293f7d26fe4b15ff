"""One commit on the Hub: the files that are there, the changes, and the same files read back.

A plan's `repo_type` says whether the repository is that of a model or a Space.
"""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from ..errors import PushError
from .card import CARD_NAME
from .hub_errors import HUB_ERRORS, explain_error, explained, may_pass
from .push_plan import PushPlan, Remote, RemoteFile, content_of, differences

# How many of the last pull requests are compared.
_PULL_REQUESTS = 5


def api_of(token: str | None) -> HfApi:
    """The client, with this token or the one that the user is logged in with."""
    return HfApi(token=token, library_name="hf-prune", library_version=version("hf-prune"))


def files_in_words(number: int) -> str:
    """`1 file`, `2 files`."""
    return f"{number} file{'' if number == 1 else 's'}"


def validate_card(api: HfApi, plan: PushPlan, token: str | None) -> None:
    """Let the Hub validate the card's metadata before anything is written there."""
    # Not ModelCard.validate: before 2.2 it ignores HF_ENDPOINT.
    refused = f"The Hub refused the card, and nothing was uploaded to {plan.repo_id}"
    with explained(refused, token):
        body = {"repoType": plan.repo_type, "content": content_of(plan.files[CARD_NAME]).decode()}
        headers = build_hf_headers(token=token)
        response = get_session().post(f"{api.endpoint}/api/validate-yaml", json=body, headers=headers)
        if response.status_code != 400:
            hf_raise_for_status(response)
            return
        problems = "; ".join(problem["message"] for problem in response.json()["errors"])
    raise PushError(f"{refused}: {problems}")


def files_of(api: HfApi, repo_id: str, revision: str, repo_type: str = "model") -> dict[str, RemoteFile]:
    """The files of a repository at a revision, by their paths."""
    try:
        entries = list(api.list_repo_tree(repo_id, recursive=True, revision=revision, repo_type=repo_type))
    except EntryNotFoundError:  # a repository without any file
        return {}
    return {
        entry.path: RemoteFile(entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id, entry.lfs is not None)
        for entry in entries
        if isinstance(entry, RepoFile)
    }


def address_of(api: HfApi, plan: PushPlan) -> str:
    """The address of a plan's repository on the Hub."""
    return f"{api.endpoint}/{'spaces/' if plan.repo_type == 'space' else ''}{plan.repo_id}"


def commit_of(api: HfApi, plan: PushPlan, oid: str, message: str, pr_url: str | None = None) -> CommitInfo:
    """A commit that has all files already."""
    return CommitInfo(
        commit_url=f"{address_of(api, plan)}/commit/{oid}",
        commit_message=message,
        commit_description="",
        oid=oid,
        pr_url=pr_url,
        _endpoint=api.endpoint,
    )


def pull_request_with(api: HfApi, plan: PushPlan, token: str | None) -> CommitInfo | None:
    """The newest pull request that has all files of a plan, or None: if its response was lost, it is not made twice."""
    with explained(f"The pull requests of {plan.repo_id} could not be read, and nothing was uploaded", token):
        found = api.list_repo_refs(plan.repo_id, include_pull_requests=True).pull_requests or []
        numbered = sorted(((int(ref.ref.rsplit("/", 1)[-1]), ref) for ref in found), key=lambda pair: -pair[0])
        for number, ref in numbered[:_PULL_REQUESTS]:
            if not differences(plan, files_of(api, plan.repo_id, ref.target_commit)):
                url = f"{api.endpoint}/{plan.repo_id}/discussions/{number}"
                return commit_of(api, plan, ref.target_commit, ref.ref, url)
    return None


def operations_of(plan: PushPlan) -> list[CommitOperationAdd | CommitOperationDelete]:
    """The changes of a commit; the client checks names here, and reads each file that is added."""
    additions = [CommitOperationAdd(name, _as_sent(plan.files[name])) for name in plan.changed]
    return [*additions, *(CommitOperationDelete(name) for name in plan.removed)]


def commit_changes(
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
            repo_type=plan.repo_type,
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
        there = pull_request_with(api, plan, None) if create_pr else None
        if there is not None:
            return f"On the Hub: {there.pr_revision} of {plan.repo_id} has all files; only the Hub's response was lost."
        head = str(api.repo_info(plan.repo_id, revision=revision, repo_type=plan.repo_type).sha)
        files = files_of(api, plan.repo_id, head, plan.repo_type)
    except HUB_ERRORS as error:
        return f"The present files of {plan.repo_id} could not be read ({type(error).__name__}).{advice}"
    wrong = differences(plan, files)
    if not wrong and not create_pr:
        return (
            f"On the Hub: commit {head[:12]} has all {files_in_words(len(plan.files))}; it was made, and only the "
            "Hub's response was lost. Push again to make sure: there will be nothing to upload."
        )
    if head == before.head:
        return f"On the Hub: {plan.repo_id} is unchanged, at commit {head[:12]}; it has nothing of this push.{advice}"
    return (
        f"On the Hub: {plan.repo_id} is at somebody else's commit {head[:12]}; missing or different files of this "
        f"push: {', '.join(wrong)}.{advice}"
    )


def check_commit(api: HfApi, plan: PushPlan, commit: CommitInfo, token: str | None) -> None:
    """Read the commit back and compare sizes and hashes. Raises PushError if a file differs."""
    with explained(f"All files were uploaded to {plan.repo_id}, but could not be read back", token):
        wrong = differences(plan, files_of(api, plan.repo_id, commit.oid, plan.repo_type))
    if wrong:
        raise PushError(
            f"{plan.repo_id}: files in commit {commit.oid[:12]} differ from those here: {', '.join(wrong)}. Was the "
            "folder changed during the push? Push again."
        )


def _as_sent(content: Path | bytes) -> str | bytes:
    return content if isinstance(content, bytes) else str(content)
