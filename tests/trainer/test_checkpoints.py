"""Checkpoint folders, resuming from them, and which of them is the best."""

import json
import logging
import shutil

import pytest
import transformers
from models import bert, bert_examples, training_arguments
from test_trainer import assert_masked_weights_are_zero, assert_same, pruning_trainer, weights_of
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from hf_prune import PruningCallback, PruningConfig, PruningStateError, PruningTrainer
from hf_prune.trainer.checkpoints import UNFINISHED, is_complete, newest_complete, rotate

# Pruned from step 4 to step 8 of 10.
CONFIG = PruningConfig(sparsity=0.7, schedule="linear", begin=4, end=8, frequency=2)
SAVE = {"save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the checkpoints 2, 4, ..., 10 of a run, and its trainer; no test may change the folder."""
    directory = tmp_path_factory.mktemp("trained")
    transformers.set_seed(0)
    trainer = pruning_trainer(directory, CONFIG, **SAVE)
    trainer.train()
    return directory, trainer


@pytest.fixture
def copied(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    return tmp_path / "run"


def checkpoints_in(directory):
    return sorted(int(path.name.partition("-")[2]) for path in directory.glob("checkpoint-*"))


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


# ---- Which checkpoint training goes on from ----


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


INCOMPLETE = {
    "no trainer state": lambda folder: (folder / "trainer_state.json").unlink(),
    "half a trainer state": lambda folder: cut(folder / "trainer_state.json"),
    "no optimizer": lambda folder: (folder / "optimizer.pt").unlink(),
    "no scheduler": lambda folder: (folder / "scheduler.pt").unlink(),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "half the weights": lambda folder: cut(folder / "model.safetensors"),
    "a sentinel": lambda folder: (folder / "checkpoint-is-incomplete.txt").touch(),
    "an index of missing shards": lambda folder: (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'
    ),
    "half an index": lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight'),
}


@pytest.mark.parametrize("damage", INCOMPLETE)
def test_training_goes_on_from_the_newest_checkpoint_that_is_complete(damage, copied, trained):
    assert newest_complete(copied) == copied / "checkpoint-10"
    for step in (8, 10):
        INCOMPLETE[damage](copied / f"checkpoint-{step}")
    assert not is_complete(copied / "checkpoint-10")
    assert newest_complete(copied) == copied / "checkpoint-6"
    resumed = pruning_trainer(copied, CONFIG, **SAVE)
    resumed.train(resume_from_checkpoint=True)
    assert_same(weights_of(trained[1].model), weights_of(resumed.model))
    assert is_complete(copied / "checkpoint-10")


def test_a_checkpoint_without_any_optimizer_is_complete_as_save_only_model_makes_it(tmp_path):
    pruning_trainer(tmp_path, CONFIG, **SAVE, save_only_model=True).train()
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-10"


def test_other_folders_are_no_checkpoints(copied):
    for name in ("checkpoint-best", "checkpoint-99x", "my-checkpoint-99"):
        shutil.copytree(copied / "checkpoint-2", copied / name)
    assert newest_complete(copied) == copied / "checkpoint-10"


def test_without_a_complete_checkpoint_resuming_is_an_error_that_names_the_folder(tmp_path):
    trainer = pruning_trainer(tmp_path, CONFIG)
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(ValueError, match=f"resume_from_checkpoint: expected a complete checkpoint in {tmp_path}"):
        trainer.train(resume_from_checkpoint=True)


def test_what_a_killed_run_left_is_cleared_away(tmp_path):
    left = tmp_path / UNFINISHED / "checkpoint-4"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    pruning_trainer(tmp_path, CONFIG, **SAVE).train()
    assert not (tmp_path / UNFINISHED).exists()
    assert checkpoints_in(tmp_path) == [2, 4, 6, 8, 10]


def test_a_checkpoint_takes_the_place_of_one_with_its_name(copied, trained):
    (copied / "checkpoint-4" / "left over").touch()
    pruning_trainer(copied, CONFIG, **SAVE).train()
    assert not (copied / "checkpoint-4" / "left over").exists()
    assert is_complete(copied / "checkpoint-4")


def test_a_save_that_fails_leaves_no_checkpoint_and_the_next_one_works(tmp_path, monkeypatch):
    trainer = pruning_trainer(tmp_path, CONFIG, **SAVE)

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "_save_optimizer_and_scheduler", full)
        with pytest.raises(OSError, match="No space"):
            trainer.train()
    assert checkpoints_in(tmp_path) == []
    trainer.train()
    assert checkpoints_in(tmp_path) == [2, 4, 6, 8, 10]


# ---- What is exact after resuming ----


def test_resuming_while_pruning_ends_bit_for_bit_as_the_whole_run(trained):
    directory, whole = trained
    for step in (2, 4, 6, 8):
        resumed = pruning_trainer(directory.parent / f"from-{step}", CONFIG)
        resumed.train(resume_from_checkpoint=str(directory / f"checkpoint-{step}"))
        assert_same(weights_of(whole.model), weights_of(resumed.model))
        assert_same(whole.pruner.masks, resumed.pruner.masks)


def test_a_dense_checkpoint_of_the_same_run_goes_on_as_if_it_had_had_masks(trained, tmp_path, caplog):
    transformers.set_seed(0)
    arguments = training_arguments(tmp_path, **SAVE)
    dense = Trainer(model=bert(), args=arguments, train_dataset=bert_examples())
    dense.train()
    resumed = pruning_trainer(tmp_path, CONFIG)
    with caplog.at_level(logging.WARNING, "hf_prune"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "has no masks: training was dense so far" in caplog.text
    assert_same(weights_of(trained[1].model), weights_of(resumed.model))


@pytest.mark.parametrize("step", [4, 6, 8])
def test_a_dense_checkpoint_inside_or_after_the_schedule_is_pruned_at_once(step, tmp_path):
    dense = Trainer(model=bert(), args=training_arguments(tmp_path, **SAVE), train_dataset=bert_examples())
    dense.train()
    seen = {}

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.setdefault(state.global_step, (resumed.pruner.sparsity, moments_of_masked_weights(resumed)))

    resumed = pruning_trainer(tmp_path, CONFIG)
    resumed.add_callback(Watch())
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    expected = {4: 0.0, 6: 0.35, 8: 0.7}[step]
    sparsity, moments = seen[step]
    assert sparsity == pytest.approx(expected, abs=1e-3)
    assert moments == 0
    assert resumed.pruner.sparsity == pytest.approx(0.7, abs=1e-3)
    assert_masked_weights_are_zero(resumed.pruner)


def moments_of_masked_weights(trainer):
    """The largest moment of a weight that is masked."""
    state = trainer.optimizer.state
    largest = [0.0]
    for name, parameter in trainer.pruner.parameters.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            masked = state[parameter][moment][~trainer.pruner.masks[name]]
            largest.append(float(masked.abs().max()) if masked.numel() else 0.0)
    return max(largest)


def test_more_steps_than_before_go_on_at_final_sparsity_with_the_same_masks(trained, tmp_path):
    directory, whole = trained
    longer = pruning_trainer(tmp_path, CONFIG, max_steps=14)
    longer.train(resume_from_checkpoint=str(directory / "checkpoint-10"))
    assert longer.state.global_step == 14
    assert_same(whole.pruner.masks, longer.pruner.masks)
    assert_masked_weights_are_zero(longer.pruner)


def test_more_epochs_than_before_stretch_a_schedule_in_shares_and_no_weight_comes_back(tmp_path):
    config = PruningConfig(sparsity=0.7, schedule="linear", begin=0.1, end=0.6, frequency=0.1)
    arguments = {"max_steps": -1, "num_train_epochs": 1, "save_strategy": "epoch"}
    short = pruning_trainer(tmp_path / "short", config, **arguments)
    short.train()
    longer = pruning_trainer(tmp_path / "longer", config, **arguments | {"num_train_epochs": 3})
    longer.train(resume_from_checkpoint=str(tmp_path / "short" / "checkpoint-10"))
    assert longer.state.global_step == longer.pruner.total_steps == 30
    assert longer.pruner.sparsity == short.pruner.sparsity == pytest.approx(0.7, abs=1e-3)
    for name, mask in short.pruner.masks.items():
        assert not (longer.pruner.masks[name] & ~mask).any()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sparsity": 0.5}, "sparsity: 0.7 was saved, 0.5 is configured"),
        ({"scope": "global"}, "scope: 'layer' was saved, 'global' is configured"),
    ],
)
def test_another_configuration_than_the_saved_one_is_refused_before_any_step(trained, tmp_path, changes, words):
    trainer = pruning_trainer(tmp_path, PruningConfig(**CONFIG.to_dict() | changes))
    with pytest.raises(PruningStateError, match=words):
        trainer.train(resume_from_checkpoint=str(trained[0] / "checkpoint-6"))
    saved = json.loads((trained[0] / "checkpoint-6" / "trainer_state.json").read_text(encoding="utf-8"))
    assert trainer.state.log_history == saved["log_history"]


def test_a_run_that_ends_before_pruning_does_says_so_and_at_what_sparsity(tmp_path, caplog):
    trainer = pruning_trainer(tmp_path, CONFIG)
    trainer.add_callback(StopAt(6))
    with caplog.at_level(logging.WARNING, "hf_prune"):
        trainer.train()
    assert "Training stopped at step 6, before pruning ended at step 8: sparsity is 35.0" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "hf_prune"):
        pruning_trainer(tmp_path, CONFIG).train()
    assert "Training stopped" not in caplog.text


def test_a_run_resumed_after_its_last_step_makes_no_step_more(trained, tmp_path):
    directory, whole = trained
    resumed = pruning_trainer(tmp_path, CONFIG)
    resumed.train(resume_from_checkpoint=str(directory / "checkpoint-10"))
    assert resumed.state.global_step == 10
    assert_same(weights_of(whole.model), weights_of(resumed.model))


# ---- How many are kept ----


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, [2, 4, 6, 8, 10]),
        (0, None, [2, 4, 6, 8, 10]),
        (3, None, [6, 8, 10]),
        (1, None, [10]),
        (3, 4, [4, 8, 10]),
        (1, 4, [4, 10]),
        (2, 10, [8, 10]),
        (9, 2, [2, 4, 6, 8, 10]),
    ],
)
def test_as_many_are_kept_as_the_trainer_keeps(copied, tmp_path, limit, best, left):
    shutil.copytree(copied, tmp_path / "stock")
    transformers.trainer_utils.rotate_checkpoints(
        str(tmp_path / "stock"), limit, best and str(tmp_path / "stock" / f"checkpoint-{best}")
    )
    rotate(copied, limit, best and str(copied / f"checkpoint-{best}"))
    assert checkpoints_in(copied) == checkpoints_in(tmp_path / "stock") == left
    assert not (copied / UNFINISHED).exists()


# ---- The best model ----


def best_arguments(**changes):
    """Evaluated and saved every two steps; the metric is the step, so that the first or the last is the best."""
    return {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True} | SAVE | changes


def metric_of_step(trainer_of, greater_is_better, first_is_best):
    """A metric that only gets worse, or only better."""

    def compute_metrics(prediction):
        step = trainer_of().state.global_step
        return {"made_up": float(-step if greater_is_better == first_is_best else step)}

    return compute_metrics


def best_trainer(directory, stock=False, config=CONFIG, greater=True, first_is_best=True, **changes):
    made = []
    arguments = best_arguments(metric_for_best_model="made_up", greater_is_better=greater, **changes)
    keywords = {
        "model": bert(),
        "args": training_arguments(directory, **arguments),
        "train_dataset": bert_examples(),
        "eval_dataset": bert_examples(4),
        "compute_metrics": metric_of_step(lambda: made[0], greater, first_is_best),
    }
    if stock:
        trainer = Trainer(**keywords, callbacks=[PruningCallback(config)])
    else:
        trainer = PruningTrainer(**keywords, pruning_config=config)
    made.append(trainer)
    return trainer


def zeros_of(model):
    names = [name for name in dict(model.named_parameters()) if "encoder" in name and name.endswith("dense.weight")]
    weights = [model.get_parameter(name) for name in names]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


@pytest.mark.parametrize("stock", [False, True], ids=["PruningTrainer", "Trainer with PruningCallback"])
@pytest.mark.parametrize("greater", [True, False])
@pytest.mark.parametrize(("first_is_best", "best"), [(True, 8), (False, 10)])
def test_the_best_model_is_one_at_final_sparsity(stock, greater, first_is_best, best, tmp_path):
    trainer = best_trainer(tmp_path, stock, greater=greater, first_is_best=first_is_best)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert zeros_of(trainer.model) == pytest.approx(0.7, abs=1e-2)
    saved = transformers.BertForSequenceClassification.from_pretrained(tmp_path / f"checkpoint-{best}")
    assert_same(weights_of(saved), weights_of(trainer.model))


def test_without_pruning_the_same_run_takes_the_first(tmp_path):
    trainer = best_trainer(tmp_path, config=None)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")


def test_the_saved_state_names_the_best_checkpoint_by_its_own_path(tmp_path):
    best_trainer(tmp_path).train()
    for step, best in ((6, None), (8, 8), (10, 8)):
        state = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text(encoding="utf-8"))
        assert state["best_model_checkpoint"] == (best and str(tmp_path / f"checkpoint-{best}"))
        assert state["best_global_step"] == best


@pytest.mark.parametrize("limit", [1, 2])
def test_the_limit_of_checkpoints_keeps_the_best_at_final_sparsity(limit, tmp_path):
    trainer = best_trainer(tmp_path, save_total_limit=limit)
    trainer.train()
    assert checkpoints_in(tmp_path) == ([8] if limit == 1 else [8, 10])


def test_saving_only_the_best_saves_none_before_final_sparsity(tmp_path):
    trainer = best_trainer(tmp_path, save_strategy="best", first_is_best=False)
    trainer.train()
    assert checkpoints_in(tmp_path) == [8, 10]


@pytest.mark.parametrize("stock", [False, True], ids=["PruningTrainer", "Trainer with PruningCallback"])
def test_early_stopping_waits_for_final_sparsity(stock, tmp_path):
    trainer = best_trainer(tmp_path, stock, max_steps=20)
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    trainer.train()
    assert trainer.state.global_step == 12
    assert trainer.state.best_global_step == 8


@pytest.mark.parametrize("stock", [False, True], ids=["PruningTrainer", "Trainer with PruningCallback"])
def test_no_checkpoint_at_final_sparsity_is_an_error_and_not_a_denser_model(stock, tmp_path):
    trainer = best_trainer(tmp_path, stock)
    trainer.add_callback(StopAt(7))
    with pytest.raises(PruningStateError, match="after 7 steps no checkpoint has been evaluated at final sparsity"):
        trainer.train()
    assert zeros_of(trainer.model) == pytest.approx(0.35, abs=1e-2)


def test_the_best_of_a_dense_run_is_forgotten_when_it_is_pruned(tmp_path):
    dense = best_trainer(tmp_path, config=None)
    dense.train()
    assert dense.state.best_global_step == 2
    resumed = best_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert resumed.state.best_model_checkpoint == str(tmp_path / "checkpoint-8")
    assert zeros_of(resumed.model) == pytest.approx(0.7, abs=1e-2)


def test_a_resumed_run_keeps_the_best_that_was_at_final_sparsity(tmp_path):
    best_trainer(tmp_path).train()
    resumed = best_trainer(tmp_path, max_steps=14)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.best_model_checkpoint == str(tmp_path / "checkpoint-8")
