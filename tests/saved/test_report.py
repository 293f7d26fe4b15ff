import json
import os
import re
import shutil
import weakref

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from models import ARCHITECTURES, albert, bert, gpt2, gpt_oss, llama, mixtral, resnet
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from shrunk import save_shrunk

from hf_prune import Pruner, PruningConfig, PruningStateError, TargetError, load_masks
from hf_prune.config.pruning import save_configs
from hf_prune.errors import ReportError
from hf_prune.model import limits
from hf_prune.model.targets import find_targets
from hf_prune.publish.card import write_card
from hf_prune.publish.sparsity_json import count_figures
from hf_prune.saved import zeros
from hf_prune.saved.report import Report, make_report, share_of_zeros
from hf_prune.saved.zeros import TensorReport


def sparse(model, share=0.3):
    """The model with about this share of the values of every parameter at zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[torch.rand_like(parameter) < share] = 0
    return model


def saved(folder, model, **options):
    sparse(model).save_pretrained(folder, **options)
    return model


def values_in_files(folder):
    """Values and zeros in the safetensors of a folder, counted on whole tensors."""
    tensors = [tensor for file in folder.glob("model*.safetensors") for tensor in load_file(file).values()]
    return sum(tensor.numel() for tensor in tensors), sum(int((tensor.float() == 0).sum()) for tensor in tensors)


def counts(found):
    return {tensor.name: (tensor.shape, tensor.weights, tensor.zeros, tensor.prunable) for tensor in found.tensors}


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


@pytest.mark.parametrize("field", ["targets", "exclude", "overrides"])
def test_an_expression_that_takes_years_to_match_is_refused_with_its_file(field, tmp_path):
    saved(tmp_path, bert())
    save_configs(
        [PruningConfig(sparsity=0.5, **{field: {"(.|.)+!": 0.1} if field == "overrides" else ["(.|.)+!"]})], tmp_path
    )
    with pytest.raises(TargetError, match=r"got '\(\.\|\.\)\+!', which does not") as error:
        make_report(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'pruning_config.json'}: expected regular expressions that match ")
    with pytest.raises(TargetError, match=r"pruning_config\.json: expected regular expressions"):
        write_card(tmp_path)


def test_masks_are_not_loaded_by_an_expression_that_takes_years_to_match(tmp_path):
    Pruner(bert(), PruningConfig(sparsity=0.5, schedule="one_shot", begin=0), 1).save(tmp_path)
    save_configs([PruningConfig(sparsity=0.5, targets=["(.|.)+!"])], tmp_path)
    with pytest.raises(TargetError, match=r"pruning_config\.json: expected regular expressions"):
        load_masks(bert(), tmp_path)


def test_masks_of_a_model_without_some_units_are_not_loaded_into_the_dense_one(tmp_path):
    config = PruningConfig(structure="neurons", sparsity=0.5, begin=0, end=1, frequency=1)
    save_shrunk(tmp_path, [config])
    dense = bert(num_hidden_layers=4)
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    with pytest.raises(
        PruningStateError, match="got a smaller model out of which units were cut; open it with from_pre"
    ):
        load_masks(dense, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


def test_an_expression_that_only_names_of_a_list_of_modules_take_years_to_match_is_refused(tmp_path):
    saved(tmp_path, bert().bert)
    (tmp_path / "modules.json").write_text("[]", encoding="utf-8")
    save_configs([PruningConfig(sparsity=0.5, targets=[r"0\.model(.|.)+!"])], tmp_path)
    with pytest.raises(TargetError, match=r"pruning_config\.json: expected regular expressions"):
        make_report(tmp_path)


# ---- Files that are not what the class expects ----


def change_tensors(folder, change):
    file = folder / "model.safetensors"
    save_file(dict(change(load_file(file))), file, metadata={"format": "pt"})


def packed(tensors):
    for name, tensor in tensors.items():
        if "encoder" in name and name.endswith("dense.weight"):
            yield name.replace("weight", "weight_packed"), tensor.to(torch.int8)
            yield name.replace("weight", "weight_scale"), torch.ones(len(tensor), 1)
        else:
            yield name, tensor


MISFITS = {
    "packed": (packed, "weight_packed"),
    "integers": (lambda ts: ((n, t.to(torch.int8) if "query.weight" in n else t) for n, t in ts.items()), None),
    "compiled": (lambda ts: ((f"_orig_mod.{n}", t) for n, t in ts.items()), "_orig_mod."),
    "pruned by torch": (
        lambda ts: ((n.replace("dense.weight", "dense.weight_orig"), t) for n, t in ts.items()),
        "_orig",
    ),
    "half of the layers": (lambda ts: ((n, t) for n, t in ts.items() if "layer.1" not in n), None),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_files_that_do_not_fit_the_class_have_a_note_and_no_share(kind, tmp_path):
    change, other = MISFITS[kind]
    saved(tmp_path, bert())
    change_tensors(tmp_path, change)
    found = make_report(tmp_path)
    assert re.search(r"of the 12 prunable tensors of BertForSequenceClassification are not in the files", found.note)
    assert other is None or other in found.note
    assert (found.sparsity, found.prunable_sparsity, found.tensors) == (None, None, [])
    plain = json.dumps(found.to_dict())
    assert '"sparsity": 0' not in plain
    figures = count_figures(tmp_path)
    assert (figures.overall_sparsity, figures.prunable_sparsity) == (None, None)
    card = write_card(tmp_path).read_text(encoding="utf-8")
    assert "%" not in card.partition("## ")[0]
    assert "The zeros are not counted: " in card
    assert "pruned" not in ModelCard(card).data.tags


# ---- What is counted ----


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_counts_are_those_of_the_model_that_was_saved(name, tmp_path):
    model = saved(tmp_path, ARCHITECTURES[name].build())
    found = make_report(tmp_path)
    reported = counts(found)
    prunable = {target.name for target in find_targets(model)}
    for parameter_name, parameter in model.named_parameters():
        zeros = int((parameter == 0).sum())
        expected = (tuple(parameter.shape), parameter.numel(), zeros, parameter_name in prunable)
        assert reported.pop(parameter_name) == expected
    assert set(reported) <= {buffer for buffer, _ in model.named_buffers()}
    assert values_in_files(tmp_path) == (
        sum(tensor.weights for tensor in found.tensors),
        sum(tensor.zeros for tensor in found.tensors),
    )
    assert found.note is None


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_file_and_many_give_the_same_counts(name, tmp_path):
    model = saved(tmp_path / "one", ARCHITECTURES[name].build())
    model.save_pretrained(tmp_path / "many", max_shard_size="10KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    one, many = make_report(tmp_path / "one"), make_report(tmp_path / "many")
    assert counts(one) == counts(many)
    assert (one.sparsity, one.prunable_sparsity) == (many.sparsity, many.prunable_sparsity)


def test_tensors_come_in_the_order_of_the_model(tmp_path):
    model = saved(tmp_path, bert(), max_shard_size="10KB")
    names = [tensor.name for tensor in make_report(tmp_path).tensors]
    assert names == [name for name, _ in model.named_parameters()]


def test_experts_that_are_saved_one_by_one_are_reported_as_the_one_parameter_they_are(tmp_path):
    model = saved(tmp_path, mixtral())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        in_file = set(file.keys())
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in in_file
    found = make_report(tmp_path)
    reported = counts(found)
    names = {tensor.name: tensor.saved_as for tensor in found.tensors}
    assert names["model.layers.0.mlp.experts.gate_up_proj"] == "model.layers.0.block_sparse_moe.experts.*.*.weight"
    assert names["model.layers.0.mlp.experts.down_proj"] == "model.layers.0.block_sparse_moe.experts.*.w2.weight"
    assert not any(re.search(r"experts\.\d", name) for name in reported)
    assert {name for name in names.values() if "*" not in name} <= in_file
    for name in ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"):
        weight = model.get_parameter(name)
        assert reported[name] == (tuple(weight.shape), weight.numel(), int((weight == 0).sum()), True)


def test_transposed_experts_and_their_biases_are_told_apart(tmp_path):
    saved(tmp_path, gpt_oss())
    reported = counts(make_report(tmp_path))
    assert reported["model.layers.0.mlp.experts.gate_up_proj"][0] == (4, 16, 48)
    assert reported["model.layers.0.mlp.experts.gate_up_proj"][3] is True
    assert reported["model.layers.0.mlp.experts.gate_up_proj_bias"][3] is False
    assert reported["model.layers.0.mlp.router.weight"][3] is False


def test_tied_weights_count_once(tmp_path):
    model = saved(tmp_path, gpt2())
    assert model.lm_head.weight is model.transformer.wte.weight
    found = make_report(tmp_path)
    assert sum(tensor.weights for tensor in found.tensors) == sum(weight.numel() for weight in model.parameters())
    assert "lm_head.weight" not in counts(found)


def test_layers_that_are_shared_count_once(tmp_path):
    model = saved(tmp_path, albert())
    found = make_report(tmp_path)
    assert sum(tensor.weights for tensor in found.tensors) == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_zeros_are_counted_in_every_precision(dtype, tmp_path):
    saved(tmp_path, bert())
    weights = {name: tensor.to(dtype) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    reported = counts(make_report(tmp_path))
    assert {name: zeros for name, (_, _, zeros, _) in reported.items()} == {
        name: int((weight.float() == 0).sum()) for name, weight in weights.items()
    }


def test_negative_zero_is_zero_and_the_smallest_number_is_not(tmp_path):
    saved(tmp_path, bert())
    weights = load_file(tmp_path / "model.safetensors")
    name = "bert.encoder.layer.0.output.dense.weight"
    weights[name] = torch.full_like(weights[name], -0.0)
    weights[name] = weights[name].double()
    weights[name][0, :2] = torch.tensor([5e-324, float("nan")], dtype=torch.float64)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert counts(make_report(tmp_path))[name][2] == weights[name].numel() - 2


def test_scalars_and_empty_tensors_are_counted(tmp_path):
    model = saved(tmp_path, resnet())
    weights = load_file(tmp_path / "model.safetensors")
    scalars = [name for name, tensor in weights.items() if tensor.ndim == 0]
    assert scalars
    weights["nothing"] = torch.empty(0, 4)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    reported = counts(make_report(tmp_path))
    assert reported["nothing"] == ((0, 4), 0, 0, False)
    assert all(reported[name] == ((), 1, 1, False) for name in scalars)
    assert not any(reported[name][3] for name, _ in model.named_buffers())


def test_a_headless_file_under_a_config_with_a_head_is_understood_as_from_pretrained_does(tmp_path):
    # So lies openai-community/gpt2 on the Hub: the config names GPT2LMHeadModel, the file has no `transformer.`.
    model = saved(tmp_path / "whole", gpt2())
    model.transformer.save_pretrained(tmp_path / "headless")
    shutil.copy(tmp_path / "whole" / "config.json", tmp_path / "headless")
    opened = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "headless")
    assert torch.equal(opened.transformer.h[0].mlp.c_fc.weight, model.transformer.h[0].mlp.c_fc.weight)
    found = make_report(tmp_path / "headless")
    assert len(found.prunable) == 8
    assert found.prunable_sparsity == make_report(tmp_path / "whole").prunable_sparsity


def test_a_file_with_the_prefix_of_a_base_model_is_understood_under_a_config_without_a_head(tmp_path):
    saved(tmp_path / "whole", gpt2())
    config = json.loads((tmp_path / "whole" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "whole" / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2Model"]}))
    found = make_report(tmp_path / "whole")
    assert len(found.prunable) == 8


def test_of_one_file_and_an_index_the_one_is_counted_that_from_pretrained_opens(tmp_path):
    saved(tmp_path, bert(), max_shard_size="10KB")
    other = bert()
    torch.nn.init.zeros_(other.bert.encoder.layer[0].output.dense.weight)
    other.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path)
    opened = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    zeros = {name: int((weight == 0).sum()) for name, weight in opened.named_parameters()}
    assert {name: zeros for name, (_, _, zeros, _) in counts(make_report(tmp_path)).items()} == zeros


# ---- How it is read ----


@pytest.mark.parametrize("limit", [1, 7, 40, 1 << 24])
def test_the_size_of_a_part_does_not_change_the_counts(limit, tmp_path, monkeypatch):
    saved(tmp_path, mixtral())
    expected = counts(make_report(tmp_path))
    monkeypatch.setattr(zeros, "_VALUES_AT_A_TIME", limit)
    assert counts(make_report(tmp_path)) == expected


class WatchedFile:
    """A safetensors file that counts the values it has handed out and that are still in memory."""

    def __init__(self, file, watch):
        self.file, self.watch = file, watch

    def __enter__(self):
        self.open = self.file.__enter__()
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def keys(self):
        return self.open.keys()

    def get_slice(self, name):
        return WatchedSlice(self.open.get_slice(name), self.watch)


class WatchedSlice:
    def __init__(self, part, watch):
        self.part, self.watch = part, watch

    def get_shape(self):
        return self.part.get_shape()

    def get_dtype(self):
        return self.part.get_dtype()

    def __getitem__(self, index):
        values = self.part[index]
        self.watch["now"] += values.numel()
        self.watch["most"] = max(self.watch["most"], self.watch["now"])
        self.watch["all"] += values.numel()
        weakref.finalize(values, self.let_go, values.numel())
        return values

    def let_go(self, values):
        self.watch["now"] -= values


@pytest.mark.parametrize("shards", ["10KB", "1GB"])
def test_a_model_is_never_in_memory_whole(shards, tmp_path, monkeypatch):
    saved(tmp_path, llama(), max_shard_size=shards)
    expected = counts(make_report(tmp_path))
    watch = {"now": 0, "most": 0, "all": 0}
    monkeypatch.setattr(zeros, "safe_open", lambda *args, **kwargs: WatchedFile(safe_open(*args, **kwargs), watch))
    monkeypatch.setattr(zeros, "_VALUES_AT_A_TIME", 64)
    assert counts(make_report(tmp_path)) == expected
    assert watch["all"] == sum(weights for _, weights, _, _ in expected.values())
    assert watch["most"] <= 2 * 64  # one part that is being counted, and the next
    assert watch["now"] <= 64


# ---- What is prunable ----


def test_the_configuration_beside_the_model_says_what_is_prunable(tmp_path):
    model = saved(tmp_path, bert())
    config = PruningConfig(sparsity=0.5, targets=[r".*(query|key)\.weight"], exclude=[r".*layer\.1.*"])
    save_configs([config], tmp_path)
    names = [tensor.name for tensor in make_report(tmp_path).prunable]
    assert names == [f"bert.encoder.layer.0.attention.self.{part}.weight" for part in ("query", "key")]
    assert names == [target.name for target in find_targets(model, config.targets, config.exclude)]


def test_of_several_configurations_all_targets_are_prunable_and_count_once(tmp_path):
    saved(tmp_path, bert())
    first = PruningConfig(sparsity=0.5, targets=[r".*query\.weight"])
    second = PruningConfig(sparsity=0.6, targets=[r".*(query|value)\.weight"], begin=0.8, end=0.9)
    save_configs([first, second], tmp_path)
    found = make_report(tmp_path)
    assert len(found.prunable) == 4
    assert found.to_dict()["prunable"]["weights"] == 4 * 256


def test_a_configuration_of_another_model_is_refused(tmp_path):
    saved(tmp_path, bert())
    save_configs([PruningConfig(sparsity=0.5, targets=[r"model\.layers.*"])], tmp_path)
    with pytest.raises(TargetError, match="matches no parameter name"):
        make_report(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["NobodysModel"]},
        {"architectures": None},
        {"architectures": []},
        {"architectures": ["pipeline"]},
        {"architectures": ["LlamaForCausalLM"]},
        {"model_type": "nobodys"},
        {"hidden_size": "wide"},
        {"num_attention_heads": 3},
    ],
    ids=str,
)
def test_without_a_known_class_all_is_counted_and_a_note_says_why(tmp_path, changes):
    saved(tmp_path, bert())
    change_config(tmp_path, **changes)
    found = make_report(tmp_path)
    assert found.note
    assert "\n" not in found.note
    assert found.prunable == []
    assert {tensor.prunable for tensor in found.tensors} == {None}
    values, zeros = values_in_files(tmp_path)
    assert found.to_dict()["overall"] == {"weights": values, "zeros": zeros, "sparsity": zeros / values}


def test_a_models_own_code_is_neither_run_nor_asked_about(tmp_path, capsys):
    saved(tmp_path, bert())
    change_config(tmp_path, model_type="own", auto_map={"AutoConfig": "configuration_own.Own"})
    (tmp_path / "configuration_own.py").write_text("raise SystemExit('it ran')")
    note = make_report(tmp_path).note
    assert note == "the model class is unknown: it needs the model's own code, which hf-prune does not run"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_without_a_readable_config_all_is_counted_and_a_note_says_why(tmp_path, content):
    saved(tmp_path, bert())
    (tmp_path / "config.json").unlink()
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
    found = make_report(tmp_path)
    assert found.note
    assert sum(tensor.weights for tensor in found.tensors) == values_in_files(tmp_path)[0]


# ---- Totals ----


def test_totals_are_zeros_over_weights_and_not_means_of_shares():
    tensors = [
        TensorReport("large", (90,), 90, 9, True),
        TensorReport("small", (10,), 10, 9, True),
        TensorReport("other", (100,), 100, 0, False),
    ]
    found = Report("m", tensors, 5)
    assert [tensor.name for tensor in found.prunable] == ["large", "small"]
    assert found.prunable_sparsity == 18 / 100
    assert found.sparsity == 18 / 200
    assert [tensor.sparsity for tensor in tensors] == [0.1, 0.9, 0]
    assert found.to_dict()["prunable"] == {"weights": 100, "zeros": 18, "sparsity": 0.18}


def test_of_nothing_the_share_of_zeros_is_zero():
    assert share_of_zeros([]) == 0
    assert TensorReport("empty", (0,), 0, 0, True).sparsity == 0


def test_a_report_as_json_has_totals_and_every_tensor(tmp_path):
    saved(tmp_path, bert(), max_shard_size="10KB")
    found = make_report(tmp_path)
    read = json.loads(json.dumps(found.to_dict()))
    for kind, chosen in (
        ("overall", read["tensors"]),
        ("prunable", [row for row in read["tensors"] if row["prunable"]]),
    ):
        weights, zeros = (sum(row[key] for row in chosen) for key in ("weights", "zeros"))
        assert read[kind] == {"weights": weights, "zeros": zeros, "sparsity": zeros / weights}
    assert (read["model"], read["note"]) == (str(tmp_path), None)
    assert read["file_bytes"] == sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert all(row["sparsity"] == row["zeros"] / row["weights"] for row in read["tensors"])


def test_masks_beside_the_weights_are_not_counted(tmp_path):
    saved(tmp_path, bert())
    expected = make_report(tmp_path)
    save_file({"a": torch.zeros(5)}, tmp_path / "pruning_masks.safetensors")
    assert make_report(tmp_path) == expected


# ---- What no report can be made from ----


def refusal(model):
    with pytest.raises(ReportError) as caught:
        make_report(model)
    (line,) = str(caught.value).splitlines()
    return line


@pytest.fixture
def sharded(tmp_path):
    saved(tmp_path, bert(), max_shard_size="10KB")
    return tmp_path


def test_a_shard_that_is_missing_is_named(sharded):
    missing = sorted(sharded.glob("*.safetensors"))[1]
    missing.unlink()
    assert refusal(sharded) == f"{sharded}: model.safetensors.index.json lists {missing.name}, which does not exist"


@pytest.mark.parametrize("name", ["../x.safetensors", "inner/x.safetensors", "/x.safetensors", "config.json"])
def test_a_shard_that_is_no_safetensors_file_of_the_folder_is_refused(sharded, name):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["classifier.weight"] = name
    index.write_text(json.dumps(content))
    assert refusal(sharded).startswith(f"{sharded}: model.safetensors.index.json lists ")
    assert refusal(sharded).endswith("; expected names of safetensors files in the same folder")


@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": 1}}', b'{"weight_map": "a"}', b"\xff\xfe"],
)
def test_an_index_that_cannot_be_read_is_named(sharded, content):
    (sharded / "model.safetensors.index.json").write_bytes(content)
    assert "model.safetensors.index.json" in refusal(sharded)


def test_weights_that_are_a_folder_are_named(tmp_path):
    saved(tmp_path, bert())
    path = tmp_path / "model.safetensors"
    path.unlink()
    path.mkdir()
    assert refusal(tmp_path) == f"{path}: expected a safetensors file, found a folder"
    os.mkfifo(tmp_path / "pipe")
    path.rmdir()
    path.symlink_to(tmp_path / "pipe")
    assert refusal(tmp_path) == f"{path}: expected a safetensors file, found no file"


def rewrite_header(path, change):
    """Change the JSON header of a safetensors file and leave its data as it is."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def test_a_type_whose_zeros_cannot_be_counted_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(4, dtype=torch.int8)}, path)
    rewrite_header(path, lambda header: header["a"].update(dtype="F4", shape=[8]))
    assert refusal(tmp_path).startswith(f"{path}: expected safetensors, got a file that cannot be read")


def test_an_empty_tensor_of_endless_shape_is_counted_at_once(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(0, 4), "b": torch.ones(2)}, path)
    rewrite_header(path, lambda header: header["a"].update(shape=[10**15, 0]))
    assert counts(make_report(tmp_path))["a"] == ((10**15, 0), 0, 0, None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 10**7}, "config.json: expected num_hidden_layers of at most 2,000, got 10,000,000"),
        ({"text_config": {"depths": [2, 10**7]}}, "config.json: expected depths of at most 2,000, got 10,000,000"),
        ({"num_labels": 10**9}, "config.json: expected num_labels of at most 1,000,000, got 1,000,000,000"),
        ({"hidden_size": 10**300}, "BertForSequenceClassification cannot be created from config.json: "),
        ({"architectures": 5}, "the model class "),
        ({"auto_map": {"AutoConfig": "a.B"}, "model_type": "c"}, "the model class is unknown: "),
    ],
)
def test_a_configuration_that_cannot_be_built_is_a_note_and_all_is_counted(tmp_path, changes, words):
    saved(tmp_path, bert())
    before = make_report(tmp_path)
    change_config(tmp_path, **changes)
    found = make_report(tmp_path)
    assert words in found.note
    assert len(found.note.splitlines()) == 1
    assert (found.sparsity, len(found.tensors)) == (before.sparsity, len(before.tensors))


@pytest.mark.parametrize("how", ["large", "nested", "link"])
def test_a_configuration_for_versions_of_transformers_has_the_same_limits(tmp_path, how):
    folder = tmp_path / "model"
    saved(folder, bert())
    change_config(folder, configuration_files=["config.json"])
    assert make_report(folder).note is None
    change_config(folder, configuration_files=["config.json", "config.4.0.0.json", "a\0b", "../x", 5])
    words = {"large": "num_hidden_layers of at most 2,000", "nested": "levels of nesting", "link": "a link to outside"}
    content = "[" * 5000 if how == "nested" else '{"num_hidden_layers": 10000000, "model_type": "bert"}'
    (tmp_path / "other.json").write_text(content, encoding="utf-8")
    if how == "link":
        (folder / "config.4.0.0.json").symlink_to(tmp_path / "other.json")
    else:
        (tmp_path / "other.json").rename(folder / "config.4.0.0.json")
    assert f"{folder / 'config.4.0.0.json'}: " in make_report(folder).note
    assert words[how] in make_report(folder).note


def test_a_configuration_nested_thousands_deep_is_a_note_with_its_path(tmp_path):
    saved(tmp_path, bert())
    (tmp_path / "config.json").write_text('{"a": ' + "[" * 5000 + "]" * 5000 + "}", encoding="utf-8")
    assert f"{tmp_path / 'config.json'}: expected at most 100 levels of nesting" in make_report(tmp_path).note


def test_more_modules_than_any_model_has_are_not_built(tmp_path, monkeypatch):
    saved(tmp_path, bert())
    monkeypatch.setattr(limits, "_MOST_MODULES", 30)
    assert make_report(tmp_path).note.endswith("expected at most 30 modules, got more")


@pytest.mark.parametrize("left", [0, 4, 100, -1], ids=["empty", "four bytes", "a hundred bytes", "one byte short"])
def test_a_truncated_file_is_named(tmp_path, left):
    saved(tmp_path, bert())
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    assert refusal(tmp_path).startswith(f"{path}: expected safetensors, got a file that cannot be read")


def test_one_truncated_shard_among_many_is_named(sharded):
    path = sorted(sharded.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-10])
    assert refusal(sharded).startswith(f"{path}: ")


def test_a_file_is_no_model(tmp_path):
    saved(tmp_path, bert())
    path = tmp_path / "model.safetensors"
    assert refusal(path) == f"{path}: expected a folder with a saved model, found a file"


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "~/nowhere", "a/b/c"])
def test_a_path_to_nothing_is_no_model(name):
    assert refusal(name) == f"{name}: expected a folder with a saved model, found nothing"


def test_a_folder_without_safetensors_is_no_model(tmp_path):
    torch.save(bert().state_dict(), tmp_path / "pytorch_model.bin")
    assert refusal(tmp_path).startswith(f"{tmp_path}: contains neither model.safetensors nor model.")


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing", "no body"])
def test_a_name_on_the_hub_without_a_network_is_one_line(name):
    start = f"{name}: expected a folder or a model on the Hub; the folder does not exist, and the Hub answered: "
    assert refusal(name).startswith(start)


def test_an_answer_of_the_hub_that_says_nothing_is_one_line_too(monkeypatch):
    def silent(*args, **kwargs):
        raise OSError

    monkeypatch.setattr("hf_prune.saved.files.snapshot_download", silent)
    assert refusal("nobody/nothing").startswith("nobody/nothing: expected a folder or a model on the Hub")


def test_a_model_on_the_hub_is_downloaded_without_pickles(tmp_path, monkeypatch):
    saved(tmp_path, bert())
    asked = {}

    def download(name, allow_patterns):
        asked.update(name=name, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("hf_prune.saved.files.snapshot_download", download)
    found = make_report("nobody/model")
    assert asked == {"name": "nobody/model", "patterns": ["*.safetensors", "*.json"]}
    assert found.model == "nobody/model"
    assert counts(found) == counts(make_report(tmp_path))
