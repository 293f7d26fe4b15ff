"""What is said of a saved model out of which units were cut."""

import json
import shutil

import pytest
from models import bert, llama, t5
from safetensors.numpy import load_file
from shrunk import LAYERS, NEURONS, save_shrunk

from hf_prune import PruningConfig
from hf_prune.errors import HfPruneError, PruningStateError
from hf_prune.saved.model import SavedModel
from hf_prune.saved.removed import LayersLeft, Removed, UnitsLeft
from hf_prune.saved.report import make_report
from hf_prune.structure.record import STRUCTURE_NAME


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """No test may change it."""
    folder = tmp_path_factory.mktemp("small") / "model"
    save_shrunk(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


def change(folder, edit):
    path = folder / STRUCTURE_NAME
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_a_report_says_what_was_removed(whole):
    report = make_report(whole)
    removed = report.removed
    in_files = sum(tensor.size for tensor in load_file(whole / "model.safetensors").values())
    dense = sum(parameter.numel() for parameter in bert(num_hidden_layers=4).parameters())
    assert removed.parameters == (dense, in_files)
    [stack] = removed.layers
    assert (stack.path, stack.of, len(stack.kept)) == ("bert.encoder.layer", 4, 2)
    assert removed.units == tuple(UnitsLeft("neurons", f"bert.encoder.layer.{index}", 24, 6) for index in stack.kept)
    assert removed.words == "75% of the neurons of each layer and 2 of 4 layers"
    assert json.loads(json.dumps(report.to_dict()))["removed"] == {
        "parameters": [dense, in_files],
        "weights": list(removed.weights),
        "units": [{"structure": "neurons", "path": one.path, "of": 24, "left": 6} for one in removed.units],
        "layers": [{"path": "bert.encoder.layer", "of": 4, "kept": list(stack.kept)}],
    }


def test_zeros_are_those_of_the_files_and_prunable_are_the_tensors_with_units(whole):
    report = make_report(whole)
    assert (report.sparsity, report.prunable_sparsity) == (0.0, 0.0)
    assert len(report.prunable) == 2 * 6 * 2  # in each layer, weight and bias of query, key, value, and three others
    assert all(tensor.name.startswith("bert.encoder.layer.") for tensor in report.prunable)
    assert not [tensor.name for tensor in report.prunable if "LayerNorm" in tensor.name]
    assert sum(tensor.weights for tensor in report.prunable) == report.removed.weights[1]


def test_neurons_alone_are_part_of_the_tensors_of_the_feed_forward_network(tmp_path):
    save_shrunk(tmp_path, [NEURONS], llama())
    report = make_report(tmp_path)
    assert {tensor.name.split(".")[-2] for tensor in report.prunable} == {"gate_proj", "up_proj", "down_proj"}
    assert report.removed.layers == ()
    assert report.removed.words == "75% of the neurons of each layer"


def test_words_say_which_layers_the_numbers_are_of():
    units = tuple(UnitsLeft("neurons", f"a.{index}", 8, 2 * index) for index in (1, 2))
    half = LayersLeft("a", 4, (1, 2))
    assert Removed((9, 5), (8, 4), units, ()).words == "62.5% of the neurons of all layers"
    assert Removed((9, 5), (8, 4), units, (half,)).words == (
        "62.5% of the neurons of the layers that are left and 2 of 4 layers"
    )


def test_the_last_layer_of_a_model_is_reported_too(tmp_path):
    save_shrunk(tmp_path, [LAYERS], bert(num_hidden_layers=2))
    report = make_report(tmp_path)
    assert report.removed.words == "1 of 2 layers"
    assert report.prunable


def test_encoder_and_decoder_are_told_apart(tmp_path):
    save_shrunk(tmp_path, [LAYERS], t5(num_layers=3, num_decoder_layers=5))  # the first of each cannot be removed
    report = make_report(tmp_path)
    assert report.removed.words == "2 of 3 layers of encoder.block and 2 of 5 layers of decoder.block"
    assert [stack.kept[0] for stack in report.removed.layers] == [0, 0]
    assert report.sparsity == 0


def test_a_dense_model_has_nothing_removed(tmp_path):
    bert().save_pretrained(tmp_path)
    assert make_report(tmp_path).removed is None
    assert make_report(tmp_path).to_dict()["removed"] is None


def test_if_every_unit_is_kept_nothing_was_removed(tmp_path):
    save_shrunk(tmp_path, [PruningConfig(structure="neurons", sparsity=0.0, begin=0, end=1, frequency=1)])
    assert (tmp_path / STRUCTURE_NAME).exists()
    assert make_report(tmp_path).removed is None


def test_units_that_differ_from_layer_to_layer_are_counted_together():
    units = (UnitsLeft("neurons", "a.0", 10, 5), UnitsLeft("neurons", "a.1", 10, 3), UnitsLeft("heads", "a.0", 3, 2))
    removed = Removed((100, 50), (80, 30), units, (LayersLeft("a", 2, (0, 1)),))
    assert removed.words == "60% of the neurons of all layers and 33.33% of the heads of each layer"
    assert removed.totals("neurons") == (20, 8)
    assert removed.structures == ["neurons", "heads", "layers"]


def test_a_changed_record_is_read_anew(folder):
    saved = SavedModel.of(folder)
    assert saved.removed is not None
    (folder / STRUCTURE_NAME).unlink()
    assert SavedModel.of(saved) is not saved
    assert make_report(saved).removed is None


def unit(content):
    return next(name for name in content["units"] if name.startswith("neurons"))


@pytest.mark.parametrize(
    "edit",
    [
        lambda content: content.update(format_version=2),
        lambda content: content.pop("units"),
        lambda content: content.update(units={}),
        lambda content: content.update(units=[]),
        lambda content: content.update(units={"neurons of x": {"kept": []}}),
        lambda content: content.update(units={"widths of x": {"of": 1, "kept": []}}),
        lambda content: content.update(units={"layers of x.y": {"of": 1, "kept": []}}),
        lambda content: content["units"].update({"neurons of a\nb": {"of": 3, "kept": []}}),
        lambda content: content["units"][unit(content)].update(of=-1, kept=[]),
        lambda content: content["units"][unit(content)].update(of=True, kept=[]),
        lambda content: content["units"][unit(content)].update(of=1e300),
        lambda content: content["units"][unit(content)].update(kept=[3, 2]),
        lambda content: content["units"][unit(content)].update(kept=[24]),
        lambda content: content["units"][unit(content)].update(kept=["0"]),
        lambda content: content.update(parameters=[1, 2]),
        lambda content: content.update(parameters=[1, -2]),
        lambda content: content.update(parameters=[1.5, 1]),
        lambda content: content.update(weights=[1]),
        lambda content: content.update(fields=[]),
        lambda content: content.update(fields={"intermediate_size": 6}),
        lambda content: content.update(fields={"a\n\nb": ["\ud800", "\ud800"]}),
    ],
)
def test_a_record_that_cannot_be_used_is_refused_in_a_line(folder, edit):
    change(folder, edit)
    with pytest.raises(PruningStateError) as caught:
        make_report(folder)
    [line] = str(caught.value).splitlines()
    assert line.startswith(str(folder / STRUCTURE_NAME))
    line.encode()


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"format_version": 1}'])
def test_a_file_that_is_no_record_is_refused_in_a_line(folder, content):
    (folder / STRUCTURE_NAME).write_bytes(content)
    with pytest.raises(PruningStateError, match="expected the units that were cut out") as caught:
        make_report(folder)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["whole", "other"])
def test_the_record_of_another_model_is_refused(folder, name):
    (bert(num_hidden_layers=4) if name == "whole" else bert(intermediate_size=8)).save_pretrained(folder)
    with pytest.raises(PruningStateError, match="delete the file if the model was replaced"):
        make_report(folder)


def test_a_record_outside_the_folder_is_not_followed(folder, tmp_path):
    (folder / STRUCTURE_NAME).rename(tmp_path / "record.json")
    (folder / STRUCTURE_NAME).symlink_to(tmp_path / "record.json")
    with pytest.raises(HfPruneError, match="link to outside"):
        make_report(folder)


def test_a_configuration_that_selects_some_layers_only_is_refused_in_a_line(folder):
    path = folder / "pruning_config.json"
    content = json.loads(path.read_text())
    content["configs"][0]["targets"] = [r"bert\.encoder\.layer\.1\..*"]
    path.write_text(json.dumps(content))
    with pytest.raises(HfPruneError, match="expected all layers with neurons of the same size or none"):
        make_report(folder)


def test_units_of_which_none_was_removed_are_not_named():
    kept = (UnitsLeft("neurons", "layer.0.mlp", 24, 24),)
    assert Removed((20, 10), (8, 4), kept, (LayersLeft("layer", 2, (0,)),)).words == "1 of 2 layers"
