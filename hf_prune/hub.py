"""The pusher: a saved model's folder -> one commit on the Hub, read back and compared.

Order of a push, and what a failure at each point leaves behind:

    look at the Hub        read only: the repository's files and card
    count, make the card   on disk, from the saved files; measurements of other weights are refused
    validate the card      by the Hub
    ---- a dry run ends here ----
    create repository      if it is not there; and the branch that --revision names
    commit                 large files first, then all files in one commit: all of them are there, or none
    read back              sizes and hashes of every file
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, validate_repo_id

from .card import ASSETS_FOLDER, CARD_NAME, LAYERS_NAME, SCHEDULE_NAME, make_files, read_card, write_files
from .figures import FIGURES_NAME, Figures
from .mask_files import MASKS_NAME, STATE_NAME
from .messages import one_line
from .record import RECORD_NAME, SavedFile
from .report import weight_files

_MASK_FILES = (MASKS_NAME, STATE_NAME)

# What a model is made of, beside its weights: configuration, vocabularies, code of its own, and who made it.
_SUFFIXES = (".json", ".jinja", ".model", ".py", ".spm", ".tiktoken", ".txt")
_DOCUMENTS = ("LICENSE", "NOTICE", "CITATION")
_STATE_OF_TRAINING = ("trainer_state.json", "training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")

# Files of an earlier push that would be wrong beside the new ones: weights under other names, masks, our own pictures.
_REPLACED = re.compile(
    r"(model|adapter_model)[\w.-]*\.safetensors(\.index\.json)?|pytorch_model[\w.-]*\.bin(\.index\.json)?"
    rf"|{re.escape(MASKS_NAME)}|{re.escape(STATE_NAME)}|{re.escape(RECORD_NAME)}|{re.escape(LAYERS_NAME)}|{re.escape(SCHEDULE_NAME)}"
)

# What the client raises for a connection that fails: its HTTP library's own base class.
_TransportError: type[Exception] = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
_HUB_ERRORS: tuple[type[Exception], ...] = (_TransportError, OSError, RuntimeError, ValueError)


class PushError(RuntimeError):
    """A push that did not come to its end: why, what is and is not on the Hub, and what to do."""


@dataclass(frozen=True)
class RemoteFile:
    """A file on the Hub: its size, and its SHA-256 if it is a large one, or else its hash in git."""

    size: int
    digest: str
    is_large: bool


@dataclass(frozen=True)
class Remote:
    """A repository as it was seen: None for what is not there."""

    head: str | None
    files: dict[str, RemoteFile]
    has_branch: bool
    card: str | None
    is_private: bool | None


NOTHING_THERE = Remote(head=None, files={}, has_branch=False, card=None, is_private=None)


@dataclass(frozen=True)
class PushPlan:
    """What a push sends: path -> file or content; what it leaves out, with the reason; and what it takes away.

    `weights` are the files of weights as they were when zeros were counted.
    """

    repo_id: str
    files: dict[str, Path | bytes]
    weights: dict[str, SavedFile]
    left_out: dict[str, str]
    changed: list[str]
    removed: list[str]
    is_new: bool
    sparsity: float

    def size_of(self, name: str) -> int:
        """Bytes of a file."""
        content = self.files[name]
        return len(content) if isinstance(content, bytes) else content.stat().st_size


@dataclass(frozen=True)
class PushResult:
    """What was pushed, and the commit that the Hub holds it in."""

    plan: PushPlan
    commit: CommitInfo


def push_model(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    with_masks: bool = False,
    message: str = "Upload pruned model",
    token: str | None = None,
    show: Callable[[PushPlan], None] = lambda plan: None,
    say: Callable[[str], None] = lambda text: None,
) -> PushResult:
    """Push a saved model with a card made from what was measured, in one commit, and check what the Hub then holds.

    Args:
        folder: the saved model, with its `run_record.json` if it was trained with `PruningTrainer`.
        repo_id: `USER/REPO`; a name alone is one of the user whose token it is. Made if it is not there.
        private: whether a repository that is made is private; None is the user's own default on the Hub. A public one
            that is there already is refused if this is True.
        revision: the branch to commit to; made from the main branch if it is not there.
        create_pr: whether the commit is a pull request.
        with_masks: whether masks and the pruning state go with it, to resume training from there.
        message: of the commit.
        token: to be used in place of the one that the user is logged in with.
        show: called with the plan before anything is sent.
        say: called with a line for each step.

    Raises:
        ReportError, RecordError, StaleRecordError, CardError: what is in the folder cannot be pushed; nothing was sent.
        PushError: the Hub did not take it; the message says what is and is not there.
    """
    if create_pr and revision is not None:
        raise PushError(f"revision: expected none for a pull request, which makes its own, got {revision!r}")
    api = _api(token)
    repo_id, remote = _look(api, repo_id, revision, token)
    if private and remote.is_private is False:
        raise PushError(
            f"{repo_id}: expected a private repository, it is there and public; nothing was sent. Make it private "
            "in its settings on the Hub, or push without asking for that."
        )
    plan = make_plan(folder, repo_id, remote, with_masks)
    show(plan)
    _validate_card(api, plan, token)
    write_files(folder, {name: content for name, content in plan.files.items() if isinstance(content, bytes)})
    if remote.head is None:
        with _explained(f"{repo_id} could not be made, and nothing was sent", token):
            api.create_repo(repo_id, private=private, exist_ok=True)
        say(f"Made the repository {repo_id}")
    if revision is not None and not remote.has_branch:
        with _explained(f"The branch {revision} could not be made in {repo_id}, and nothing was sent", token):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        say(f"Made the branch {revision}")
    if remote.head is None or not remote.has_branch:
        _, remote = _look(api, repo_id, revision, token)
    if not plan.changed and not plan.removed:
        say("The Hub holds all of it already")
        commit = _commit_of(api, repo_id, remote, message)
    else:
        say(f"Sending {len(plan.changed)} files to {repo_id}")
        commit = _commit(api, plan, remote, revision, create_pr, message, token)
    _check(api, plan, commit, token)
    say(f"Read back: {len(plan.files)} files are there as they are here")
    return PushResult(plan, commit)


def _validate_card(api: HfApi, plan: PushPlan, token: str | None) -> None:
    """Let the Hub look at the card's metadata before anything is made there."""
    # Not ModelCard.validate: before 2.2 it asks one Hub only, whatever HF_ENDPOINT says.
    refused = f"The card was not taken by the Hub, and nothing was sent to {plan.repo_id}"
    with _explained(refused, token):
        body = {"repoType": "model", "content": _content(plan.files[CARD_NAME]).decode()}
        headers = build_hf_headers(token=token)
        response = get_session().post(f"{api.endpoint}/api/validate-yaml", json=body, headers=headers)
        if response.status_code != 400:
            hf_raise_for_status(response)
            return
        problems = "; ".join(problem["message"] for problem in response.json()["errors"])
    raise PushError(f"{refused}: {problems}")


def plan_push(
    folder: str | Path,
    repo_id: str,
    revision: str | None = None,
    with_masks: bool = False,
    token: str | None = None,
) -> PushPlan:
    """What `push_model` would do, with nothing written, here or on the Hub. Raises as it does."""
    repo_id, remote = _look(_api(token), repo_id, revision, token)
    return make_plan(folder, repo_id, remote, with_masks)


def make_plan(folder: str | Path, repo_id: str, remote: Remote, with_masks: bool = False) -> PushPlan:
    """Count, make the card, choose the files, and compare them with those on the Hub. Nothing is written."""
    folder = Path(folder)
    weights = weight_files(folder)
    cards = ([remote.card] if remote.card is not None else []) + read_card(folder)
    made = make_files(folder, repo_id, existing=cards)
    chosen, left_out = choose_files(folder, [path.name for path in weights], with_masks)
    earlier = {LAYERS_NAME, SCHEDULE_NAME} - made.keys()
    files: dict[str, Path | bytes] = {name: path for name, path in chosen.items() if name not in earlier}
    files |= made
    figures = Figures.model_validate_json(made[FIGURES_NAME])
    return PushPlan(
        repo_id=repo_id,
        files=dict(sorted(files.items())),
        weights=figures.files,
        left_out=left_out,
        changed=[
            name
            for name in sorted(files)
            if not _is_there(files[name], remote.files.get(name), figures.files.get(name))
        ],
        removed=sorted(name for name in remote.files if _REPLACED.fullmatch(name) and name not in files),
        is_new=remote.head is None,
        sparsity=figures.overall_sparsity,
    )


def choose_files(folder: Path, weights: list[str], with_masks: bool) -> tuple[dict[str, Path], dict[str, str]]:
    """The files of a folder that make up the model, and why others are left out; folders are named with a slash."""
    chosen: dict[str, Path] = {}
    left_out: dict[str, str] = {}
    folders = {ASSETS_FOLDER, *_module_folders(folder)}
    for path in sorted(folder.iterdir()):
        name = path.name
        if path.is_dir():
            if name in folders:
                inside = (file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.startswith("."))
                chosen |= {file.relative_to(folder).as_posix(): file for file in inside}
            else:
                left_out[f"{name}/"] = "a folder, and not part of the model"
        elif name.startswith((".", "_")):
            left_out[name] = "hidden"
        elif name in _STATE_OF_TRAINING or name.startswith("rng_state"):
            left_out[name] = "state of the training"
        elif name in _MASK_FILES:
            if with_masks:
                chosen[name] = path
            else:
                left_out[name] = "masks, sent with --with-masks"
        elif path.suffix == ".safetensors" and name not in weights:
            left_out[name] = "not among the weights that the model loads"
        elif name in weights or name == CARD_NAME or path.suffix in _SUFFIXES or name.startswith(_DOCUMENTS):
            chosen[name] = path
        else:
            left_out[name] = "not part of the model"
    return chosen, left_out


def _module_folders(folder: Path) -> list[str]:
    """The folders of a sentence-transformers model, whose modules.json lists the modules after the first."""
    path = folder / "modules.json"
    modules = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return [module["path"] for module in modules if module.get("path")]


# ---- What is on the Hub ----


def _api(token: str | None) -> HfApi:
    return HfApi(token=token, library_name="hf-prune", library_version=version("hf-prune"))


def _look(api: HfApi, repo_id: str, revision: str | None, token: str | None) -> tuple[str, Remote]:
    """The whole name of a repository, and its files and card, where it is there."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PushError(f"{repo_id!r}: expected USER/REPO, the name of a repository on the Hub: {error}") from error
    with _explained(f"{repo_id} could not be looked at, and nothing was sent", token):
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
        path = api.hf_hub_download(repo_id, CARD_NAME, revision=head)
        card = Path(path).read_text(encoding="utf-8-sig")
    return Remote(head, files, has_branch, card, info.private)


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


def _commit_of(api: HfApi, repo_id: str, remote: Remote, message: str) -> CommitInfo:
    """The commit that holds everything already."""
    return CommitInfo(
        commit_url=f"{api.endpoint}/{repo_id}/commit/{remote.head}",
        commit_message=message,
        commit_description="",
        oid=str(remote.head),
        _endpoint=api.endpoint,
    )


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
    except _HUB_ERRORS as error:
        there = _what_is_there(api, plan, remote, revision, create_pr)
        raise PushError(f"The push to {plan.repo_id} failed: {explain_error(error, token)}\n{there}") from error


def _what_is_there(api: HfApi, plan: PushPlan, before: Remote, revision: str | None, create_pr: bool) -> str:
    """What the Hub holds after a commit that failed, looked up, and what to do."""
    again = "Run the same again: what was uploaded already is not sent twice."
    if create_pr:
        return f"Whether a pull request was made is to be seen on the Hub, in {plan.repo_id}. {again}"
    try:
        head = str(api.model_info(plan.repo_id, revision=revision).sha)
        files = _files_of(api, plan.repo_id, head)
    except _HUB_ERRORS as error:
        return f"What {plan.repo_id} holds now could not be read ({type(error).__name__}). {again}"
    wrong = _differences(plan, files)
    if not wrong:
        return (
            f"On the Hub: all {len(plan.files)} files as they are here, in commit {head[:12]}; the commit was made and "
            "its answer lost. Run the same again to make sure: it will find nothing to send."
        )
    if head == before.head:
        return f"On the Hub: {plan.repo_id} is as it was, in commit {head[:12]}; nothing of this push is in it. {again}"
    return (
        f"On the Hub: somebody else's commit {head[:12]} in {plan.repo_id}; of this push are missing or different: "
        f"{', '.join(wrong)}. {again}"
    )


def _check(api: HfApi, plan: PushPlan, commit: CommitInfo, token: str | None) -> None:
    """Read the commit back and compare sizes and hashes. Raises PushError if anything is not as it was sent."""
    with _explained(f"All files were sent to {plan.repo_id}, but could not be read back", token):
        wrong = _differences(plan, _files_of(api, plan.repo_id, commit.oid))
    if wrong:
        raise PushError(
            f"{plan.repo_id}: expected what was sent in commit {commit.oid[:12]}, found otherwise: {', '.join(wrong)}. "
            "Was the folder changed meanwhile? Run the same again."
        )


def _differences(plan: PushPlan, files: Mapping[str, RemoteFile]) -> list[str]:
    """Names of files that are not on the Hub as they are here, and of such that should have gone."""
    wrong = [
        name for name, content in plan.files.items() if not _is_there(content, files.get(name), plan.weights.get(name))
    ]
    return wrong + [name for name in plan.removed if name in files]


def _is_there(content: Path | bytes, remote: RemoteFile | None, known: SavedFile | None) -> bool:
    """Whether a file on the Hub is the same as one here, whose hash may be known from counting zeros."""
    if remote is None:
        return False
    if known is not None and remote.is_large:
        return (remote.size, remote.digest) == (known.size, known.sha256)
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    if size != remote.size:
        return False
    digest = hashlib.sha256() if remote.is_large else hashlib.sha1(f"blob {size}\0".encode())
    for piece in _pieces(content):
        digest.update(piece)
    return digest.hexdigest() == remote.digest


def _pieces(content: Path | bytes) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as file:
        while piece := file.read(1 << 20):
            yield piece


def _content(content: Path | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def _as_sent(content: Path | bytes) -> str | bytes:
    return content if isinstance(content, bytes) else str(content)


# ---- What went wrong ----


@contextlib.contextmanager
def _explained(meaning: str, token: str | None) -> Iterator[None]:
    """The client's errors become a PushError: what this means, why, and what to do."""
    try:
        yield
    except _HUB_ERRORS as error:
        raise PushError(f"{meaning}: {explain_error(error, token)}") from error


def explain_error(error: BaseException, token: str | None = None) -> str:
    """An error of the client in a line, without any token, and what to do about it."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if type(error) is RuntimeError and error.__cause__ is not None:  # the client's, around what happened to a file
        return f"{_without_secrets(one_line(error), token)} {explain_error(error.__cause__, token)}"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it to reach the Hub."
    if isinstance(error, LocalTokenNotFoundError):
        return "no token was found; log in with `hf auth login`, or set HF_TOKEN."
    text = _without_secrets(one_line(error), token)
    if isinstance(error, GatedRepoError):
        return f"access to it is restricted, and must be granted on its page ({text})"
    if status == 401 or (isinstance(error, RepositoryNotFoundError) and get_token() is None and token is None):
        return f"the Hub does not accept the token; log in with `hf auth login`, or set HF_TOKEN ({text})"
    if status == 403:
        return f"the token has no right to that; use one that may write there ({text})"
    if status == 404:
        return f"there is no such repository, or the token may not see it ({text})"
    if status in (409, 412):
        return f"the repository was changed by somebody else meanwhile ({text})"
    if status is not None and status >= 500:
        return f"the Hub is in trouble, try again later ({text})"
    if isinstance(error, _TransportError) and status is None:
        return f"the connection failed ({type(error).__name__}: {text})"
    return text


def _without_secrets(text: str, token: str | None) -> str:
    """The text without tokens and the signed parts of addresses."""
    for secret in filter(None, (token, get_token())):
        text = text.replace(secret, "[token]")
    text = re.sub(r"\bhf_\w{8,}", "[token]", text)
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\")]+", r"\1", text)
