"""Folders of packed models: what is copied, what is refused, and that they come back."""

import json
import shutil

import pytest
import torch
from models import bert, llama

import hf_prune
from hf_prune import Pruner, PruningConfig
from hf_prune.errors import ArgumentError, PackedError, ReportError, StaleRecordError
from hf_prune.packed import files
from hf_prune.packed.config_text import with_entry, without_entry
from hf_prune.publish.card import make_files, write_card
from hf_prune.publish.push_plan import NOTHING_THERE, choose_files, make_push_plan
from hf_prune.publish.record import Evaluation, RunRecord, load_record, save_record
from hf_prune.saved.model import SavedModel
from hf_prune.saved.report import make_report

CONFIG = PruningConfig(sparsity=0.9, schedule="one_shot", begin=1)


@pytest.fixture(autouse=True)
def small_tensors_are_packed(monkeypatch):
    monkeypatch.setattr(files, "_SMALLEST", 100)


@pytest.fixture
def dense(tmp_path):
    """A pruned model with masks, configuration, record and card."""
    folder = tmp_path / "dense"
    pruner = Pruner(bert(), CONFIG, 10)
    pruner.step()
    pruner.model.save_pretrained(folder)
    pruner.save(folder)
    record = RunRecord(
        name="films",
        pruning=[CONFIG.to_dict()],
        steps=10,
        evaluations=[Evaluation(metrics={"accuracy": 0.75}, main_metric="accuracy", samples=10)],
        weights=SavedModel(folder).hashes,
    )
    save_record(folder, record)
    write_card(folder)
    return folder


def content_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_comes_back_bit_for_bit(dense, tmp_path):
    before = content_of(dense)
    packed = hf_prune.save_packed(dense, tmp_path / "packed")
    unpacked = hf_prune.unpack(packed.folder, tmp_path / "again")
    after = content_of(tmp_path / "again")
    assert b"packed" not in after["README.md"]
    assert after | {"README.md": before["README.md"]} == before  # a card names the folder
    assert packed.dense_bytes == (dense / "model.safetensors").stat().st_size == unpacked.dense_bytes
    assert packed.packed_bytes == (packed.folder / "model.safetensors").stat().st_size < packed.dense_bytes
    assert content_of(packed.folder).keys() == before.keys()


def test_shards_and_their_index_come_back(tmp_path):
    llama().save_pretrained(tmp_path / "dense", max_shard_size="8KB")
    hf_prune.save_packed(tmp_path / "dense", tmp_path / "packed")
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 2
    hf_prune.unpack(tmp_path / "packed", tmp_path / "again")
    assert content_of(tmp_path / "again") == content_of(tmp_path / "dense")


def test_a_model_is_packed_without_a_folder(tmp_path):
    model = bert()
    hf_prune.save_packed(model, tmp_path / "packed")
    again = type(model).from_pretrained(tmp_path / "packed")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_bfloat16_is_said_in_the_configuration_and_measurements_are_forgotten(dense, tmp_path):
    hf_prune.save_packed(dense, tmp_path / "packed", dtype="bfloat16")
    model = type(bert()).from_pretrained(tmp_path / "packed")
    expected = type(bert()).from_pretrained(dense, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in expected.state_dict().items())
    assert load_record(tmp_path / "packed").evaluations == []
    hf_prune.unpack(tmp_path / "packed", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_model_of_sentence_transformers_is_packed_where_it_lies(tmp_path):
    folder = tmp_path / "dense"
    bert().save_pretrained(folder / "0_Transformer")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    modules = [
        {"idx": 0, "path": "0_Transformer", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    packed = hf_prune.save_packed(folder, tmp_path / "packed")
    assert [file.name for file in packed.files] == ["0_Transformer/model.safetensors"]
    assert (tmp_path / "packed" / "1_Pooling" / "config.json").exists()
    hf_prune.unpack(tmp_path / "packed", tmp_path / "again")
    assert content_of(tmp_path / "again") == content_of(folder)


def test_training_state_and_checkpoints_stay_behind(dense, tmp_path):
    (dense / "optimizer.pt").write_bytes(b"x")
    (dense / ".hidden").write_bytes(b"x")
    (dense / "checkpoint-5").mkdir()
    (dense / "checkpoint-5" / "model.safetensors").write_bytes(b"x")
    hf_prune.save_packed(dense, dense / "packed")
    assert not {"optimizer.pt", ".hidden", "checkpoint-5"} & {path.name for path in (dense / "packed").iterdir()}
    chosen, _ = choose_files(dense, {"model.safetensors"}, with_masks=False, include=["packed/*"])
    assert {"packed/model.safetensors", "packed/config.json", "model.safetensors"} <= chosen.keys()  # both in one push


# ---- Reports, records and cards ----


def test_zeros_are_counted_in_packed_files(dense, tmp_path):
    hf_prune.save_packed(dense, tmp_path / "packed")
    one, other = make_report(dense), make_report(tmp_path / "packed")
    assert other.note is None
    assert other.prunable_sparsity == pytest.approx(0.9, abs=0.01)
    assert one.tensors == other.tensors
    assert other.file_bytes < one.file_bytes


def test_a_card_says_bytes_and_how_to_open_the_model(dense, tmp_path):
    hf_prune.save_packed(dense, tmp_path / "packed")
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path / "packed", dense)]
    card = (tmp_path / "packed" / "README.md").read_text()
    assert f"The files are packed: {sizes[0]:,} bytes in place of {sizes[1]:,}." in card
    assert f"| bytes on disk, packed | {sizes[0]:,} |\n| bytes unpacked | {sizes[1]:,} |" in card
    assert "import hf_prune  # unpacks the weights\nfrom transformers import" in card
    assert "0.75" in card
    assert "packed" not in (dense / "README.md").read_text()


def test_a_packed_folder_is_pushed_with_its_measurements(dense, tmp_path):
    hf_prune.save_packed(dense, tmp_path / "packed")
    plan = make_push_plan(tmp_path / "packed", "ada/films", NOTHING_THERE)
    assert {"model.safetensors", "config.json", "README.md", "run_record.json"} <= plan.files.keys()
    assert plan.sparsity == make_report(dense).sparsity


def test_a_card_of_changed_packed_weights_is_refused(dense, tmp_path):
    hf_prune.save_packed(dense, tmp_path / "packed")
    hf_prune.save_packed(bert(), tmp_path / "other")
    shutil.copyfile(tmp_path / "other" / "model.safetensors", tmp_path / "packed" / "model.safetensors")
    with pytest.raises(StaleRecordError):
        make_files(tmp_path / "packed")


# ---- What is refused, before anything is written ----


def test_bad_input_is_refused_and_nothing_is_written(dense, tmp_path):
    hf_prune.save_packed(dense, tmp_path / "packed")
    before = {path.name for path in tmp_path.iterdir()}
    (tmp_path / "empty").mkdir()
    for call, error, message in (
        (lambda: hf_prune.save_packed(tmp_path / "packed", tmp_path / "x"), PackedError, "quantised or packed"),
        (lambda: hf_prune.unpack(dense, tmp_path / "x"), PackedError, "expected the configuration of a packed model"),
        (lambda: hf_prune.save_packed(dense, tmp_path / "packed"), PackedError, "expected a new or empty folder"),
        (lambda: hf_prune.save_packed(dense, tmp_path / "x", dtype="int4"), PackedError, "dtype: expected bfloat16"),
        (lambda: hf_prune.save_packed(tmp_path / "empty", tmp_path / "x"), ReportError, "contains neither"),
        (lambda: hf_prune.save_packed(None, tmp_path / "x"), ArgumentError, "expected a model, a folder or a name"),
    ):
        with pytest.raises(error, match=message):
            call()
    assert {path.name for path in tmp_path.iterdir()} == {*before, "empty"}


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"a": ', '{"quantization_config": 3}'])
def test_configurations_that_are_none_are_refused(text):
    for edit in (with_entry, without_entry):
        with pytest.raises(PackedError, match="expected"):
            edit(text)


@pytest.mark.parametrize("text", ['{"a": 1}', '{\n  "a": [1, {"b": 2}]\n}\n', ' {"a": "}"} \n\n', '{"a":NaN}'])
def test_the_text_of_a_configuration_comes_back(text):
    packed = with_entry(text)
    assert json.loads(packed)["quantization_config"] == {"quant_method": "hf_prune", "format_version": 1}
    assert without_entry(packed) == text
    edited = json.dumps(json.loads(packed))
    assert json.loads(without_entry(edited), parse_constant=str) == json.loads(text, parse_constant=str)
