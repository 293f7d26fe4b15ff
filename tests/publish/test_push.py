"""Pushes by the genuine client, in processes of its own, to the stand-in Hub: what arrives, and what failures say."""

import json
import os
import re
import shutil
import signal
import time

import pytest
import torch
from hub_server import OTHER_TOKEN, READ_TOKEN, WRITE_TOKEN, User
from reads import of_weights
from safetensors.torch import load_file, save_file
from shrunk import LAYERS, NEURONS, save_shrunk
from test_run import quiet_run, reviews, save_tiny_bert, write_csv, write_recipe

from hf_prune import PruningConfig
from hf_prune.publish.card import forget_measurements
from hf_prune.saved.report import make_report
from hf_prune.saved.unit_scores import write_unit_scores

REPO = "somebody/sparse"

# What a push of the model below sends, and what it leaves out.
SENT = {
    *("README.md", "sparsity.json", "run_record.json", "assets/layers.png", "assets/schedule.png"),
    *("config.json", "model.safetensors", "pruning_config.json", "tokenizer.json", "tokenizer_config.json"),
}
LEFT_OUT = {
    *("training_args.bin", "optimizer.pt", "trainer_state.json", "checkpoint-2/", "_unfinished/", "notes.log"),
    *("pruning_masks.safetensors", "pruning_state.json", ".env", "model-00001-of-00002.safetensors"),
}


@pytest.fixture(params=["lfs", "xet"])
def client(request):
    """A client for each of the two ways that large files take."""
    return request.getfixturevalue(f"{request.param}_client")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """What a recipe left, with things beside the model that do not belong to it; no test may change it."""
    folder = tmp_path_factory.mktemp("run")
    save_tiny_bert(folder / "material")
    write_csv(folder / "reviews.csv", reviews())
    shutil.move(folder / "material", folder / "model")
    path = write_recipe(folder, folder, dense={}, pruning__sparsity=0.75, training__eval_strategy="epoch")
    quiet_run(path)
    model = folder / "out" / "model"
    for name in LEFT_OUT:
        if name.endswith("/"):
            (model / name).mkdir()
            (model / name / "model.safetensors").write_bytes(b"no part of it")
        elif not (model / name).exists():
            (model / name).write_bytes(b"no part of it")
    return model


@pytest.fixture
def model(run_folder, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(run_folder, tmp_path / "model")


def push(client, model, *options, repo=REPO, **settings):
    return client.cli("push", model, repo, *options, **settings)


def pushed(client, model, *options, **settings):
    done = push(client, model, *options, **settings)
    assert done.returncode == 0, done.stderr
    return done


def failed(client, model, *options, returncode=1, **settings):
    """What a push that fails says: lines of ours on standard error, and no traceback."""
    done = push(client, model, *options, **settings)
    assert done.returncode == returncode, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    lines = [line.removeprefix("hf-prune: ") for line in done.stderr.splitlines() if line.startswith("hf-prune: ")]
    assert lines
    return "\n".join(lines)


def figures(content):
    """The sparsities that a card's text and its sparsity.json say."""
    card, counted = content["README.md"].decode(), json.loads(content["sparsity.json"])
    prunable, overall = re.search(r"\*\*([\d.]+%) of the prunable weights and ([\d.]+%) of all weights", card).groups()
    assert (prunable, overall) == (f"{counted['prunable_sparsity']:.2%}", f"{counted['overall_sparsity']:.2%}")
    return prunable, overall


# ---- What arrives ----


def test_a_push_is_one_commit_of_the_model_its_card_and_nothing_else(hub, client, model):
    done = pushed(client, model)
    commits = hub.repos[REPO].commits()
    assert len(commits) == 2  # the Hub's own, and ours
    there = hub.repos[REPO].files()
    assert set(there) - {".gitattributes"} == SENT
    assert {name: content for name, content in there.items() if name != ".gitattributes"} == {
        name: (model / name).read_bytes() for name in SENT
    }
    assert commits[-1].oid in done.stdout
    assert f"Verified on the Hub: {len(SENT)} files" in done.stdout
    assert not hub.repos[REPO].private


def test_what_was_cut_out_is_sent_with_a_smaller_model_and_its_masks_and_scores_are_not(hub, lfs_client, tmp_path):
    folder = tmp_path / "small"
    weights = PruningConfig(sparsity=0.5, begin=1, end=1, frequency=1, targets=[r".*attention.*query\.weight"])
    save_shrunk(folder, [NEURONS, LAYERS, weights])
    write_unit_scores(folder, {"neurons of bert.encoder.layer.0": torch.zeros(6).double()})
    done = pushed(lfs_client, folder)
    there = set(hub.repos[REPO].files()) - {".gitattributes"}
    assert there == {
        *("README.md", "sparsity.json", "config.json", "model.safetensors", "pruning_config.json"),
        *("pruning_structure.json", "assets/units.png", "assets/layers.png"),
    }
    for name in ("pruning_masks.safetensors", "pruning_state.json", "pruning_unit_scores.safetensors"):
        assert (folder / name).exists()
        assert f"{name} " in done.stdout.split("Not uploaded")[1]
    assert "2 of 4 layers were removed" in hub.repos[REPO].files()["README.md"].decode()
    script = (
        "import sys; from transformers import AutoModelForSequenceClassification as Auto; "
        "model = Auto.from_pretrained(sys.argv[1]); "
        "print(len(model.bert.encoder.layer), model.config.intermediate_size)"
    )
    assert lfs_client.python(script, REPO).stdout.split() == ["2", "6"]


def test_the_record_of_an_earlier_smaller_model_is_removed_with_it(hub, lfs_client, model, tmp_path):
    save_shrunk(tmp_path / "small")
    pushed(lfs_client, tmp_path / "small", "--with-masks")
    assert {"pruning_structure.json", "pruning_state.json"} <= set(hub.repos[REPO].files())
    pushed(lfs_client, model)
    assert set(hub.repos[REPO].files()) - {".gitattributes"} == SENT


def test_what_is_left_out_is_listed(hub, lfs_client, model):
    done = pushed(lfs_client, model)
    listed = done.stdout.split("Not uploaded")[1]
    assert {name for name in LEFT_OUT if f"{name} " not in listed} == set()


def test_a_file_that_is_left_out_is_sent_if_it_is_named(hub, lfs_client, model):
    done = pushed(lfs_client, model, "--include", "notes.*", "--dry-run")
    assert "notes.log" in done.stdout.split("Not uploaded")[0]
    assert "hf-prune push --include NAME uploads" in done.stdout
    pushed(lfs_client, model, "--include", "notes.*")
    assert set(hub.repos[REPO].files()) - {".gitattributes"} == {*SENT, "notes.log"}


def test_an_unchanged_model_is_not_sent_again(hub, client, model):
    pushed(client, model)
    commits, puts = hub.commit_posts, hub.lfs_puts
    done = pushed(client, model)
    assert (hub.commit_posts, hub.lfs_puts) == (commits, puts)
    assert len(hub.repos[REPO].commits()) == 2
    assert "the Hub has all files already" in done.stdout


def test_of_a_changed_model_only_what_changed_is_sent(hub, client, model):
    pushed(client, model)
    commits, puts = hub.commit_posts, hub.lfs_puts
    config = json.loads((model / "config.json").read_text()) | {"hidden_dropout_prob": 0.25}
    (model / "config.json").write_text(json.dumps(config))
    done = pushed(client, model)
    assert "Uploading 1 file to" in done.stdout
    assert (hub.commit_posts, hub.lfs_puts) == (commits + 1, puts)
    assert hub.repos[REPO].files()["config.json"] == (model / "config.json").read_bytes()


def test_a_private_repository_is_made(hub, lfs_client, model):
    pushed(lfs_client, model, "--private")
    assert hub.repos[REPO].private


def test_a_public_repository_is_refused_for_a_private_push(hub, lfs_client, model):
    hub.create_repo(REPO)
    said = failed(lfs_client, model, "--private")
    assert "a private repository was requested" in said
    assert hub.commit_posts == 0


def test_a_name_alone_is_one_of_the_user(hub, lfs_client, model):
    pushed(lfs_client, model, repo="alone")
    assert set(hub.repos) == {"somebody/alone"}


@pytest.mark.parametrize("there", [False, True])
def test_a_branch_is_committed_to_and_made_if_need_be(hub, client, model, there):
    hub.create_repo(REPO)
    if there:
        hub.repos[REPO].branches["other/one"] = list(hub.repos[REPO].commits())
    pushed(client, model, "--revision", "other/one")
    assert set(hub.repos[REPO].files("other/one")) - {".gitattributes"} == SENT
    assert set(hub.repos[REPO].files()) == {".gitattributes"}


def test_a_pull_request_leaves_the_main_branch_alone(hub, client, model):
    hub.create_repo(REPO)
    done = pushed(client, model, "--create-pr")
    assert set(hub.repos[REPO].files()) == {".gitattributes"}
    assert set(hub.repos[REPO].files("refs/pr/1")) - {".gitattributes"} == SENT
    assert "discussions/1" in done.stdout


def test_masks_are_sent_if_they_are_asked_for_and_go_when_they_are_not(hub, lfs_client, model):
    pushed(lfs_client, model, "--with-masks")
    masks = {"pruning_masks.safetensors", "pruning_state.json"}
    assert set(hub.repos[REPO].files()) - {".gitattributes"} == SENT | masks
    pushed(lfs_client, model)
    assert set(hub.repos[REPO].files()) - {".gitattributes"} == SENT


def test_weights_under_other_names_do_not_stay_beside_the_new_ones(hub, lfs_client, model):
    old = {f"model-0000{number}-of-00002.safetensors": b"old" for number in (1, 2)}
    others = {"pytorch_model.bin": b"old", "onnx/model.onnx": b"a person's", "notes.md": b"a person's"}
    hub.create_repo(REPO, old | others | {"model.safetensors.index.json": b"{}"})
    done = pushed(lfs_client, model)
    assert set(hub.repos[REPO].files()) - {".gitattributes"} == SENT | {"onnx/model.onnx", "notes.md"}
    assert done.stdout.count("will be removed") == 4


def test_a_dry_run_shows_the_plan_and_writes_nothing(hub, lfs_client, model):
    before = {path: path.stat().st_mtime_ns for path in model.rglob("*")}
    done = pushed(lfs_client, model, "--dry-run")
    assert hub.repos == {}
    assert {path for verb, path in hub.requests if verb not in ("GET", "HEAD")} == {"/api/validate-yaml"}
    assert {path: path.stat().st_mtime_ns for path in model.rglob("*")} == before
    assert {name for name in SENT | LEFT_OUT if name not in done.stdout} == set()
    assert "(will be created)" in done.stdout


def test_a_dry_run_without_the_hub_shows_the_plan_all_the_same(hub, lfs_client, model):
    done = pushed(lfs_client, model, "--dry-run", env={"HF_TOKEN": ""}, token=False)
    assert "The state of the repository on the Hub is unknown" in done.stdout
    assert "(not known whether" in done.stdout
    assert "model.safetensors" in done.stdout


def test_a_sharded_model_is_sent_whole(hub, lfs_client, model):
    (model / "model-00001-of-00002.safetensors").unlink()
    shard_up(model)
    done = lfs_client.cli("card", "--without-measurements", model)
    assert done.returncode == 0, done.stderr
    pushed(lfs_client, model)
    names = {name for name in hub.repos[REPO].files() if name.startswith("model")}
    assert names == {
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }


def shard_up(folder):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map = {name: f"model-0000{1 + (at % 2)}-of-00002.safetensors" for at, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


LOAD = """
import json, sys
from huggingface_hub import snapshot_download
from transformers import AutoModelForSequenceClassification, AutoTokenizer
name = sys.argv[1]
model, problems = AutoModelForSequenceClassification.from_pretrained(name, output_loading_info=True)
assert not any(problems.values()), problems
AutoTokenizer.from_pretrained(name)
print(json.dumps([snapshot_download(name), sum(int((p == 0).sum()) for p in model.parameters())]))
assert "hf_prune" not in str(type(model))
"""


def test_what_was_pushed_opens_by_its_name_and_is_as_sparse_as_its_card_says(hub, client, model):
    pushed(client, model)
    done = client.python(LOAD, REPO)
    assert done.returncode == 0, done.stderr
    folder, zeros = json.loads(done.stdout)
    counted = make_report(folder)
    assert sum(tensor.zeros for tensor in counted.tensors) == zeros
    content = {name: (model / name).read_bytes() for name in ("README.md", "sparsity.json")}
    assert figures(content) == (f"{counted.prunable_sparsity:.2%}", f"{counted.sparsity:.2%}") == ("75.00%", "51.50%")
    assert figures(hub.repos[REPO].files()) == figures(content)
    pushed(client, folder, repo="somebody/again")  # a snapshot in the cache, all links
    assert set(hub.repos["somebody/again"].files()) == set(hub.repos[REPO].files())


def test_the_snippets_of_a_pushed_card_run_as_they_stand(hub, lfs_client, model):
    pushed(lfs_client, model)
    card = hub.repos[REPO].files()["README.md"].decode()
    usage, check, _ = re.findall(r"```python\n(.*?)\n```", card, re.DOTALL)
    assert f'"{REPO}"' in usage
    done = lfs_client.python(usage)
    assert done.returncode == 0, done.stderr
    assert "score" in done.stdout
    done = lfs_client.python(check)
    assert done.stdout.strip() == f"{figures(hub.repos[REPO].files())[1]} of all weights are zero"
    done = lfs_client.cli("report", REPO, "--json")
    assert json.loads(done.stdout)["overall"]["sparsity"] == make_report(model).sparsity


@pytest.fixture
def recipe(tmp_path):
    save_tiny_bert(tmp_path / "material" / "model")
    write_csv(tmp_path / "material" / "reviews.csv", reviews())
    return write_recipe(tmp_path, tmp_path / "material", dense={}, training__max_steps=2)


TO_THE_HUB = ["training.push_to_hub=true", "training.hub_model_id=somebody/film", f"training.hub_token={WRITE_TOKEN}"]


def test_a_recipe_pushes_the_pruned_model_at_its_end(hub, lfs_client, recipe):
    done = lfs_client.cli("run", recipe, *TO_THE_HUB, "training.hub_private_repo=true", token=False)
    assert done.returncode == 0, done.stderr
    repo = hub.repos["somebody/film"]
    assert repo.private
    assert len(repo.commits()) == 2
    folder = recipe.parent / "out" / "model"
    assert repo.files()["README.md"] == (folder / "README.md").read_bytes()
    assert repo.files()["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert repo.commits()[-1].oid in done.stdout
    written = [path.read_bytes() for path in (recipe.parent / "out").rglob("*") if path.is_file()]
    assert [content for content in [*written, *repo.files().values()] if WRITE_TOKEN.encode() in content] == []
    assert WRITE_TOKEN not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("token", "repo", "expected"),
    [
        (READ_TOKEN, "somebody/film", "the token permits only reading"),
        (READ_TOKEN, "somebody/there", "the token does not permit this"),
        (OTHER_TOKEN, "somebody/there", "the token does not permit this"),
        (
            WRITE_TOKEN,
            "another/film",
            "another is neither somebody, the user of the token, nor one of its organizations",
        ),
        (WRITE_TOKEN, "audience/film", "somebody may only read what belongs to audience"),
        (WRITE_TOKEN, "a/b/c", "expected USER/REPO"),
        (False, "somebody/film", "log in with `hf auth login`"),
        (False, "somebody/there", "log in with `hf auth login`"),
    ],
)
def test_a_recipe_that_may_not_push_is_refused_before_it_trains(hub, lfs_client, recipe, token, repo, expected):
    hub.create_repo("somebody/there")
    options = ["training.push_to_hub=true", f"training.hub_model_id={repo}"]
    done = lfs_client.cli("run", recipe, *options, token=token)
    assert done.returncode == 1
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert set(hub.repos) == {"somebody/there"}
    assert len(hub.repos["somebody/there"].commits()) == 1
    assert not (recipe.parent / "out").exists()


CHECK = """
import sys
from hf_prune.errors import PushError
from hf_prune.publish.push import check_push
for name in sys.argv[1:]:
    try:
        check_push(name)
    except PushError as error:
        print(error)
    else:
        print("yes")
"""


def test_a_token_may_create_repositories_where_it_says_so(hub, lfs_client):
    hub.users["hf_fine"] = User("somebody", "fineGrained", {"lab": "contributor"}, scoped=("lab",))
    names = ["lab/new", "somebody/new", "Lab/new", "new"]
    no = "cannot be created: the token permits no writing to repositories of somebody; permit it, or use another"
    expected = ["yes", f"somebody/new {no}", "yes", f"somebody/new {no}"]
    assert lfs_client.python(CHECK, *names, token="hf_fine").stdout.splitlines() == expected
    assert lfs_client.python(CHECK, *names).stdout.splitlines() == ["yes"] * 4
    assert {verb for verb, _ in hub.requests} == {"GET"}


RUN_AND_COUNT = """
import json, sys
from reads import counted_reads
from hf_prune.recipe.loading import load_recipe
from hf_prune.recipe.run import run
with counted_reads() as reads:
    run(load_recipe(sys.argv[1], sys.argv[2:]))
print(json.dumps(reads))
"""


def test_a_recipe_that_pushes_reads_the_model_it_saved_once(hub, lfs_client, recipe):
    done = lfs_client.python(RUN_AND_COUNT, recipe, *TO_THE_HUB)
    assert done.returncode == 0, done.stderr
    reads = json.loads(done.stdout.splitlines()[-1])
    model = recipe.parent / "out" / "model"
    assert hub.repos["somebody/film"].files()["model.safetensors"] == (model / "model.safetensors").read_bytes()
    assert reads["skeletons"] == {str(model): 1}
    assert reads["counts"] == {str(model / "model.safetensors"): 1}
    assert of_weights(reads["hashes"]) == {str(model / "model.safetensors"): 1}


PUSH_AND_COUNT = """
import json, sys
from reads import counted_reads
from hf_prune.cli.commands import app
with counted_reads() as reads:
    app(sys.argv[1:], standalone_mode=False)
print(json.dumps(reads))
"""


@pytest.mark.parametrize("command", ["push", "card"])
def test_a_command_reads_a_sharded_model_once(hub, lfs_client, model, command):
    (model / "model-00001-of-00002.safetensors").unlink()
    shard_up(model)
    forget_measurements(model)
    done = lfs_client.python(PUSH_AND_COUNT, command, model, *([REPO] if command == "push" else []))
    assert done.returncode == 0, done.stderr
    reads = json.loads(done.stdout.splitlines()[-1])
    once = {str(model / f"model-0000{number}-of-00002.safetensors"): 1 for number in (1, 2)}
    assert (reads["skeletons"], reads["counts"]) == ({str(model): 1}, once)
    assert of_weights(reads["hashes"]) == once


def test_a_recipe_whose_push_fails_has_all_its_results_all_the_same(hub, lfs_client, recipe):
    hub.fail("POST", "/commit/", status=500, times=None)
    done = lfs_client.cli("run", recipe, *TO_THE_HUB)
    assert done.returncode == 1
    assert "the Hub has a server error" in done.stderr
    out = recipe.parent / "out"
    assert json.loads((out / "results.json").read_text())["pruned"]
    hub.faults.clear()
    pushed(lfs_client, out / "model")


# ---- The card and what a person wrote ----


def test_what_persons_wrote_here_and_on_the_hub_survives_the_next_push(hub, lfs_client, model):
    pushed(lfs_client, model)
    repo = hub.repos[REPO]
    online = repo.files()["README.md"].decode()
    online = online.replace("<!-- hf-prune: end summary -->", "<!-- hf-prune: end summary -->\n\nWritten online.")
    online = online.replace("library_name: transformers", "library_name: transformers\nthumbnail: a.png")
    hub_edit(repo, "README.md", online)
    card = (model / "README.md").read_text()
    (model / "README.md").write_text(
        card.replace("<!-- hf-prune: end usage -->", "<!-- hf-prune: end usage -->\nHere.")
    )
    pushed(lfs_client, model)
    there = repo.files()["README.md"].decode()
    assert there == (model / "README.md").read_text()
    assert re.search(r"end summary -->\s+Written online\.\s+<!-- hf-prune: begin sparsity", there)
    assert re.search(r"end usage -->\s+Here\.\s+<!-- hf-prune: begin reproduce", there)
    assert "thumbnail: a.png" in there
    commits = hub.commit_posts
    pushed(lfs_client, model)
    assert hub.commit_posts == commits


def test_what_persons_changed_or_deleted_since_the_last_push_stays_so(hub, lfs_client, model):
    card = (model / "README.md").read_text()
    for name in ("summary", "size", "usage"):
        end = f"<!-- hf-prune: end {name} -->"
        card = card.replace(end, f"{end}\n\nAfter {name}.")
    (model / "README.md").write_text(card.replace("library_name:", "thumbnail: a.png\nlibrary_name:"))
    pushed(lfs_client, model)
    repo = hub.repos[REPO]
    there = repo.files()["README.md"].decode()
    assert all(f"After {name}." in there for name in ("summary", "size", "usage"))
    hub_edit(repo, "README.md", there.replace("After summary.", "Changed online.").replace("thumbnail: a.png\n", ""))
    here = (model / "README.md").read_text()
    (model / "README.md").write_text(here.replace("After size.", "Changed here.").replace("After usage.\n", ""))
    assert lfs_client.cli("card", model).returncode == 0  # a card made in between forgets nothing of that
    pushed(lfs_client, model)
    there = repo.files()["README.md"].decode()
    assert there == (model / "README.md").read_text()
    assert ("Changed online." in there, "Changed here." in there) == (True, True)
    assert "After" not in there
    assert "thumbnail" not in there
    commits = hub.commit_posts
    pushed(lfs_client, model)
    assert hub.commit_posts == commits


def test_a_push_to_another_repository_takes_nothing_from_the_card(hub, lfs_client, model):
    card = (model / "README.md").read_text()
    end = "<!-- hf-prune: end size -->"
    (model / "README.md").write_text(card.replace(end, f"{end}\n\nMine."))
    pushed(lfs_client, model)
    hub.create_repo("somebody/other", {"README.md": card.encode()})
    for repo in ("somebody/other", "somebody/new"):
        pushed(lfs_client, model, repo=repo)
        assert "Mine." in hub.repos[repo].files()["README.md"].decode()
    hub.reset()  # the repository is deleted, and made again
    hub.create_repo(REPO, {"README.md": card.encode()})
    pushed(lfs_client, model, repo=REPO)
    assert "Mine." in hub.repos[REPO].files()["README.md"].decode()


def test_a_model_from_another_folder_takes_nothing_from_the_card_on_the_hub(
    hub, lfs_client, run_folder, model, tmp_path
):
    card = (model / "README.md").read_text()
    (model / "README.md").write_text(
        card.replace("<!-- hf-prune: end size -->", "<!-- hf-prune: end size -->\n\nMine.")
    )
    pushed(lfs_client, model)
    other = shutil.copytree(run_folder, tmp_path / "other")
    pushed(lfs_client, other)
    assert "Mine." in hub.repos[REPO].files()["README.md"].decode()


def hub_edit(repo, name, text):
    tree = dict(repo.tree())
    tree[name] = type(tree[name])(text.encode())
    repo.commit("main", tree, "Edited online", author="somebody")


def test_a_card_of_a_person_alone_gets_our_parts_beside_it(hub, lfs_client, model):
    (model / "README.md").unlink()
    hub.create_repo(REPO, {"README.md": b"---\nlicense: mit\n---\n# All mine\n\nMy words.\n"})
    pushed(lfs_client, model)
    there = hub.repos[REPO].files()["README.md"].decode()
    assert "# All mine\n\nMy words." in there
    assert "license: mit" in there
    assert "51.50% of all weights are zero" in there


def test_one_changed_weight_is_refused_until_there_is_a_new_card(hub, client, model):
    weights = load_file(model / "model.safetensors")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    weights[name].view(-1)[int(weights[name].view(-1).nonzero()[0])] = 0
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    said = failed(client, model, returncode=2)
    assert "model.safetensors has changed since" in said
    assert hub.repos == {}
    assert client.cli("card", "--without-measurements", model).returncode == 0
    pushed(client, model)
    there = hub.repos[REPO].files()
    counted = make_report(model)
    assert figures(there) == (f"{counted.prunable_sparsity:.2%}", f"{counted.sparsity:.2%}")
    assert "begin evaluation" not in there["README.md"].decode()
    zeros = sum(tensor.zeros for tensor in counted.prunable)
    assert f"{zeros:,}" in there["README.md"].decode()
    assert zeros == 3584 * 3 // 4 + 1


def test_a_card_whose_parts_were_damaged_is_refused_with_its_line(hub, lfs_client, model):
    card = (model / "README.md").read_text().replace("<!-- hf-prune: end sparsity -->", "")
    (model / "README.md").write_text(card)
    assert "'sparsity'" in failed(lfs_client, model, returncode=2)
    assert hub.repos == {}


def test_a_card_that_the_hub_does_not_take_is_told_before_anything_is_sent(hub, lfs_client, model):
    card = (model / "README.md").read_text().replace("library_name:", "license: '%%%'\nlibrary_name:")
    (model / "README.md").write_text(card)
    said = failed(lfs_client, model)
    assert "nothing was uploaded" in said
    assert '"license"' in said
    assert hub.repos == {}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere", REPO], "nowhere: expected a folder with a saved model, found nothing"),
        (["{model}/config.json", REPO], "found a file"),
        (["{model}", "a/b/c"], "expected USER/REPO"),
        (["{model}", REPO, "--create-pr", "--revision", "x"], "revision: must not be set with a pull request"),
        (["{model}", REPO, "--revision", "a b"], "revision: expected the name of a branch, got 'a b'"),
        (["{model}", REPO, "--revision", "refs/pr/7"], "revision: 'refs/pr/7' does not exist in somebody/sparse"),
        (["{model}", REPO, "--include", "nothing.*"], "'nothing.*' matches none"),
        (["{model}/assets", REPO], "expected a saved model with config.json, found none"),
    ],
    ids=["no folder", "a file", "no name", "both", "no branch", "no pull request", "no file", "no model"],
)
def test_arguments_that_make_no_sense_are_told_in_a_line(hub, lfs_client, model, arguments, expected):
    done = lfs_client.cli("push", *(argument.format(model=model) for argument in arguments))
    assert done.returncode in (1, 2)
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert hub.repos == {}


# ---- Faults: a clear error, and a second run that completes ----


@pytest.mark.parametrize("status", [500, 503])
@pytest.mark.parametrize("path", ["/preupload/", "/commit/", "/api/validate-yaml", "/repos/create"])
def test_a_hub_in_trouble_is_told_and_a_second_run_completes(hub, lfs_client, model, path, status):
    fault = hub.fail("POST", path, status=status, times=None)
    said = failed(lfs_client, model)
    assert "the Hub has a server error" in said
    assert "nothing" in said
    assert fault.hits
    hub.faults.clear()
    pushed(lfs_client, model)
    assert set(hub.repos[REPO].files()) - {".gitattributes"} == SENT


def test_a_short_trouble_is_not_even_noticed(hub, lfs_client, model):
    hub.fail("POST", "/preupload/", status=503)
    hub.fail("PUT", "/lfs/", status=503)
    pushed(lfs_client, model)


def test_a_connection_that_is_cut_while_files_go_up(hub, lfs_client, model):
    fault = hub.fail("PUT", "/lfs/", cut="middle", times=None)
    said = failed(lfs_client, model)
    assert "The push to somebody/sparse failed" in said
    assert "it has nothing of this push" in said
    assert fault.hits >= 6
    assert set(hub.repos[REPO].files()) == {".gitattributes"}
    hub.faults.clear()
    pushed(lfs_client, model)
    assert set(hub.repos[REPO].files()) - {".gitattributes"} == SENT


def test_large_files_that_are_up_already_are_not_sent_again(hub, lfs_client, model):
    hub.fail("POST", "/commit/", cut="before")
    assert "it has nothing of this push" in failed(lfs_client, model)
    puts = hub.lfs_puts
    assert puts == 3
    pushed(lfs_client, model)
    assert hub.lfs_puts == puts
    assert len(hub.repos[REPO].commits()) == 2


def test_a_lost_answer_to_the_commit_is_told_and_a_second_run_finds_all_there(hub, lfs_client, model):
    hub.fail("POST", "/commit/", cut="after")
    said = failed(lfs_client, model)
    assert f"has all {len(SENT)} files" in said
    assert "only the Hub's response was lost" in said
    puts = hub.lfs_puts
    done = pushed(lfs_client, model)
    assert "the Hub has all files already" in done.stdout
    assert hub.lfs_puts == puts
    assert len(hub.repos[REPO].commits()) == 2


def test_a_lost_answer_to_a_pull_request_makes_no_second_one(hub, client, model):
    hub.create_repo(REPO)
    hub.fail("POST", "/commit/", cut="after")
    assert "refs/pr/1 of somebody/sparse has all files" in failed(client, model, "--create-pr")
    done = pushed(client, model, "--create-pr")
    assert "refs/pr/1 has all files already" in done.stdout
    assert hub.repos[REPO].pull_requests == ["refs/pr/1"]


def test_what_the_hub_made_of_a_push_is_compared(hub, lfs_client, model):
    hub.create_repo(REPO)
    hub.fail("GET", "/tree/", delay=1, times=None)
    running = lfs_client.start_cli("push", model, REPO)
    wait_until(lambda: len(hub.repos[REPO].commits()) == 2)
    tree = hub.repos[REPO].commits()[-1].tree
    tree["config.json"] = type(tree["config.json"])(b"{}")
    del tree["tokenizer.json"]
    done = running.wait()
    assert done.returncode == 1
    assert "differ from those here" in done.stderr
    assert "config.json, tokenizer.json" in done.stderr


def test_a_push_that_cannot_be_read_back_says_so(hub, lfs_client, model):
    hub.create_repo(REPO)
    hub.fail("POST", "/commit/", delay=1.5)
    running = lfs_client.start_cli("push", model, REPO)
    wait_until(lambda: hub.commit_posts)
    hub.fail("GET", "/tree/", status=500, times=None)
    done = running.wait()
    assert done.returncode == 1
    assert "could not be read back" in done.stderr


def test_a_lost_answer_on_the_xet_path_is_told_too(hub, xet_client, model):
    hub.fail("POST", "/commit/", cut="after")
    assert "only the Hub's response was lost" in failed(xet_client, model)
    pushed(xet_client, model)
    assert len(hub.repos[REPO].commits()) == 2


def test_without_a_token_for_xet_files_take_the_other_way_or_it_is_told(hub, xet_client, model):
    hub.fail("GET", "xet-write-token", status=403, times=None)
    if push(xet_client, model).returncode == 0:  # older clients
        assert hub.lfs_puts == 3
    else:
        assert "it has nothing of this push" in failed(xet_client, model)


def test_somebody_elses_commit_in_between_is_not_overwritten(hub, lfs_client, model):
    hub.create_repo(REPO, {"config.json": b"theirs"})
    hub.fail("POST", "/preupload/", delay=2)
    running = lfs_client.start_cli("push", model, REPO)
    wait_until(lambda: hub.count("POST", "/preupload/"))
    hub_edit(hub.repos[REPO], "config.json", "theirs, newer")
    done = running.wait()
    assert done.returncode == 1
    assert "changed by somebody else in the meantime" in done.stderr
    assert hub.repos[REPO].files()["config.json"] == b"theirs, newer"
    pushed(lfs_client, model)


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_slow_hub_is_waited_for(hub, lfs_client, model):
    hub.fail("POST", "/commit/", delay=1.5)
    pushed(lfs_client, model)


def test_an_interrupted_push_leaves_the_hub_as_it_was(hub, lfs_client, model):
    hub.create_repo(REPO)
    hub.fail("PUT", "/lfs/", delay=30, times=None)
    running = lfs_client.start_cli("push", model, REPO)
    wait_until(lambda: hub.count("PUT", "/lfs/"))
    os.killpg(running.pid, signal.SIGKILL)
    assert running.wait().returncode != 0
    assert set(hub.repos[REPO].files()) == {".gitattributes"}
    hub.faults.clear()
    pushed(lfs_client, model)


def test_a_folder_that_changes_while_it_is_pushed_is_noticed(hub, lfs_client, model):
    hub.create_repo(REPO)
    hub.fail("POST", "/preupload/", delay=2)
    running = lfs_client.start_cli("push", model, REPO)
    wait_until(lambda: hub.count("POST", "/preupload/"))
    shutil.copy(model / "pruning_masks.safetensors", model / "model.safetensors")
    done = running.wait()
    assert done.returncode == 1
    assert "model.safetensors" in done.stderr


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        ("hf_nobody_knows_this_one", "the Hub does not accept the token"),
        (READ_TOKEN, "the token does not permit this"),
        (OTHER_TOKEN, "the token does not permit this"),
        (False, "log in with `hf auth login`"),
    ],
    ids=["wrong", "read-only", "another's", "none"],
)
@pytest.mark.parametrize("there", [False, True], ids=["new", "there"])
def test_a_token_that_will_not_do_is_told_and_never_shown(hub, client, model, token, expected, there):
    if there:
        hub.create_repo(REPO)
    before = dict(hub.repos[REPO].files()) if there else None
    done = push(client, model, token=token)
    assert done.returncode == 1, done.stdout
    assert expected in done.stderr
    assert (dict(hub.repos[REPO].files()) if there else None) == before
    for secret in filter(None, (token, WRITE_TOKEN)):
        assert secret not in done.stdout + done.stderr
        assert not [path for path in model.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


@pytest.mark.parametrize("token", ["hf_write_of_somebody", "a-token-of-another-kind"])
def test_a_token_that_the_hub_echoes_is_not_shown(hub, lfs_client, model, token):
    hub.users["a-token-of-another-kind"] = hub.users[WRITE_TOKEN]
    hub.fail("POST", "/commit/", status=403, headers={"X-Error-Message": f"no right with {token} for that"})
    done = push(lfs_client, model, token=token)
    assert done.returncode == 1
    assert "no right with [token] for that" in done.stderr
    assert token not in done.stdout + done.stderr


def test_what_the_hub_refused_is_not_to_be_run_again(hub, lfs_client, model):
    hub.create_repo(REPO)
    hub.fail("POST", "/commit/", status=403)
    said = failed(lfs_client, model)
    assert "it has nothing of this push." in said
    assert "Push again" not in said


def test_another_users_private_repository_is_as_good_as_none(hub, lfs_client, model):
    hub.create_repo("another/secret", private=True)
    assert "does not permit this" in failed(lfs_client, model, repo="another/secret")


def test_access_that_must_be_granted_is_told(hub, lfs_client, model):
    hub.create_repo("another/gated", {"README.md": b"Ask first."}, gated=True)
    said = failed(lfs_client, model, repo="another/gated")
    assert "access to the repository is restricted" in said
    assert hub.commit_posts == 0


def test_an_offline_client_says_so(hub, lfs_client, model):
    source = """
from huggingface_hub import constants
from hf_prune.cli.commands import main
constants.HF_HUB_OFFLINE = True
main()
"""
    done = lfs_client.python(source, "push", model, REPO)
    assert done.returncode == 1
    assert "HF_HUB_OFFLINE is set" in done.stderr


def test_signed_addresses_are_not_shown(hub, lfs_client, model):
    hub.fail("PUT", "/lfs/", status=403, times=None)
    said = failed(lfs_client, model)
    assert "signature" not in said


def test_a_file_that_holds_a_token_is_refused(hub, lfs_client, model):
    with (model / "README.md").open("a") as file:
        file.write("hf_" + "aB3" * 11)
    said = failed(lfs_client, model, returncode=2)
    assert "README.md: contains what looks like a Hub token" in said
    assert hub.repos == {}


def test_a_folder_that_cannot_be_written_to_is_pushed_all_the_same(hub, lfs_client, model):
    source = "import sys, hf_prune.publish.push as h\nfrom hf_prune.cli.commands import main\n"
    source += "def refuse(*a): raise OSError(30, 'Read-only file system')\nh.write_files = refuse\nmain()"
    (model / "README.md").unlink()
    done = lfs_client.python(source, "push", model, REPO)
    assert done.returncode == 0, done.stderr
    assert "The card is uploaded, but not saved here" in done.stdout
    assert "hf-prune: begin" in hub.repos[REPO].files()["README.md"].decode()


def test_a_dry_run_tells_what_the_push_would_be_refused_for(hub, lfs_client, model):
    hub.create_repo(REPO)
    assert "a private repository was requested" in pushed(lfs_client, model, "--dry-run", "--private").stdout
    card = (model / "README.md").read_text().replace("library_name:", "license: '%%%'\nlibrary_name:")
    (model / "README.md").write_text(card)
    assert "The Hub refused the card" in pushed(lfs_client, model, "--dry-run").stdout
