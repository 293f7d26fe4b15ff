import json
import re

import pytest
import torch
from models import ARCHITECTURES, bert
from safetensors.numpy import load_file, save_file

from hf_prune import PruningConfig
from hf_prune.config.pruning import save_configs
from hf_prune.errors import ReportError, StaleRecordError
from hf_prune.publish.record import Evaluation, RunRecord
from hf_prune.publish.sparsity_json import Figures, count_figures
from hf_prune.saved.files import SavedFile, saved_files, weight_files
from hf_prune.saved.report import totals_of
from hf_prune.saved.zeros import TensorReport

# What is pruned by default, by its names in the files, written out for each model.
PRUNABLE = {
    "bert": r"bert\.encoder\.layer\.\d\..*(query|key|value|dense)\.weight",
    "albert": r"albert\.encoder\.albert_layer_groups\..*(query|key|value|dense|ffn|ffn_output)\.weight",
    "gpt2": r"transformer\.h\.\d\.(attn|mlp)\.(c_attn|c_proj|c_fc)\.weight",
    "t5": r"(encoder|decoder)\.block\.\d\.layer\.\d\..*\.(q|k|v|o|wi|wo)\.weight",
    "mixtral": r"model\.layers\.\d\.(self_attn\.[qkvo]_proj|block_sparse_moe\.experts\.\d\.w[123])\.weight",
    "resnet": r"resnet\.encoder\.stages\..*\.convolution\.weight",
}


def save_sparse(name, folder, share=0.3):
    """A tiny model with about this share of zeros in every parameter, saved."""
    model = ARCHITECTURES[name].build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[torch.rand_like(parameter) < share] = 0
    model.save_pretrained(folder)
    return model


def record_of(folder, **values):
    return RunRecord(**{"name": "a model", "weights": saved_files(weight_files(folder))} | values)


def recount(folder, pattern=""):
    """Values and zeros of the tensors in a folder's files whose names match, counted by numpy."""
    values = zeros = 0
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if re.fullmatch(pattern, name) or not pattern:
                values += tensor.size
                zeros += int((tensor == 0).sum())
    return values, zeros


def flip_a_weight(folder):
    """Change one weight that is not zero, and no size."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = next(name for name, tensor in weights.items() if tensor.ndim == 2)
    weights[name].flat[weights[name].argmax()] *= 2
    save_file(weights, file, metadata={"format": "pt"})


# ---- What is counted ----


@pytest.mark.parametrize("name", PRUNABLE)
def test_figures_are_those_of_an_independent_recount(name, tmp_path):
    save_sparse(name, tmp_path)
    figures = count_figures(tmp_path, record_of(tmp_path))
    overall, prunable = totals_of(figures.tensors), totals_of(figures.prunable)
    assert (overall.weights, overall.zeros) == recount(tmp_path)
    assert (prunable.weights, prunable.zeros) == recount(tmp_path, PRUNABLE[name])
    assert figures.overall_sparsity == overall.zeros / overall.weights
    assert figures.prunable_sparsity == prunable.zeros / prunable.weights
    assert figures.file_bytes == (tmp_path / "model.safetensors").stat().st_size
    assert figures.architecture == type(ARCHITECTURES[name].build()).__name__
    assert figures.note is None


def test_figures_are_plain_json(tmp_path):
    save_sparse("mixtral", tmp_path)
    figures = count_figures(tmp_path, record_of(tmp_path))
    assert Figures.model_validate_json(json.dumps(figures.model_dump(), allow_nan=False)) == figures


def test_without_a_record_the_folder_gives_its_name(tmp_path):
    save_sparse("bert", tmp_path / "my model")
    figures = count_figures(tmp_path / "my model")
    assert figures.model == "my model"
    assert (figures.pruning, figures.target_sparsity, figures.evaluations, figures.metadata) == ([], None, [], {})


def test_without_a_record_the_configuration_beside_the_model_is_told(tmp_path):
    save_sparse("bert", tmp_path)
    config = PruningConfig(sparsity=0.5, targets=[r".*query\.weight"])
    save_configs([config], tmp_path)
    figures = count_figures(tmp_path)
    assert figures.pruning == [config.to_dict()]
    assert {tensor.name for tensor in figures.prunable} == {
        f"bert.encoder.layer.{layer}.attention.self.query.weight" for layer in (0, 1)
    }


def test_the_record_gives_name_target_and_evaluations(tmp_path):
    save_sparse("bert", tmp_path)
    evaluations = [
        Evaluation(metrics={"accuracy": 0.5}, main_metric="accuracy"),
        Evaluation(metrics={"f1": 0.25}, main_metric="f1", part="test", not_finite=["loss"]),
    ]
    figures = count_figures(tmp_path, record_of(tmp_path, target_sparsity=0.5, evaluations=evaluations))
    assert (figures.model, figures.target_sparsity) == ("a model", 0.5)
    assert figures.evaluations == evaluations
    assert Figures.model_validate_json(json.dumps(figures.model_dump(), allow_nan=False)) == figures


@pytest.mark.parametrize(("name", "found"), [("tokenizer.json", True), ("vocab.txt", False)])
def test_a_tokenizer_is_seen(name, found, tmp_path):
    save_sparse("bert", tmp_path)
    (tmp_path / name).write_text("{}", encoding="utf-8")
    assert count_figures(tmp_path).has_tokenizer is found


def test_totals_are_sums_and_of_nothing_the_share_is_zero():
    tensors = [
        TensorReport(name="a", shape=[90], weights=90, zeros=9, prunable=True),
        TensorReport(name="b", shape=[10], weights=10, zeros=9, prunable=False),
    ]
    assert totals_of(tensors).sparsity == 18 / 100
    assert totals_of([]).sparsity == 0
    assert [tensor.sparsity for tensor in tensors] == [0.1, 0.9]


# ---- Weights that were not measured ----


def test_a_weight_that_was_changed_since_is_refused(tmp_path):
    save_sparse("bert", tmp_path)
    record = record_of(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    flip_a_weight(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size == size
    with pytest.raises(StaleRecordError, match=r"model\.safetensors has changed since.*--without-measurements"):
        count_figures(tmp_path, record)


def test_weights_in_other_files_are_refused(tmp_path):
    save_sparse("bert", tmp_path)
    record = record_of(tmp_path)
    model = bert()
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    with pytest.raises(StaleRecordError, match="has changed since"):
        count_figures(tmp_path, record)


def test_a_record_of_no_weights_is_refused(tmp_path):
    save_sparse("bert", tmp_path)
    with pytest.raises(StaleRecordError):
        count_figures(tmp_path, record_of(tmp_path, weights={}))
    with pytest.raises(StaleRecordError):
        count_figures(tmp_path, record_of(tmp_path, weights={"model.safetensors": SavedFile(size=1, sha256="a")}))


def test_without_weights_there_are_no_figures(tmp_path):
    with pytest.raises(ReportError, match="contains neither model"):
        count_figures(tmp_path)


# ---- What is not known ----


@pytest.mark.parametrize("content", ["{", "[]", "null", '"text"', '{"architectures": {"a": 1}}', b"\xff"])
def test_a_broken_configuration_is_noted_and_all_is_counted(content, tmp_path):
    save_sparse("bert", tmp_path)
    (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    figures = count_figures(tmp_path)
    assert figures.note
    assert figures.architecture is None
    assert figures.prunable_sparsity is None
    assert (totals_of(figures.tensors).weights, totals_of(figures.tensors).zeros) == recount(tmp_path)


@pytest.mark.parametrize("names", [["NobodysModel"], ["pass"], "BertForSequenceClassification", [None], []])
def test_a_class_that_transformers_has_not_is_not_told(names, tmp_path):
    save_sparse("bert", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"architectures": names}))
    assert count_figures(tmp_path).architecture is None


@pytest.mark.parametrize("changes", [{"model_type": None}, {"model_type": "nobodys"}, {"hidden_size": "wide"}], ids=str)
def test_a_note_does_not_tell_where_the_folder_is(changes, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    save_sparse("bert", folder)
    path = folder / "config.json"
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    monkeypatch.chdir(tmp_path)
    notes = [count_figures(place).note for place in (folder, "model")]
    assert notes[0] == notes[1]
    assert str(tmp_path) not in notes[0]


def test_a_note_of_the_folder_one_is_in_keeps_its_dots(tmp_path, monkeypatch):
    save_sparse("bert", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({"architectures": ["BertModel"], "model_type": "no.such.type"}))
    monkeypatch.chdir(tmp_path / "model")
    assert "no.such.type" in count_figures(".").note
