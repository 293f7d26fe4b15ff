"""Which files a push sends, and what it refuses, without a Hub."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from models import bert
from safetensors.torch import load_file, save_file
from test_run import save_tiny_bert

from hf_prune.errors import CardError, PushError, ReportError
from hf_prune.publish.card import write_card
from hf_prune.publish.push import _Pushed, _remember
from hf_prune.publish.push_plan import NOTHING_THERE, choose_files, make_push_plan
from hf_prune.publish.redact import find_secret

REPOSITORY = Path(__file__).parents[2]

CARD = 'A plot: ![zeros](assets/own%20plot.png) and <img width="9" src="./assets/two.svg"> and ![](https://a.b/c.png)'

# A sentence-transformers model with code of its own, and what lies beside it.
BELONGS = {
    "model.safetensors": "",
    "config.json": json.dumps(
        {"auto_map": {"AutoConfig": "configuration_own.C", "AutoModel": "a/b--modeling_other.M"}}
    ),
    "generation_config.json": "{}",
    "configuration_own.py": "from .layers_own import Layer",
    "layers_own.py": "from .configuration_own import C",
    "custom_generate/generate.py": "from .decode import decode",
    "custom_generate/decode.py": "",
    "tokenizer_config.json": json.dumps({"tokenizer_class": "PhobertTokenizer", "auto_map": [None, "tokens_own.T"]}),
    "tokens_own.py": "",
    "vocab.txt": "",
    "bpe.codes": "",
    "qformer_tokenizer/tokenizer.json": "{}",
    "chat_template.jinja": "",
    "additional_chat_templates/tools.jinja": "",
    "processor_config.json": json.dumps({"image_processor": {"auto_map": {"AutoImageProcessor": "images_own.P"}}}),
    "images_own.py": "",
    "modules.json": json.dumps([{"path": "", "type": "modules_own.M"}, {"path": "1_Pooling"}, {"path": "2_Dense"}]),
    "modules_own.py": "",
    "1_Pooling/config.json": "{}",
    "2_Dense/model.safetensors": "",
    "README.md": CARD,
    "LICENSE": "",
    "sparsity.json": "{}",
    "run_record.json": "{}",
    "assets/own plot.png": "",
    "assets/two.svg": "",
}
NOT_READ = {
    *("service-account.json", "train.json", "predictions.txt", "run_train.py", "modeling_other.py", "spiece.model"),
    *("_x.json", "events.out.tfevents.1", "assets/other.png", "1_Pooling/notes.json", "2_Dense/pytorch_model.bin"),
}
OTHERS = {
    **dict.fromkeys(NOT_READ, "not read by the model's classes"),
    **dict.fromkeys(("training_args.bin", "rng_state_0.pth"), "training state"),
    **dict.fromkeys(("runs/", "dense/"), "a folder that is not part of the model"),
    "other.safetensors": "weights that the model does not load",
    "pruning_masks.safetensors": "masks, uploaded with --with-masks",
    ".env": "hidden file",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "model"
    for name in [*BELONGS, *OTHERS]:
        path = folder / (f"{name}model.safetensors" if name.endswith("/") else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(BELONGS.get(name, ""))
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(whole, tmp_path / "model")


def choose(folder, **options):
    return choose_files(folder, ["model.safetensors"], **{"with_masks": False, "card": CARD} | options)


def test_what_the_models_own_classes_read_is_sent_and_nothing_else(whole):
    chosen, left_out = choose(whole)
    assert set(chosen) == set(BELONGS)
    assert all(path == whole / name for name, path in chosen.items())
    assert left_out == OTHERS


def test_vocabularies_are_those_of_the_model_type_if_no_class_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    for name in ("spiece.model", "vocab.txt"):
        (tmp_path / name).touch()
    chosen, _ = choose(tmp_path)
    assert set(chosen) == {"config.json", "spiece.model"}


def test_a_router_at_the_top_has_its_modules_beside_it(tmp_path):
    (tmp_path / "modules.json").write_text('[{"path": "", "type": "sentence_transformers.models.Router"}]')
    (tmp_path / "router_config.json").write_text(json.dumps({"types": {"query_0_Dense": "", "../..": ""}}))
    (tmp_path / "query_0_Dense").mkdir()
    (tmp_path / "query_0_Dense" / "pytorch_model.bin").touch()
    assert set(choose(tmp_path)[0]) == {"modules.json", "router_config.json", "query_0_Dense/pytorch_model.bin"}


def test_files_are_added_by_name(whole):
    chosen, left_out = choose(whole, include=["train.json", "*.txt", "runs/*"], with_masks=True)
    added = {"train.json", "predictions.txt", "runs/model.safetensors", "pruning_masks.safetensors"}
    assert set(chosen) - set(BELONGS) == added
    assert set(OTHERS) - set(left_out) == {"train.json", "predictions.txt", "runs/", "pruning_masks.safetensors"}
    assert ".env" not in choose(whole, include=["*"])[0]
    with pytest.raises(
        PushError, match=r"include: expected names or patterns of files in .*'trian\.json' matches none"
    ):
        choose(whole, include=["*.txt", "trian.json"])


@pytest.mark.parametrize("content", ["{", '{"a": 1}', '["a"]', '[{"path": 1}, 2]', '[{"path": "../out"}]'])
def test_modules_that_cannot_be_read_are_told(tmp_path, content):
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(ReportError, match=r"modules\.json: expected (a list of )?modules"):
        choose(tmp_path)


# ---- Links ----


@pytest.mark.parametrize("through_a_link", [False, True])
def test_no_link_leads_out_of_the_folder(folder, tmp_path, through_a_link):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "config.json").write_text("{}")
    names = ["generation_config.json", "vocab.txt", "LICENSE", "layers_own.py", "assets/two.svg", "2_Dense/config.json"]
    names += ["additional_chat_templates/tools.jinja", "pruning_masks.safetensors", "train.json", "run_record.json"]
    for name in names:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(tmp_path / "outside" / "config.json")
    shutil.rmtree(folder / "qformer_tokenizer")
    (folder / "qformer_tokenizer").symlink_to(tmp_path / "outside")
    (folder / "merges.json").symlink_to("tokenizer_config.json")
    if through_a_link:
        (tmp_path / "link").symlink_to(folder)
        folder = tmp_path / "link"
    chosen, left_out = choose(folder, with_masks=True, include=["train.json", "merges.json"])
    assert set(chosen) == {*BELONGS, "merges.json"} - {*names, "qformer_tokenizer/tokenizer.json"}
    outside = {name for name, reason in left_out.items() if reason == "a link to outside the folder"}
    assert outside == {*names, "qformer_tokenizer/"}


def test_names_that_no_file_can_have_hinder_nothing(folder):
    (folder / "x_config.json").write_text(json.dumps({"auto_map": {"AutoModel": f"{'a' * 5000}.M"}}))
    (folder / "router_config.json").write_text(json.dumps({"types": {"a\0b": "R"}}))
    chosen, _ = choose_files(folder, {"model.safetensors"}, False, card=f"{CARD} ![]({'a' * 5000}.png) ![](a%00.png)")
    assert set(chosen) == {*BELONGS, "router_config.json"}


def test_what_was_pushed_is_not_noted_through_a_link(tmp_path):
    (tmp_path / "mine").write_text("text")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / ".pushed_card.json").symlink_to(tmp_path / "mine")
    _remember(tmp_path / "model", _Pushed("a/b", None, "0a", "# Card"))
    assert (tmp_path / "mine").read_text() == "text"
    assert json.loads((tmp_path / "model" / ".pushed_card.json").read_text())["card"] == "# Card"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "README.md", "run_record.json", "assets"])
def test_a_card_is_not_made_of_what_lies_outside(tmp_path, name):
    bert().save_pretrained(tmp_path / "model")
    (tmp_path / "outside").mkdir()
    path = tmp_path / "model" / name
    if path.exists():
        path.rename(tmp_path / "outside" / name)
    path.symlink_to(tmp_path / "outside" / name)
    with pytest.raises(ReportError, match="expected a file in the folder, got a link to outside"):
        write_card(tmp_path / "model")
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("shared", [False, True])
def test_a_snapshot_of_the_hubs_cache_is_sent_whole_and_its_blobs_stay_as_they_are(tmp_path, shared):
    bert().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("---\nlicense: mit\n---\nA card.\n")
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / ("0" * 40), tmp_path / "models--a--b" / "blobs"
    for made in (snapshot, blobs, tmp_path / "blobs" / "ab"):
        made.mkdir(parents=True)
    for number, file in enumerate(sorted((tmp_path / "model").iterdir())):
        blob = blobs / str(number)
        file.rename(blob)
        if shared and file.suffix == ".safetensors":
            blob = blob.rename(tmp_path / "blobs" / "ab" / str(number))
            (blobs / str(number)).symlink_to(Path("..", "..", "blobs", "ab", str(number)))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    (snapshot / "LICENSE").symlink_to(Path("..", "..", "..", "outside"))
    (tmp_path / "outside").touch()
    before = {path: path.read_bytes() for path in tmp_path.rglob("blobs/**/*") if path.is_file()}
    plan = make_push_plan(snapshot, "a/b", NOTHING_THERE)
    own = {"README.md", "sparsity.json", "assets/layers.png"}
    assert set(plan.files) == {"config.json", "model.safetensors"} | own
    assert plan.left_out == {"LICENSE": "a link to outside the folder"}
    write_card(snapshot)
    assert "hf-prune: begin" in (snapshot / "README.md").read_text()
    assert {path: path.read_bytes() for path in before} == before


# ---- Secrets ----

LETTERS = "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7" * 4
SECRETS = [
    *("-----BEGIN PRIVATE KEY-----", "-----BEGIN RSA PRIVATE KEY-----", "-----BEGIN PGP PRIVATE KEY BLOCK-----"),
    *(f"AKIA{LETTERS[:16].upper()}", f'"aws_secret_access_key": "{LETTERS[:40]}"', f"AIza{LETTERS[:35]}"),
    *(f"AccountKey={LETTERS[:86]}==", f"Xy-8Q~{LETTERS[:31]}", f"hf_{LETTERS[:34]}", f"ghp_{LETTERS[:36]}"),
    *(f"github_pat_{LETTERS[:22]}_{LETTERS[:59]}", f"glpat-{LETTERS[:20]}", f"sk-{LETTERS[:48]}"),
    *(f"sk-ant-api03-{LETTERS[:40]}", f"xoxb-12345-{LETTERS[:20]}", f"sk_live_{LETTERS[:24]}", f"npm_{LETTERS[:36]}"),
    *(f"pypi-AgEIcHlwaS5vcmc{LETTERS[:70]}", f"123456789:AA{LETTERS[:33]}", f"SG.{LETTERS[:22]}.{LETTERS[:43]}"),
    *(f"gsk_{LETTERS[:52]}", f"xai-{LETTERS[:80]}", f"pplx-{LETTERS[:48]}", f"nvapi-{LETTERS[:64]}"),
    *(f"r8_{LETTERS[:37]}", f"lsv2_pt_{'0a' * 16}_{'0a' * 5}", f"dckr_pat_{LETTERS[:27]}", f"hvs.{LETTERS[:40]}"),
    *(f"glsa_{LETTERS[:32]}_0a1b2c3d", f"WANDB_API_KEY = '{'0a' * 20}'"),
    f"eyJ{LETTERS[:20]}.eyJ{LETTERS[:20]}.{LETTERS[:30]}",
    *(f"M{LETTERS[:23]}.{LETTERS[:6]}.{LETTERS[:27]}", f"N{LETTERS[:25]}.{LETTERS[:6]}.{LETTERS[:38]}"),
    *(f"https://discord.com/api/webhooks/{'1' * 18}/{LETTERS[:68]}", f"key-{'0a' * 16}"),
    *(f"{'0a' * 16}-0a1b2c3d-0a1b2c3d", f"SK{'0a' * 16}", f"TWILIO_AUTH_TOKEN={'0a' * 16}", f"shpat_{'0a' * 16}"),
    *(f"{'0a' * 16}-us12", f"sq0csp-{LETTERS[:43]}"),
    *(f"pcsk_{LETTERS[:6]}_{LETTERS[:62]}", "PINECONE_API_KEY: 01234567-89ab-cdef-0123-456789abcdef"),
    *(f"KGAT_{'0a' * 16}", f'"username": "me", "key": "{"0a" * 16}"', f"KAGGLE_KEY={'0a' * 16}"),
    *(f"wandb_v1_{LETTERS[:77]}", f"wandb.login(key='{'0a' * 20}')", f"wandb.login('{'0a' * 20}')"),
    f"machine api.wandb.ai\n  login user\n  password {'0a' * 20}",
    *("https://me:s3cr3t!@example.org/x.git", "postgres://me:pa55:w0rd@[::1]/db", "redis://me:hunter2@localhost"),
    f"https://a.blob.core.windows.net/b?sv=2022-11-02&sig={LETTERS[:41]}%2B%3D",
    f"https://a.blob.core.windows.net/b?sv=2022-11-02\\u0026sig={LETTERS[:43]}=",
]
NO_SECRETS = [
    *("-----BEGIN PUBLIC KEY-----", "-----BEGIN CERTIFICATE-----", "##AKIA", "AKIA" + "A" * 40, "task-" + "a" * 40),
    *('"pad_token": "<|endoftext|>"', f'"sha256": "{"0a" * 32}"', "sk-learn", "eyJhbGciOi.eyJ", "shelf_" + "a" * 40),
    *("https://example.org:8080/a@b", "https://example.org/user:name@x", "https://{user}:{password}@example.org"),
    *("https://<user>:<token>@example.org", "https://user:password@example.org", "git@example.org:a/b", "://a:b@"),
    *("a machine that learns, a login and a password", f"monkey-{'0a' * 16}", f'"key": "{"0a" * 16}"', "sig=0.5"),
    *("01234567-89ab-cdef-0123-456789abcdef", f"TASK{'0a' * 16}", f"0.{LETTERS[:6]}.{LETTERS[:27]}", "wandb_v1_x"),
]


@pytest.mark.parametrize("text", SECRETS)
def test_a_secret_is_seen_wherever_it_stands(text):
    assert find_secret(f'{{"a": "{text}"}}\n'.encode())
    assert find_secret(text.encode())
    for encoding in ("utf-16", "utf-16-be", "utf-32-le"):
        assert find_secret(f'{{"a": "{text}"}}\n'.encode(encoding))


@pytest.mark.parametrize("text", NO_SECRETS)
def test_what_is_no_secret_is_none(text):
    assert find_secret(f'{{"a": "{text}"}}\n'.encode()) is None


@pytest.fixture
def model(tmp_path):
    bert().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def planned(model, **options):
    return make_push_plan(model, "a/b", NOTHING_THERE, **options)


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "train.json"])
def test_a_file_that_holds_a_secret_is_refused(model, name):
    (model / name).write_text(f"Here: {SECRETS[0]}")
    with pytest.raises(CardError, match=rf"{name}: contains what looks like a private key; remove it"):
        planned(model, include=["train.json"] if name == "train.json" else [])


@pytest.mark.parametrize("name", ["kaggle.json", "netrc", "sub/_netrc"])
def test_a_file_that_programs_keep_passwords_in_is_refused_by_its_name(model, name):
    (model / "sub").mkdir()
    (model / name).write_text("{}")
    with pytest.raises(CardError, match=rf"{name}: is a file that a program keeps a password in; leave it out"):
        planned(model, include=[name])


def test_what_a_model_and_its_tokenizer_consist_of_holds_no_secret(tmp_path):
    save_tiny_bert(tmp_path)
    folders = (tmp_path, *(REPOSITORY / name for name in ("model_cards", "docs", "recipes")))
    files = [path for folder in folders for path in folder.rglob("*.*") if path.is_file()]
    assert len(files) > 20
    assert [path for path in files if find_secret(path.read_bytes()) is not None] == []


def test_a_secret_in_a_file_that_stays_here_hinders_nothing(model):
    (model / "train.json").write_text(SECRETS[0])
    assert planned(model).left_out == {"train.json": "not read by the model's classes"}


@pytest.mark.parametrize("name", ["model.safetensors", "pruning_masks.safetensors"])
def test_a_secret_in_the_metadata_of_safetensors_is_refused(model, name):
    save_file(load_file(model / "model.safetensors"), model / name, {"format": "pt", "by": SECRETS[9]})
    with pytest.raises(CardError, match=rf"{name}: contains what looks like a token of GitHub"):
        planned(model, with_masks=True)


def test_tensors_are_not_searched_for_secrets(model):
    tensors = load_file(model / "model.safetensors")
    save_file(
        tensors | {"text": torch.frombuffer(bytearray(SECRETS[0].encode()), dtype=torch.uint8)},
        model / "model.safetensors",
    )
    assert "model.safetensors" in planned(model).files


def test_a_secret_in_the_copy_of_a_checkpoint_is_refused(model, tmp_path):
    (tmp_path / "state.json").write_text(SECRETS[0])
    with pytest.raises(CardError, match=r"last-checkpoint/state\.json: contains"):
        planned(model, also={"last-checkpoint/state.json": tmp_path / "state.json"})
