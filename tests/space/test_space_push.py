"""`hf-prune push --space` by the genuine client to the stand-in Hub: what arrives, and what is refused before."""

import json

import pytest
import yaml
from hub_server import READ_TOKEN
from running import classifier, save_pair, summariser
from text_models import save_text_model
from transformers import BertConfig, BertModel

from hf_prune.publish.record import Distillation, RunRecord, Source, save_record
from hf_prune.saved.model import SavedModel

MODEL, DENSE, PAGE = "somebody/small", "somebody/dense", "somebody/page"
SPACE = f"spaces/{PAGE}"
FILES = {"README.md", "app.py", "requirements.txt", "space.json", "explain/index.html", ".hf_prune_space.json"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    save_pair(folder, classifier)
    (folder / "pruned" / "explain").mkdir()
    (folder / "pruned" / "explain" / "index.html").write_text("<h1>Explained</h1>")
    return folder


@pytest.fixture
def dense(hub, pair):
    """The dense model, on the Hub."""
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    hub.create_repo(DENSE, {name: (pair / "dense" / name).read_bytes() for name in names})
    return DENSE


def push(client, folder, *options, **settings):
    return client.cli("push", folder, MODEL, "--space", PAGE, *options, **settings)


def pushed(client, folder, *options, **settings):
    done = push(client, folder, *options, **settings)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_page_is_one_commit_of_a_space_and_a_second_push_sends_nothing(hub, lfs_client, pair, dense):
    said = pushed(lfs_client, pair / "pruned", "--dense", dense)
    commits = hub.repos[SPACE].commits()
    assert [commit.summary for commit in commits] == ["initial commit", "Upload page of a pruned model"]
    files = hub.repos[SPACE].files()
    assert set(files) - {".gitattributes"} == FILES
    settings = json.loads(files["space.json"])
    assert (settings["pruned"], settings["dense"]) == (MODEL, DENSE)
    assert yaml.safe_load(files["README.md"].decode().split("---")[1])["models"] == [MODEL, DENSE]
    assert f"{hub.url}/spaces/{PAGE}" in said
    assert commits[-1].oid
    everything = b"".join(files.values())
    assert str(pair).encode() not in everything
    assert lfs_client.token.encode() not in everything
    assert "model.safetensors" in hub.repos[MODEL].files()

    # Somebody changes the README.md in the Space: it stays, and nothing else is sent again.
    repo = hub.repos[SPACE]
    edited = files["README.md"].replace(b"colorTo: blue", b"colorTo: pink")
    changed = hub.create_repo("spaces/somebody/scratch", {"README.md": edited}).tree()["README.md"]
    repo.commit("main", repo.tree() | {"README.md": changed}, "Pink")
    said = pushed(lfs_client, pair / "pruned", "--dense", dense)
    assert f"the Space {PAGE} has all files already" in said
    assert len(repo.commits()) == 3
    assert repo.files()["README.md"] == edited


def test_a_dry_run_shows_both_repositories_and_writes_nothing(hub, lfs_client, pair, dense):
    said = pushed(lfs_client, pair / "pruned", "--dense", dense, "--dry-run")
    assert f"Space {PAGE} (will be created)" in said
    assert all(name in said.split(f"Space {PAGE}")[1] for name in FILES)
    assert "Dry run: nothing was uploaded." in said
    assert set(hub.repos) == {DENSE}


def test_the_recorded_teacher_is_the_dense_model(hub, lfs_client, pair, dense, tmp_path):
    save_text_model(tmp_path / "model", classifier)
    saved = SavedModel(tmp_path / "model")
    teacher = Source(name=dense, hub_name=dense, revision=hub.repos[DENSE].commits()[-1].oid)
    distillation = Distillation(teacher=teacher, temperature=2.0, weight=0.5)
    save_record(saved, RunRecord(name="small", distillation=distillation, weights=saved.hashes))
    pushed(lfs_client, tmp_path / "model")
    settings = json.loads(hub.repos[SPACE].files()["space.json"])
    assert (settings["dense"], settings["dense_revision"]) == (DENSE, teacher.revision)
    assert settings["dense_is"] == "The dense model is the teacher that it was distilled from."


def test_a_base_without_the_task_is_not_the_dense_model(hub, lfs_client, tmp_path):
    save_text_model(tmp_path / "model", classifier)
    BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(tmp_path / "base")
    hub.create_repo("somebody/base", {"config.json": (tmp_path / "base" / "config.json").read_bytes()})
    saved = SavedModel(tmp_path / "model")
    base = Source(name="somebody/base", hub_name="somebody/base")
    save_record(saved, RunRecord(name="small", base_model=base, weights=saved.hashes))
    said = " ".join(pushed(lfs_client, tmp_path / "model").split())
    assert "The page has no dense model: the model that it was made from, somebody/base, is a model for" in said
    settings = json.loads(hub.repos[SPACE].files()["space.json"])
    assert settings["dense"] is None
    assert "shown alone" in settings["dense_is"]


def test_what_is_refused_is_refused_before_anything_is_written(hub, lfs_client, pair, dense, tmp_path):
    save_text_model(tmp_path / "writer", summariser)
    hub.create_repo("spaces/somebody/other", {"app.py": b"print()"})
    before = set(hub.repos)
    model = pair / "pruned"
    for code, message, arguments in (
        (2, "which a Space cannot read. Push it", (model, "--dense", pair / "dense")),
        (2, "--dense: somebody/nothing cannot be read on the Hub", (model, "--dense", "somebody/nothing")),
        (2, "expected a model for text-classification, text-generation, summarization", (tmp_path / "writer",)),
        (2, "--space: must not be set with --create-pr", (model, "--create-pr")),
        (2, "is a Space that hf-prune did not make", (model, "--space", "somebody/other")),
        (1, "another/page cannot be created: another is neither somebody", (model, "--space", "another/page")),
    ):
        done = push(lfs_client, *arguments)
        assert (done.returncode, message in done.stderr) == (code, True), (message, done.stderr)
        assert "Traceback" not in done.stderr
    done = push(lfs_client, model, token=READ_TOKEN)
    assert done.returncode == 1
    assert "the token permits only reading" in done.stderr
    assert set(hub.repos) == before
    assert hub.commit_posts == 0


def test_a_private_page_says_which_secret_it_needs(hub, lfs_client, pair):
    said = pushed(lfs_client, pair / "pruned", "--private")
    assert hub.repos[SPACE].private
    assert hub.repos[MODEL].private
    assert "HF_TOKEN" in said
    assert "HF_TOKEN" in pushed(lfs_client, pair / "pruned")  # the model is still private
    hub.repos[SPACE].private = False
    done = push(lfs_client, pair / "pruned", "--private")
    assert "a private Space was requested, but it exists and is public" in done.stderr
