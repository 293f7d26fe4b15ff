"""A small stand-in for the Hub on loopback: models and Spaces with the semantics of git, spoken to over HTTP.

A Space has the name `spaces/USER/NAME` in `HubServer.repos`: it may be called like a model.
"""

import base64
import codecs
import hashlib
import json
import os
import re
import shutil
import socket
import struct
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote

import hf_xet
import yaml
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.wrappers import Request, Response

WRITE_TOKEN = "hf_write_of_somebody"
READ_TOKEN = "hf_read_of_somebody"
OTHER_TOKEN = "hf_write_of_another"

BAD_TOKEN = "Invalid credentials in Authorization header"
LARGE = 10 * 2**20
LFS_SUFFIXES = (".safetensors", ".bin", ".png", ".pt", ".npz", ".onnx", ".gguf")
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
RELATIONS = ("adapter", "merge", "quantized", "finetune")
REVISION, REPO = "([^/?]+)", "([^/?]+/[^/?]+)"
KIND = "(models|spaces)"
API = f"/api/{KIND}/{REPO}"
GIT = f"/(spaces/)?{REPO}"
GIT_NAME = "((?:spaces/)?[^/?]+/[^/?]+)"
COLORS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")
SDKS = ("gradio", "docker", "static")
DATE = "2026-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class Blob:
    data: bytes
    lfs: bool = False
    xet_hash: str | None = None

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @cached_property
    def oid(self) -> str:
        """What git calls the file: of one in LFS, its pointer."""
        return git_oid(self.pointer if self.lfs else self.data)

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    oid: str
    tree: dict[str, Blob]
    summary: str
    description: str
    author: str


@dataclass
class Repo:
    name: str
    private: bool = False
    gated: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=dict)
    lfs: dict[str, Blob] = field(default_factory=dict)
    admitted: set[str] = field(default_factory=set)

    @property
    def owner(self) -> str:
        return self.name.split("/")[-2]

    def commits(self, revision: str = "main") -> list[Commit]:
        """Oldest first. A revision is a branch, a pull request's `refs/pr/N` or a commit's 40 digits."""
        if revision in self.branches:
            return self.branches[revision]
        for commits in self.branches.values():
            for number, commit in enumerate(commits, start=1):
                if commit.oid == revision:
                    return commits[:number]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def tree(self, revision: str = "main") -> dict[str, Blob]:
        return self.commits(revision)[-1].tree

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {path: blob.data for path, blob in self.tree(revision).items()}

    def commit(
        self, branch: str, tree: dict[str, Blob], summary: str, description: str = "", author: str = ""
    ) -> Commit:
        commits = self.branches.setdefault(branch, [])
        parent = commits[-1].oid if commits else ""
        count = sum(len(others) for others in self.branches.values())
        content = json.dumps([parent, count, summary, sorted((path, blob.oid) for path, blob in tree.items())])
        commit = Commit(hashlib.sha1(content.encode()).hexdigest(), tree, summary, description, author)
        commits.append(commit)
        return commit

    @property
    def pull_requests(self) -> list[str]:
        return [name for name in self.branches if name.startswith("refs/pr/")]


@dataclass
class User:
    """Whom a token speaks for; one with the role fineGrained writes only what belongs to those in `scoped`."""

    name: str
    role: str
    organisations: dict[str, str] = field(default_factory=dict)
    scoped: tuple[str, ...] = ()

    def may_read(self, owner: str) -> bool:
        return owner == self.name or owner in self.organisations

    def may_write(self, owner: str) -> bool:
        roles = {**self.organisations, self.name: "admin"}
        return self.writes(owner) and roles.get(owner) in ("contributor", "write", "admin")

    def writes(self, owner: str) -> bool:
        return self.role == "write" or owner in self.scoped


@dataclass
class Fault:
    method: str
    path: str
    status: int | None
    times: int | None
    headers: dict[str, str]
    cut: str | None
    delay: float | None
    hits: int = 0
    over: threading.Event = field(default_factory=threading.Event)

    def takes(self, method: str, path: str) -> bool:
        wanted = self.times is None or self.hits < self.times
        return wanted and self.method in (method, "*") and re.search(self.path, path) is not None


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, **body):
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body

    def response(self) -> Response:
        headers = {"X-Error-Message": self.message.replace("\n", " ")} | (
            {"X-Error-Code": self.code} if self.code else {}
        )
        return reply({"error": self.message} | self.body, self.status, headers)


class QuietHandler(WSGIRequestHandler):
    def log_request(self, *args):
        pass

    def connection_dropped(self, error, environ=None):
        self.close_connection = True


class HubServer:
    """`with HubServer() as server`: listens at `server.url`; files in LFS come and go at `server.storage_url`."""

    def __init__(self):
        organisations = {"lab": "write", "audience": "read"}
        self.users = {
            WRITE_TOKEN: User("somebody", "write", organisations),
            READ_TOKEN: User("somebody", "read", organisations),
            OTHER_TOKEN: User("another", "write"),
        }
        self.errors: list[str] = []
        self.lock = threading.RLock()
        self.faults: list[Fault] = []
        self.scratch = tempfile.TemporaryDirectory(prefix="hub_server_")
        self.reset()

    def __enter__(self):
        self.servers = [
            make_server("127.0.0.1", 0, application(self, routes), threaded=True, request_handler=QuietHandler)
            for routes in (HUB_ROUTES, STORAGE_ROUTES)
        ]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)
        self.threads = [threading.Thread(target=server.serve_forever, args=(0.05,)) for server in self.servers]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, kind, value, trace):
        for fault in self.faults:
            fault.over.set()
        for server, thread in zip(self.servers, self.threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()
        self.scratch.cleanup()
        if kind is None:
            self.check()

    def check(self) -> None:
        """Nothing went wrong here in the requests so far."""
        errors, self.errors = self.errors, []
        if errors:
            raise AssertionError("the stand-in Hub itself failed:\n" + "\n".join(errors))

    def reset(self) -> None:
        """Forget repositories, requests and faults; requests that are being delayed never take effect."""
        with self.lock:
            for fault in self.faults:
                fault.over.set()
            self.repos: dict[str, Repo] = {}
            self.requests: list[tuple[str, str]] = []
            self.authorizations: list[str | None] = []
            self.storage_authorizations: list[str | None] = []
            self.faults = []
            self.xet_folder = Path(tempfile.mkdtemp(dir=self.scratch.name))

    def create_repo(self, name: str, files: dict[str, bytes] | None = None, *, private=False, gated=False) -> Repo:
        """A repository with one commit, as the Hub begins one, and a second with `files` if there are any."""
        repo = self.repos[name] = Repo(name, private, gated)
        repo.commit("main", {".gitattributes": Blob(GIT_ATTRIBUTES)}, "initial commit", author=repo.owner)
        if files:
            blobs = {path: Blob(data, lfs=is_lfs(path, data, len(data))) for path, data in files.items()}
            repo.lfs |= {blob.sha256: blob for blob in blobs.values() if blob.lfs}
            repo.commit("main", repo.tree() | blobs, "Files", author=repo.owner)
        return repo

    def fail(
        self,
        method: str,
        path_regex: str,
        *,
        status: int | None = None,
        times: int | None = 1,
        headers: dict[str, str] | None = None,
        cut: str | None = None,
        delay: float | None = None,
    ) -> Fault:
        """Let requests fail; `path_regex` is searched for in path and query as they were sent, quoted."""
        if cut not in (None, "before", "middle", "after") or not (status or cut or delay):
            raise ValueError("a fault has a status, a cut (before, middle, after) or a delay")
        fault = Fault(method, path_regex, status, times, headers or {}, cut, delay)
        self.faults.append(fault)
        return fault

    def sent(self, method: str, path_regex: str) -> list[str]:
        return [path for verb, path in self.requests if verb == method and re.search(path_regex, path)]

    def count(self, method: str, path_regex: str) -> int:
        return len(self.sent(method, path_regex))

    @property
    def lfs_puts(self) -> int:
        return self.count("PUT", "^/lfs/")

    @property
    def commit_posts(self) -> int:
        return self.count("POST", "/commit/")

    def notice(self, request: Request, path: str, storage: bool) -> Fault | None:
        with self.lock:
            self.requests.append((request.method, path))
            seen = self.storage_authorizations if storage else self.authorizations
            seen.append(request.headers.get("Authorization"))
            fault = next((fault for fault in self.faults if fault.takes(request.method, path)), None)
            if fault is not None:
                fault.hits += 1
            return fault

    def user(self, request: Request) -> User | None:
        header = request.headers.get("Authorization")
        if header is None:
            return None
        user = self.users.get(header.removeprefix("Bearer "))
        if user is None:
            raise HubError(401, BAD_TOKEN)
        return user

    def someone(self, request: Request) -> User:
        user = self.user(request)
        if user is None:
            raise HubError(401, "Invalid username or password.")
        return user

    def readable(self, request: Request, name: str, files: bool = False) -> Repo:
        """The repository, or what the Hub answers those who may not see it, or may not see its files."""
        user = self.user(request)
        repo = self.repos.get(name)
        if repo is None or (repo.private and not (user and user.may_read(repo.owner))):
            message = "Repository not found" if user else "Invalid username or password."
            raise HubError(404 if user else 401, message, "RepoNotFound")
        if files and repo.gated and not (user and (user.may_read(repo.owner) or user.name in repo.admitted)):
            raise HubError(403 if user else 401, f"Access to model {name} is restricted.", "GatedRepo")
        return repo

    def writable(self, request: Request, name: str, pull_request: bool = False) -> tuple[Repo, User]:
        repo, user = self.readable(request, name), self.someone(request)
        if not user.writes(repo.owner):
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")
        if not pull_request and not user.may_write(repo.owner):
            raise HubError(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repo, user

    def lfs_object(self, repo: Repo, oid: str) -> Blob | None:
        """What was uploaded under this SHA-256, over LFS or over xet."""
        if oid not in repo.lfs and (found := self.xet_object(oid)) is not None:
            repo.lfs[oid] = found
        return repo.lfs.get(oid)

    def xet_object(self, oid: str) -> Blob | None:
        for shard in self.xet_folder.glob("*/xet/xorbs/shards/*.mdb"):
            found = shard_files(shard.read_bytes())
            if oid in found:
                return self.xet_read(shard.parents[3], oid, *found[oid])
        return None

    def xet_read(self, store: Path, oid: str, xet_hash: str, size: int) -> Blob:
        """From a copy of the store: the client may still hold a lock on its own."""
        copied = Path(tempfile.mkdtemp(dir=self.scratch.name), "store")
        shutil.copytree(store, copied)
        with hf_xet.XetSession().new_file_download_group(**xet_access(copied)) as group:
            group.start_download_file(hf_xet.XetFileInfo(xet_hash, size), str(copied / "file"))
        return Blob((copied / "file").read_bytes(), lfs=True, xet_hash=xet_hash)

    def xet_store(self, blobs: list[Blob]) -> Path:
        """A new store with these files: what xet calls them depends on nothing but their content."""
        store = Path(tempfile.mkdtemp(dir=self.scratch.name))
        with hf_xet.XetSession().new_upload_commit(**xet_access(store)) as commit:
            for blob in blobs:
                commit.start_upload_bytes(blob.data, sha256=blob.sha256)
        return store


def application(hub: HubServer, routes: list[tuple[str, str, Callable]]):
    storage = routes is STORAGE_ROUTES

    def answer(request: Request, path: str) -> Response:
        for method, pattern, handler in routes:
            match = re.fullmatch(pattern, path.split("?")[0])
            if match and request.method == method:
                with hub.lock:
                    return handler(hub, request, *map(unquote, whole_names(match.groups())))
        raise HubError(404, "Sorry, we can't find the page you are looking for.")

    @Request.application
    def app(request: Request) -> Response:
        path = request.environ["RAW_URI"]
        fault = hub.notice(request, path, storage)
        forgotten = bool(fault and fault.delay and fault.over.wait(fault.delay))
        if forgotten or (fault and fault.cut == "before"):
            hang_up(request)
        if fault and fault.cut == "middle" and request.content_length:
            request.stream.read(request.content_length // 2)
            hang_up(request)
        request.get_data()
        if fault and fault.status:
            response = HubError(fault.status, f"Fault {fault.status}").response()
            response.headers.update(fault.headers)
            return response
        try:
            response = answer(request, path)
        except HubError as error:
            response = error.response()
        except Exception:
            hub.errors.append(f"{request.method} {path}\n{traceback.format_exc()}")
            raise
        if fault and fault.cut == "middle":
            send_half(request, response)
        if fault and fault.cut == "after":
            hang_up(request)
        return response

    return app


def whole_names(groups: tuple) -> list[str]:
    """The parts of a path; the kind of a repository, where it has one, becomes a part of its name."""
    if not groups or groups[0] not in ("models", "spaces", "spaces/", None):
        return list(groups)
    kind, name, *others = groups
    return [f"spaces/{name}" if kind in ("spaces", "spaces/") else name, *others]


def hang_up(request: Request) -> None:
    """Reset the connection, as a peer does that has crashed."""
    connection = request.environ["werkzeug.socket"]
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(connection.detach())
    raise ConnectionResetError


def send_half(request: Request, response: Response) -> None:
    data = response.get_data()
    lines = [f"HTTP/1.0 {response.status}", *(f"{name}: {value}" for name, value in response.headers)]
    head = "\r\n".join(lines).encode("latin1") + b"\r\n\r\n"
    request.environ["werkzeug.socket"].sendall(head + data[: len(data) // 2])
    request.environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    raise ConnectionResetError


def reply(content, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(content, default=str), status, headers, mimetype="application/json")


def git_oid(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def is_lfs(path: str, sample: bytes, size: int) -> bool:
    return path.endswith(LFS_SUFFIXES) or size > LARGE or is_binary(sample[:512])


def is_binary(sample: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(sample)
    except UnicodeDecodeError:
        return True
    return b"\0" in sample


def xet_access(store: Path) -> dict:
    return {"endpoint": f"local://{store}", "token": "xet", "token_expiry_unix_secs": int(time.time()) + 3600}


def shard_files(shard: bytes) -> dict[str, tuple[str, int]]:
    """SHA-256 to xet hash and size, read from a shard: entries of 48 bytes, a bookend of ones behind the last file."""
    found, at = {}, 48
    while shard[at : at + 32] != b"\xff" * 32:
        xet_hash = xet_digits(shard[at : at + 32])
        flags, count = struct.unpack_from("<II", shard, at + 32)
        sizes = [struct.unpack_from("<I", shard, at + 48 * number + 36)[0] for number in range(1, count + 1)]
        at += 48 * (1 + count * (2 if flags >> 31 else 1))
        if flags >> 30 & 1:
            found[xet_digits(shard[at : at + 32])] = (xet_hash, sum(sizes))
            at += 48
    return found


def xet_digits(raw: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


# Metadata of model cards


def card_metadata(text: str):
    """The YAML block of a card, or None; raises yaml.YAMLError."""
    match = re.match(r"\s*---[\r\n]+(.*?)[\r\n]+---\s*?(\r?\n|\Z)", text, re.DOTALL)
    return yaml.safe_load(match.group(1)) if match else None


def card_problems(text: str, kind: str = "model") -> tuple[list[str], list[str]]:
    try:
        metadata = card_metadata(text)
    except yaml.YAMLError as error:
        return [f"YAML Metadata Error: {error}"], []
    if metadata is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(metadata, dict):
        return ["YAML Metadata Error: the metadata must be a mapping"], []
    errors = [*_license_problems(metadata), *_model_index_problems(metadata)]
    errors += _space_problems(metadata) if kind == "space" else []
    relation = metadata.get("base_model_relation")
    if relation is not None and relation not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of [{", ".join(RELATIONS)}]')
    tags = metadata.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        errors.append('"tags" must be an array of strings')
    return errors, []


def _license_problems(metadata: dict) -> list[str]:
    known = metadata.get("license")
    plain = known is None or (isinstance(known, str) and re.fullmatch(r"[a-z0-9.-]+", known))
    return [] if plain else ['"license" must be one of the known identifiers']


def _space_problems(metadata: dict) -> list[str]:
    """What the Hub refuses in the metadata of a Space's README.md."""
    allowed = {"colorFrom": COLORS, "colorTo": COLORS, "sdk": SDKS}
    problems = [
        f'"{name}" must be one of [{", ".join(values)}]'
        for name, values in allowed.items()
        if metadata.get(name, values[0]) not in values
    ]
    if "sdk" not in metadata:
        problems.append('"sdk" is required')
    if not isinstance(metadata.get("python_version", ""), str) or not isinstance(metadata.get("sdk_version", ""), str):
        problems.append('"python_version" and "sdk_version" must be strings')
    if len(metadata.get("short_description", "")) > 60:
        problems.append('"short_description" length must be less than or equal to 60 characters long')
    if re.search(r"[\w\s]", metadata.get("emoji", "")):
        problems.append('"emoji" must be an emoji')
    return problems


def _model_index_problems(metadata: dict) -> list[str]:
    if "model-index" not in metadata:
        return []
    problems = []
    for place, entry in _entries("model-index", metadata["model-index"], problems):
        _require(place, entry, ["name"], problems)
        for result_place, result in _entries(f"{place}.results", entry.get("results"), problems):
            _require(f"{result_place}.task", result.get("task"), ["type"], problems)
            _require(f"{result_place}.dataset", result.get("dataset"), ["type", "name"], problems)
            for metric_place, metric in _entries(f"{result_place}.metrics", result.get("metrics"), problems):
                _require(metric_place, metric, ["type", "value"], problems)
    return problems


def _entries(place: str, value, problems: list[str]) -> list[tuple[str, dict]]:
    if not isinstance(value, list):
        problems.append(f'"{place}" must be an array')
        return []
    problems += [f'"{place}[{i}]" must be an object' for i, entry in enumerate(value) if not isinstance(entry, dict)]
    return [(f"{place}[{i}]", entry) for i, entry in enumerate(value) if isinstance(entry, dict)]


def _require(place: str, value, names: list[str], problems: list[str]) -> None:
    value = value if isinstance(value, dict) else {}
    problems += [f'"{place}.{name}" is required' for name in names if value.get(name) in (None, "")]


# What the Hub answers


def whoami(hub, request):
    user = hub.someone(request)
    organisations = [
        {"type": "org", "name": name, "fullname": name, "roleInOrg": role} for name, role in user.organisations.items()
    ]
    token = {"displayName": f"{user.role} token", "role": user.role, "createdAt": DATE}
    if user.role == "fineGrained":
        scoped = [
            {
                "entity": {"_id": name, "type": "user" if name == user.name else "org", "name": name},
                "permissions": ["repo.content.read", "repo.write"],
            }
            for name in user.scoped
        ]
        token["fineGrained"] = {"canReadGatedRepos": False, "global": [], "scoped": scoped}
    auth = {"type": "access_token", "accessToken": token}
    return reply({"type": "user", "id": user.name, "name": user.name, "orgs": organisations, "auth": auth})


def validate_yaml(hub, request):
    errors, warnings = card_problems(request.json["content"], request.json.get("repoType", "model"))
    content = {"errors": [{"message": m} for m in errors], "warnings": [{"message": m} for m in warnings]}
    return reply(content, 400 if errors else 200)


def create_repo(hub, request):
    user = hub.someone(request)
    owner, name = request.json.get("organization") or user.name, request.json["name"]
    if not user.may_write(owner):
        raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
    is_space = request.json.get("type") == "space"
    if is_space and request.json.get("sdk") not in SDKS:
        raise HubError(400, f'"sdk" must be one of [{", ".join(SDKS)}]')
    full = f"{'spaces/' if is_space else ''}{owner}/{name}"
    url = f"{hub.url}/{full}"
    if full in hub.repos:
        raise HubError(409, "You already created this repo", url=url, name=full)
    hub.create_repo(full, private=request.json.get("visibility") == "private" or request.json.get("private", False))
    return reply({"url": url, "name": f"{owner}/{name}", "id": f"{owner}/{name}"})


def delete_repo(hub, request):
    user = hub.someone(request)
    repo, _ = hub.writable(request, f"{request.json.get('organization') or user.name}/{request.json['name']}")
    del hub.repos[repo.name]
    return reply("OK")


def settings(hub, request, name):
    repo, _ = hub.writable(request, name)
    repo.private = request.json.get("visibility", "private" if repo.private else "public") == "private"
    repo.gated = bool(request.json.get("gated", repo.gated))
    return reply({"private": repo.private, "gated": repo.gated})


def preupload(hub, request, name, revision):
    repo, _ = hub.writable(request, name, "create_pr" in request.args or revision.startswith("refs/pr/"))
    tree, files = repo.tree(revision), []
    for file in request.json["files"]:
        lfs = is_lfs(file["path"], base64.b64decode(file["sample"]), file["size"])
        entry = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
        files.append(entry | ({"oid": tree[file["path"]].etag} if file["path"] in tree else {}))
    return reply({"files": files, "commitOid": repo.commits(revision)[-1].oid})


def lfs_batch(hub, request, name):
    reference = (request.json.get("ref") or {}).get("name")
    repo, _ = hub.writable(request, name, reference is None or reference.startswith("refs/pr/"))
    objects = []
    for wanted in request.json["objects"]:
        upload = {"href": f"{hub.storage_url}/lfs/{repo.name}/{wanted['oid']}?signature=signed", "header": {}}
        verify = {"href": f"{hub.url}/{repo.name}.git/info/lfs/objects/verify"}
        missing = hub.lfs_object(repo, wanted["oid"]) is None
        objects.append(wanted | ({"actions": {"upload": upload, "verify": verify}} if missing else {}))
    return reply({"transfer": "basic", "objects": objects})


def lfs_verify(hub, request, name):
    repo, _ = hub.writable(request, name, pull_request=True)
    blob = repo.lfs.get(request.json["oid"])
    if blob is None or len(blob.data) != request.json["size"]:
        raise HubError(404, "Object does not exist on the server")
    return reply({})


def lfs_put(hub, request, name, oid):
    blob = Blob(request.get_data(), lfs=True)
    if request.args.get("signature") != "signed":
        raise HubError(403, "SignatureDoesNotMatch")
    if blob.sha256 != oid:
        raise HubError(400, "BadDigest")
    known_repo(hub, name).lfs[oid] = blob
    return reply({})


def lfs_get(hub, request, name, oid):
    if request.args.get("signature") != "signed":
        raise HubError(403, "SignatureDoesNotMatch")
    return content(request, known_repo(hub, name).lfs[oid], {})


def known_repo(hub, name):
    """The repository of a storage address, which may be gone by the time that a slow client comes."""
    if name not in hub.repos:
        raise HubError(404, "NoSuchKey")
    return hub.repos[name]


def commit(hub, request, name, revision):
    opens_pull_request = "create_pr" in request.args
    repo, user = hub.writable(request, name, opens_pull_request or revision.startswith("refs/pr/"))
    commits = repo.commits(revision)
    if revision not in repo.branches:
        raise HubError(400, "Can only commit to a branch")
    header, tree = {}, dict(commits[-1].tree)
    for line in request.get_data().splitlines():
        operation = json.loads(line)
        if operation["key"] == "header":
            header = operation["value"]
        else:
            change(hub, repo, tree, operation["key"], operation["value"])
    if header.get("parentCommit") not in (None, commits[-1].oid):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    branch, answer = revision, {}
    if opens_pull_request:
        number = len(repo.pull_requests) + 1
        branch = f"refs/pr/{number}"
        repo.branches[branch] = list(commits)
        answer = {"pullRequestUrl": f"{hub.url}/{name}/discussions/{number}"}
    made = repo.commit(branch, tree, header["summary"], header.get("description", ""), user.name)
    return reply({"success": True, "commitOid": made.oid, "commitUrl": f"{hub.url}/{name}/commit/{made.oid}"} | answer)


def change(hub, repo, tree, key, value):
    path = value["path"]
    if key == "file":
        data = base64.b64decode(value["content"])
        if len(data) > LARGE or is_binary(data):
            raise HubError(400, f"Your push was rejected because it contains large or binary files.\nOffending: {path}")
        kind = "space" if repo.name.startswith("spaces/") else "model"
        if path == "README.md" and (errors := card_problems(data.decode(), kind)[0]):
            raise HubError(400, "\n".join(errors))
        tree[path] = Blob(data)
    elif key == "lfsFile":
        blob = hub.lfs_object(repo, value["oid"])
        if blob is None or len(blob.data) != value.get("size", len(blob.data)):
            raise HubError(400, f"An LFS pointer pointed to a file that does not exist.\nOffending file: {path}")
        tree[path] = blob
    elif key in ("deletedFile", "deletedFolder"):
        folder = path.rstrip("/") + "/"
        gone = [known for known in tree if (known.startswith(folder) if key == "deletedFolder" else known == path)]
        if not gone:
            raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
        for known in gone:
            del tree[known]
    else:
        raise HubError(400, f"Unknown operation {key}")


def info(hub, request, name, revision="main"):
    repo = hub.readable(request, name)
    commits, tree = repo.commits(revision), repo.tree(revision)
    card = card_metadata(tree["README.md"].data.decode()) if "README.md" in tree else None
    siblings = [
        {"rfilename": path} | (sibling_sizes(blob) if "blobs" in request.args else {}) for path, blob in tree.items()
    ]
    content = {
        "id": name.removeprefix("spaces/"),
        "modelId": name,
        "author": repo.owner,
        "sha": commits[-1].oid,
        "private": repo.private,
        "gated": "auto" if repo.gated else False,
        "tags": (card or {}).get("tags", []),
        "siblings": siblings,
        "createdAt": DATE,
        "lastModified": DATE,
    }
    return reply(content | ({"cardData": card} if card else {}))


def auth_check(hub, request, name):
    hub.readable(request, name, files=True)
    return Response("OK")


def auth_check_write(hub, request, name):
    hub.writable(request, name)
    return Response("OK")


def sibling_sizes(blob):
    lfs = {"sha256": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
    return {"blobId": blob.oid, "size": len(blob.data)} | ({"lfs": lfs} if blob.lfs else {})


def tree(hub, request, name, revision, folder=""):
    files = hub.readable(request, name).tree(revision)
    prefix = f"{folder}/" if folder else ""
    inside = sorted(path for path in files if path.startswith(prefix))
    if folder and not inside:
        raise HubError(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
    folders = {"/".join(path.split("/")[:depth]) for path in inside for depth in range(1, path.count("/") + 1)}
    paths = sorted({*(path for path in folders if path.startswith(prefix)), *inside})
    if request.args.get("recursive", "").lower() not in ("true", "1"):
        paths = [path for path in paths if "/" not in path[len(prefix) :]]
    return reply([tree_entry(path, files.get(path)) for path in paths])


def tree_entry(path, blob):
    if blob is None:
        return {"type": "directory", "path": path, "oid": git_oid(path.encode()), "size": 0}
    entry = {"type": "file", "path": path, "oid": blob.oid, "size": len(blob.data)}
    if blob.lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
    return entry | ({"xetHash": blob.xet_hash} if blob.xet_hash else {})


def paths_info(hub, request, name, revision):
    files = hub.readable(request, name).tree(revision)
    wanted = request.form.getlist("paths")
    folders = [path for path in wanted if any(known.startswith(f"{path}/") for known in files)]
    return reply([tree_entry(path, files.get(path)) for path in wanted if path in files or path in folders])


def history(hub, request, name, revision):
    commits = hub.readable(request, name).commits(revision)
    return reply(
        [
            {"id": c.oid, "title": c.summary, "message": c.description, "authors": [{"user": c.author}], "date": DATE}
            for c in reversed(commits)
        ]
    )


def references(hub, request, name):
    repo = hub.readable(request, name)
    pulls = [{"name": ref, "ref": ref, "targetCommit": repo.commits(ref)[-1].oid} for ref in repo.pull_requests]
    branches = [
        {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": commits[-1].oid}
        for branch, commits in repo.branches.items()
        if branch not in repo.pull_requests
    ]
    return reply({"branches": branches, "converts": [], "tags": [], "pullRequests": pulls})


def create_branch(hub, request, name, branch):
    repo, _ = hub.writable(request, name)
    if branch in repo.branches:
        raise HubError(409, f"Reference already exists: refs/heads/{branch}")
    repo.branches[branch] = list(repo.commits(request.json.get("startingPoint", "main")))
    return reply({})


def delete_branch(hub, request, name, branch):
    repo, _ = hub.writable(request, name)
    if branch == "main" or branch not in repo.branches:
        raise HubError(404 if branch != "main" else 403, f"Cannot delete {branch}", "RevisionNotFound")
    del repo.branches[branch]
    return reply({})


def xet_token(hub, request, name, kind, revision):
    if kind == "write":
        pull_request = "create_pr" in request.args or revision == "None" or revision.startswith("refs/pr/")
        hub.writable(request, name, pull_request)
        store = Path(tempfile.mkdtemp(dir=hub.xet_folder))
    else:
        files = hub.readable(request, name, files=True).tree(revision).values()
        store = hub.xet_store([blob for blob in files if blob.xet_hash])
    url, expires = f"local://{store}", int(time.time()) + 3600
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expires)}
    return reply({"casUrl": url, "accessToken": "xet", "exp": expires}, headers=headers)


def resolve(hub, request, name, revision, path):
    repo = hub.readable(request, name, files=True)
    oid, files = repo.commits(revision)[-1].oid, repo.tree(revision)
    if path not in files:
        raise HubError(404, "Entry not found", "EntryNotFound")
    blob, headers = files[path], {"X-Repo-Commit": oid}
    if not blob.lfs:
        return content(request, blob, headers)
    headers |= {"X-Linked-Size": str(len(blob.data)), "X-Linked-ETag": f'"{blob.etag}"', "ETag": f'"{blob.etag}"'}
    headers["Location"] = f"{hub.storage_url}/lfs/{name}/{blob.sha256}?signature=signed"
    if blob.xet_hash:
        headers["X-Xet-Hash"] = blob.xet_hash
        kind = "" if name.startswith("spaces/") else "models/"
        headers["Link"] = f'<{hub.url}/api/{kind}{name}/xet-read-token/{oid}>; rel="xet-auth"'
    return Response(b"Found", 302, headers)


def content(request, blob, headers):
    response = Response(blob.data, 200, headers, mimetype="application/octet-stream")
    response.set_etag(blob.etag)
    return response.make_conditional(request, accept_ranges=True, complete_length=len(blob.data))


HUB_ROUTES = [
    ("GET", "/api/whoami-v2", whoami),
    ("POST", "/api/validate-yaml", validate_yaml),
    ("POST", "/api/repos/create", create_repo),
    ("DELETE", "/api/repos/delete", delete_repo),
    ("PUT", f"{API}/settings", settings),
    ("POST", f"{API}/preupload/{REVISION}", preupload),
    ("POST", f"{API}/commit/{REVISION}", commit),
    ("GET", f"{API}/commits/{REVISION}", history),
    ("GET", API, info),
    ("GET", f"{API}/revision/{REVISION}", info),
    ("GET", f"{API}/auth-check", auth_check),
    ("GET", f"{API}/auth-check/write", auth_check_write),
    ("GET", f"{API}/tree/{REVISION}", tree),
    ("GET", f"{API}/tree/{REVISION}/(.+)", tree),
    ("POST", f"{API}/paths-info/{REVISION}", paths_info),
    ("GET", f"{API}/refs", references),
    ("POST", f"{API}/branch/{REVISION}", create_branch),
    ("DELETE", f"{API}/branch/{REVISION}", delete_branch),
    ("GET", f"{API}/xet-(read|write)-token/{REVISION}", xet_token),
    ("POST", f"{GIT}[.]git/info/lfs/objects/batch", lfs_batch),
    ("POST", f"{GIT}[.]git/info/lfs/objects/verify", lfs_verify),
    ("GET", f"{GIT}/resolve/{REVISION}/(.+)", resolve),
    ("HEAD", f"{GIT}/resolve/{REVISION}/(.+)", resolve),
]
STORAGE_ROUTES = [
    ("PUT", f"/lfs/{GIT_NAME}/([0-9a-f]{{64}})", lfs_put),
    ("GET", f"/lfs/{GIT_NAME}/([0-9a-f]{{64}})", lfs_get),
    ("HEAD", f"/lfs/{GIT_NAME}/([0-9a-f]{{64}})", lfs_get),
]
