"""A SavedModel reads each fact once, and tells nothing of files that are others by now."""

import os

import pytest
import torch
from models import bert
from reads import counted_reads
from safetensors.torch import load_file, save_file

from hf_prune import PruningConfig
from hf_prune.config.pruning import save_configs
from hf_prune.errors import ReportError
from hf_prune.publish.card import make_files
from hf_prune.saved import zeros
from hf_prune.saved.files import weight_files
from hf_prune.saved.model import SavedModel
from hf_prune.saved.report import make_report

QUERY = "bert.encoder.layer.0.attention.self.query.weight"


@pytest.fixture
def folder(tmp_path):
    bert().save_pretrained(tmp_path, max_shard_size="10KB")
    return tmp_path


def change_a_weight(folder):
    """Make one weight zero, in a file of the same size, as an hour ago."""
    for path in weight_files(folder):
        tensors = load_file(path)
        if QUERY in tensors:
            tensors[QUERY].view(-1)[0] = 0
            save_file(tensors, path, {"format": "pt"})
            earlier = path.stat().st_mtime_ns - 3600 * 10**9
            os.utime(path, ns=(earlier, earlier))
            return path
    raise AssertionError(QUERY)


def test_everything_that_takes_a_folder_reads_a_saved_model_once(folder):
    with counted_reads() as reads:
        saved = SavedModel(folder)
        hashes = saved.hashes
        first, second = make_report(saved), make_report(saved)
        files = make_files(saved)
    files_once = {str(path): 1 for path in weight_files(folder)}
    assert len(files_once) > 1
    assert reads == {"skeletons": {str(folder): 1}, "counts": files_once, "hashes": files_once}
    assert first == second == make_report(folder)
    assert files == make_files(folder)
    assert hashes == SavedModel(folder).hashes


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    with counted_reads() as reads:
        SavedModel.of(SavedModel(tmp_path / "nowhere"))
    assert not any(reads.values())


def test_a_saved_model_is_given_back_while_its_files_are_as_they_were(folder):
    saved = SavedModel(folder)
    assert saved.hashes
    assert SavedModel.of(saved) is saved
    (folder / "README.md").write_text("# A card")
    (folder / "run_record.json").write_text("{}")
    (folder / "sparsity.json").write_text("{}")
    assert SavedModel.of(saved) is saved


def test_a_changed_weight_is_read_anew(folder):
    saved = SavedModel(folder)
    before = (make_report(saved), saved.hashes)
    path = change_a_weight(folder)
    after = (make_report(saved), SavedModel.of(saved).hashes)
    zeros_of = [{tensor.name: tensor.zeros for tensor in found.tensors} for found, _ in (before, after)]
    assert {name for name in zeros_of[0] if zeros_of[0][name] != zeros_of[1][name]} == {QUERY}
    assert [name for name in before[1] if before[1][name] != after[1][name]] == [path.name]


def test_another_pruning_configuration_is_read_anew(folder):
    saved = SavedModel(folder)
    assert len(make_report(saved).prunable) > 1
    save_configs([PruningConfig(sparsity=0.5, targets=[QUERY])], folder)
    assert [tensor.name for tensor in make_report(saved).prunable] == [QUERY]


def test_files_that_come_and_go_are_seen(folder):
    saved = SavedModel(folder)
    assert not saved.has_tokenizer
    (folder / "tokenizer.json").write_text("{}")
    assert SavedModel.of(saved).has_tokenizer
    saved = SavedModel(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ReportError, match="contains neither"):
        make_report(saved)


@pytest.mark.parametrize("fact", ["hashes", "tensors"])
def test_a_file_that_changed_after_the_object_was_made_is_refused_by_name(folder, fact):
    saved = SavedModel(folder)
    path = change_a_weight(folder)
    with pytest.raises(ReportError, match=rf"{path.name} was changed while the files were read"):
        getattr(saved, fact)
    assert getattr(SavedModel.of(saved), fact)


def test_a_file_that_changes_while_zeros_are_counted_is_refused(folder, monkeypatch):
    count = zeros.count_zeros

    def count_and_change(file):
        yield from count(file)
        change_a_weight(folder)

    saved = SavedModel(folder)
    monkeypatch.setattr(zeros, "count_zeros", count_and_change)
    with pytest.raises(ReportError, match="was changed"):
        make_report(saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.bool])
def test_zeros_of_every_kind_are_counted(tmp_path, dtype):
    values = torch.tensor([0.0, -0.0, 1.0, 3.0, 0.0, 2.0]).to(dtype)
    save_file(
        {"a": values, "scalar": torch.tensor(0).to(dtype), "none": torch.zeros(0, 4, dtype=dtype)}, tmp_path / "m"
    )
    found = [(name, shape, count) for name, shape, _, count, _ in zeros.count_zeros(tmp_path / "m")]
    assert found == [("a", (6,), 3), ("none", (0, 4), 0), ("scalar", (), 1)]


def test_not_a_number_is_not_zero(tmp_path):
    save_file({"a": torch.tensor([float("nan"), 0.0, float("inf")])}, tmp_path / "m")
    assert [found for *_, found, _ in zeros.count_zeros(tmp_path / "m")] == [1]
