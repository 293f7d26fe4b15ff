"""A report, its table and a card say how many distinct values were counted in the saved file."""

import json

import pytest
import torch
from models import bert, mixtral
from safetensors.torch import load_file, save_file
from test_commands import printed, read_json, rows

from hf_prune import Pruner, PruningConfig
from hf_prune.publish.card import make_files
from hf_prune.saved.report import make_report

CONFIG = PruningConfig(sparsity=0.5, schedule="one_shot", begin=0, shared_values=4)


def save_sharing(folder, model):
    """A model whose weights share values, saved as a user would."""
    pruner = Pruner(model, CONFIG, total_steps=1)
    model.save_pretrained(folder)
    pruner.save(folder)
    return folder


@pytest.fixture(scope="module")
def sharing_bert(tmp_path_factory):
    torch.manual_seed(0)
    return save_sharing(tmp_path_factory.mktemp("sharing") / "bert", bert())


def test_a_report_counts_the_values_in_the_file(sharing_bert):
    weights = load_file(sharing_bert / "model.safetensors")
    for tensor in make_report(sharing_bert).tensors:
        values = weights[tensor.name][weights[tensor.name] != 0].unique()
        assert tensor.distinct_values == (len(values) if len(values) <= 256 else None), tensor.name
        if tensor.prunable:
            assert tensor.distinct_values == 4
            assert tensor.shares_values
    assert {tensor["distinct_values"] for tensor in read_json("report", sharing_bert, "--json")["tensors"]} >= {4, None}


def test_experts_that_are_saved_one_by_one_count_as_one_tensor(tmp_path):
    save_sharing(tmp_path, mixtral())
    fused = [tensor for tensor in make_report(tmp_path).tensors if "experts" in tensor.name]
    assert fused
    for tensor in fused:
        assert "*" in tensor.saved_as
        assert tensor.distinct_values == 4


def test_the_table_of_a_report_has_a_column_only_where_weights_share_values(sharing_bert, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    text = printed("report", sharing_bert)
    row = next(row for row in rows(text) if row[0] == "bert.encoder.layer.0.output.dense.weight")
    assert row[1:] == ["16x24", "192", "50.00%", "4"]
    assert "values: the number of distinct values other than zero" in text
    bert().save_pretrained(tmp_path)
    assert "distinct values" not in printed("report", tmp_path)


def test_a_card_says_what_was_counted(sharing_bert, tmp_path):
    line = "Distinct values: at most 4 other than zero in each prunable tensor, counted in the saved files."
    files = make_files(sharing_bert)
    assert line in files["README.md"].decode()
    assert "han2016deep" in files["README.md"].decode()
    assert 'pruning_config=PruningConfig(method="keep", shared_values=4),' in files["README.md"].decode()
    assert json.loads(files["sparsity.json"])["pruning"][0]["shared_values"] == 4
    bert().save_pretrained(tmp_path)
    assert "Shared values" not in make_files(tmp_path)["README.md"].decode()


def test_a_card_says_of_how_many_tensors_it_holds(sharing_bert, tmp_path):
    weights = load_file(sharing_bert / "model.safetensors")
    name = "bert.encoder.layer.0.output.dense.weight"
    weights[name] = torch.randn(16, 24) * (weights[name] != 0)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for other in ("config.json", "pruning_config.json"):
        (tmp_path / other).write_bytes((sharing_bert / other).read_bytes())
    assert "other than zero in 11 prunable tensors" in make_files(tmp_path)["README.md"].decode()
