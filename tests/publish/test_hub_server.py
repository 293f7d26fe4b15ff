"""The stand-in Hub and the processes of its client, driven by the genuine huggingface_hub over LFS and over xet."""

import json
import os
import signal
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import GIT_ATTRIBUTES, OTHER_TOKEN, READ_TOKEN, card_problems
from packaging.version import Version

# The stand-in is that of today's client: an older one validates cards elsewhere, and raises other errors.
pytestmark = [
    pytest.mark.slow,  # it tests the tests' own stand-in
    pytest.mark.skipif(
        Version(huggingface_hub.__version__) < Version("2.2"), reason="the stand-in speaks with today's client"
    ),
]

NAME = "somebody/model"
FILES = {
    "README.md": b"---\nlicense: mit\ntags: [pruned]\n---\nA card.\n",
    "config.json": b"{}",
    "model.safetensors": bytes(range(256)) * 2000,
    "plots/zeros.png": b"\x89PNG\0" * 50,
    "empty.bin": b"",
}
IMPORTS = """
import json, sys
from pathlib import Path
from huggingface_hub import *
from huggingface_hub.errors import *
api, name = HfApi(), "somebody/model"
def push(folder, **options):
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    additions = [CommitOperationAdd(str(path.relative_to(folder)), path) for path in paths]
    return api.create_commit(name, additions, commit_message="Push", **options)
"""
PUSH = "api.create_repo(name, exist_ok=True); print(push(sys.argv[1]).oid)"


@pytest.fixture(params=["lfs", "xet"])
def client(hub, request):
    client = request.getfixturevalue(f"{request.param}_client")
    client.clear_cache()
    return client


@pytest.fixture
def folder(tmp_path):
    for path, data in FILES.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(data)
    return tmp_path


def done(client, source, *arguments, **options):
    """What a program prints that succeeds."""
    completed = client.python(IMPORTS + source, *arguments, **options)
    assert completed.returncode == 0, completed.stderr
    return completed.stdout.strip()


def failed(client, error, source, *arguments, **options):
    completed = client.python(IMPORTS + source, *arguments, **options)
    assert completed.returncode == 1
    assert error in completed.stderr.strip().splitlines()[-1] or f"{error}:" in completed.stderr, completed.stderr
    return completed.stderr


def test_what_is_pushed_is_there_and_comes_back(hub, client, folder):
    oid = done(client, PUSH, folder)
    assert hub.repos[NAME].files() == FILES | {".gitattributes": GIT_ATTRIBUTES}
    assert [commit.summary for commit in hub.repos[NAME].commits()] == ["initial commit", "Push"]
    assert hub.repos[NAME].commits()[-1].oid == oid
    assert hub.lfs_puts == (0 if client.xet else 2)
    assert (hub.count("GET", "xet-write-token") > 0) == client.xet

    fetched = done(client, "print(snapshot_download(name))")
    assert {path: (folder / fetched / path).read_bytes() for path in FILES} == FILES
    assert hub.count("GET", "^/lfs/") == (0 if client.xet else 2)
    assert set(hub.storage_authorizations) <= {None}
    path = done(client, "print(hf_hub_download(name, 'config.json', local_dir=sys.argv[1]))", folder / "one")
    assert Path(path).read_bytes() == b"{}"


def test_unchanged_files_make_no_commit_and_changed_ones_travel_alone(hub, client, folder):
    first = done(client, PUSH, folder)
    assert done(client, PUSH, folder) == first
    assert (hub.commit_posts, hub.lfs_puts) == (1, 0 if client.xet else 2)
    (folder / "model.safetensors").write_bytes(b"other")
    assert done(client, PUSH, folder) != first
    assert (hub.commit_posts, hub.lfs_puts) == (2, 0 if client.xet else 3)
    assert hub.repos[NAME].files()["model.safetensors"] == b"other"
    assert hub.repos[NAME].files(first)["model.safetensors"] == FILES["model.safetensors"]


def test_branches_pull_requests_deletions_and_stale_parents(hub, client, folder):
    hub.create_repo(NAME, {"old/a.json": b"1", "old/b.bin": b"2", "keep.txt": b"3"})
    repo = hub.repos[NAME]
    start = repo.commits()[-1].oid
    done(client, "api.create_branch(name, branch='v2'); push(sys.argv[1], revision='v2')", folder)
    assert repo.files("v2") == repo.files() | FILES
    printed = done(client, "c = push(sys.argv[1], create_pr=True); print(c.pr_revision, c.pr_num, c.pr_url)", folder)
    assert printed == f"refs/pr/1 1 {hub.url}/{NAME}/discussions/1"
    assert repo.files("refs/pr/1") == repo.files("v2")
    assert repo.commits()[-1].oid == start
    refs = done(
        client, "r = api.list_repo_refs(name, include_pull_requests=True); print(len(r.branches), len(r.pull_requests))"
    )
    assert refs == "2 1"
    stale = "push(sys.argv[1], parent_commit=sys.argv[2])"
    assert "412" in failed(client, "HfHubHTTPError", stale, folder, repo.commits()[0].oid)
    done(client, stale, folder, start)
    done(client, "api.create_commit(name, [CommitOperationDelete('old/')], commit_message='Less')")
    assert repo.files() == FILES | {".gitattributes": GIT_ATTRIBUTES, "keep.txt": b"3"}
    failed(
        client, "EntryNotFoundError", "api.create_commit(name, [CommitOperationDelete('no')], commit_message='Less')"
    )
    failed(client, "RevisionNotFoundError", "push(sys.argv[1], revision='no')", folder)


def test_trees_and_repositories_are_described(hub, client):
    hub.create_repo(NAME, FILES)
    tree = json.loads(done(client, "print(json.dumps([file.path for file in api.list_repo_tree(name)]))"))
    assert tree == [".gitattributes", "README.md", "config.json", "empty.bin", "model.safetensors", "plots"]
    assert done(client, "print([file.path for file in api.list_repo_tree(name, 'plots')])") == "['plots/zeros.png']"
    described = "i = api.repo_info(name, files_metadata=True); print(i.sha, i.private, i.tags, i.card_data.license)"
    assert done(client, described) == f"{hub.repos[NAME].commits()[-1].oid} False ['pruned'] mit"
    counts = "print(len(api.list_repo_commits(name)), len(api.get_paths_info(name, ['plots', 'no'])))"
    assert done(client, counts) == "2 1"


def test_who_may_do_what(hub, client, folder):
    who = "w = api.whoami(); print(w['name'], [o['name'] for o in w['orgs']], w['auth']['accessToken']['role'])"
    assert done(client, who) == "somebody ['lab', 'audience'] write"
    assert done(client, who, token=READ_TOKEN) == "somebody ['lab', 'audience'] read"
    assert "Invalid user token" in failed(client, "HfHubHTTPError", who, token="hf_unknown")
    done(client, "api.create_repo(name, private=True); push(sys.argv[1])", folder)
    repo = hub.repos[NAME]
    assert repo.private
    for token in (OTHER_TOKEN, False):
        failed(client, "RepositoryNotFoundError", "api.repo_info(name)", token=token)
    assert done(client, "print(api.repo_info(name).private)", token=READ_TOKEN) == "True"
    repo.private, repo.gated = False, True
    push = "push(sys.argv[1])"
    assert "you must use a write token" in failed(client, "HfHubHTTPError", push, folder, token=READ_TOKEN)
    assert "pass `create_pr=1`" in failed(client, "HfHubHTTPError", push, folder, token=OTHER_TOKEN)
    failed(client, "GatedRepoError", "hf_hub_download(name, 'config.json')", token=OTHER_TOKEN)
    done(client, "api.auth_check(name); api.auth_check(name, write=True)")
    failed(client, "GatedRepoError", "api.auth_check(name)", token=OTHER_TOKEN)
    assert "403" in failed(client, "HfHubHTTPError", "api.auth_check(name, write=True)", token=READ_TOKEN)
    done(client, "hf_hub_download(name, 'config.json'); api.create_repo('lab/model')")
    for owner in ("another", "audience"):
        assert "don't have the rights" in failed(client, "HfHubHTTPError", f"api.create_repo('{owner}/model')")


def result(dataset="{type: d, name: d}", metric="{type: a, value: 1}"):
    return f"model-index: [{{name: m, results: [{{task: {{type: t}}, dataset: {dataset}, metrics: [{metric}]}}]}}]"


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ("just words", "must be a mapping"),
        ("a: [", "YAML Metadata Error"),
        ("license: MIT License", '"license"'),
        ("base_model_relation: pruned", '"base_model_relation"'),
        ("tags: pruned", '"tags"'),
        ("model-index: [{name: m}]", '"model-index[0].results" must be an array'),
        (result(dataset="{type: d}"), '"model-index[0].results[0].dataset.name" is required'),
        (result(metric="{type: a}"), '"model-index[0].results[0].metrics[0].value" is required'),
    ],
)
def test_wrong_metadata_is_noticed(metadata, problem):
    (error,), warnings = card_problems(f"---\n{metadata}\n---\nA card.\n")
    assert problem in error
    assert warnings == []


def test_metadata_is_checked_before_a_commit(hub, client):
    hub.create_repo(NAME)
    commit = "api.create_commit(name, [CommitOperationAdd('README.md', sys.argv[1].encode())], commit_message='Card')"
    wrong = "---\nlicense: MIT License\n---\nA card.\n"
    assert '"license" must be' in failed(client, "ValueError", commit, wrong)
    assert hub.commit_posts == 0
    failed(client, "ValueError", "ModelCard(sys.argv[1]).validate()", wrong)
    done(client, "ModelCard(sys.argv[1]).validate()", f"---\nbase_model_relation: finetune\n{result()}\n---\nA card.\n")


def test_lost_answers_and_broken_connections(hub, client, folder):
    hub.create_repo(NAME)
    content = ("GET", "xet-write-token") if client.xet else ("PUT", "^/lfs/")
    for place in (("POST", "/preupload/"), content):
        for fault in ({"status": 503}, {"cut": "before"}, {"cut": "middle"}, {"cut": "after"}):
            hub.fail(*place, **fault)
    broken = hub.fail(*content, cut="before", times=None)
    completed = client.python(IMPORTS + PUSH, folder)
    assert completed.returncode == 1
    assert broken.hits > 0
    assert hub.commit_posts == 0
    hub.faults.clear()
    for fault, commits in (({"status": 500}, 1), ({"cut": "before"}, 1), ({"cut": "middle"}, 1), ({"cut": "after"}, 2)):
        hub.fail("POST", "/commit/", **fault)
        assert client.python(IMPORTS + PUSH, folder).returncode == 1
        assert len(hub.repos[NAME].commits()) == commits
    done(client, PUSH, folder)
    assert len(hub.repos[NAME].commits()) == 2
    hub.fail("GET", "/lfs/|xet-read-token|/resolve/", cut="middle", times=3)
    fetched = done(client, "print(snapshot_download(name))")
    assert (folder / fetched / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_processes_end_as_they_would_and_can_be_stopped(hub, client):
    assert client.cli("--version").stdout.startswith("hf-prune ")
    assert client.cli("no-such-command").returncode == 2
    completed = client.python(
        "import os, sys; os.write(1, b'low'); print('high'); sys.exit('said')", env={"COLUMNS": "80"}
    )
    assert (completed.returncode, completed.stdout, completed.stderr) == (1, "lowhigh\n", "said\n")
    assert client.run("platform").stdout
    assert client.run(os.mkdir, str(client.folder / "made")).returncode == 0
    assert (client.folder / "made").is_dir()
    with pytest.raises(TimeoutError, match="begun"):
        client.python("print('begun', flush=True)\nwhile True: pass", timeout=0.5)
    hub.fail("GET", "whoami", delay=60)
    running = client.start("huggingface_hub:whoami")
    while not hub.count("GET", "whoami"):
        pass
    os.kill(running.pid, signal.SIGINT)
    assert "KeyboardInterrupt" in running.wait().stderr
