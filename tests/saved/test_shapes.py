"""After every save: the shapes that opening gives are those in the files."""

import json

import pytest
from models import bert, bert_examples, training_arguments, vit
from shrunk import NEURONS, save_shrunk

import hf_prune.trainer.saving
from hf_prune import PruningConfig, PruningTrainer, StructureError
from hf_prune.saved.shapes import check_shapes

FIRST = {r".*\.layers?\.0\..*": 0.5}
PER_LAYER = PruningConfig(structure="neurons", sparsity=0.75, overrides=FIRST, begin=0, end=1, frequency=1)


@pytest.mark.parametrize(
    ("config", "build"),
    [
        (NEURONS, bert),
        *(pytest.param(PER_LAYER, build, marks=pytest.mark.widths_per_layer) for build in (bert, vit)),
    ],
)
def test_a_smaller_model_as_it_was_saved_passes(tmp_path, config, build):
    save_shrunk(tmp_path, [config], build())
    check_shapes(tmp_path)


@pytest.mark.parametrize("config", [NEURONS, pytest.param(PER_LAYER, marks=pytest.mark.widths_per_layer)])
def test_a_configuration_of_other_shapes_is_an_error(tmp_path, config):
    save_shrunk(tmp_path, [config], bert())
    content = json.loads((tmp_path / "config.json").read_text())
    if config is PER_LAYER:
        content["per_layer_config"]["1"]["intermediate_size"] += 1
    else:
        content["intermediate_size"] += 1
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(StructureError, match=r"expected bert\.encoder\.layer\.\d\..* of shape .* would not open"):
        check_shapes(tmp_path)


@pytest.mark.widths_per_layer
def test_the_trainer_checks_what_it_saves(tmp_path, monkeypatch):
    args = training_arguments(tmp_path / "run", max_steps=2)
    trainer = PruningTrainer(model=bert(), args=args, train_dataset=bert_examples(), pruning_config=PER_LAYER)
    trainer.train()
    checked = []
    monkeypatch.setattr(hf_prune.trainer.saving, "check_shapes", checked.append)
    trainer.save_model(str(tmp_path / "small"))
    assert checked == [str(tmp_path / "small")]
