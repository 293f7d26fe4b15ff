"""`trainer.explain()`: the model in memory, on tokenized data, beside a dense model or the teacher."""

import pytest
import torch
from events import scalars_in
from models import bert, bert_examples, llama, training_arguments
from shrunk import NEURONS
from text_models import texts, tokenizer
from transformers import default_data_collator

from hf_prune import PruningConfig, PruningTrainer
from hf_prune.errors import ExplainError, TeacherError
from hf_prune.explain.page import make_markdown
from hf_prune.explain.settings import Settings
from hf_prune.publish.explanation import load_explanation
from hf_prune.publish.explanation_words import worst_first
from hf_prune.saved.model import SavedModel

SETTINGS = Settings(resamples=100, costs=False, training_samples=20)


def trainer_of(folder, model=None, data=None, **changes):
    data = bert_examples() if data is None else data
    options = {"pruning_config": PruningConfig(sparsity=0.7), "processing_class": tokenizer()} | changes
    arguments = {"max_steps": 2} | {name: options.pop(name) for name in ("report_to", "bf16") if name in options}
    return PruningTrainer(
        model=model or bert(),
        args=training_arguments(folder, **arguments),
        train_dataset=data,
        eval_dataset=data,
        data_collator=default_data_collator,
        **options,
    )


def test_a_trained_model_is_explained_beside_its_teacher_and_saved(tmp_path):
    dense = bert()
    trainer = trainer_of(tmp_path / "run", teacher_model=dense)
    trainer.train()
    kinds = {"half": [index % 2 for index in range(40)]}
    found = trainer.explain(slices=kinds, settings=SETTINGS, output_dir=tmp_path / "model")
    assert load_explanation(tmp_path / "model") == found
    assert found.files == SavedModel(tmp_path / "model").hashes
    assert found.dense_model == "the teacher"
    assert found.answers.agreement is not None
    assert {one.by for one in found.slices} >= {"half", "label"}
    assert found.complexity.file_bytes == SavedModel(tmp_path / "model").file_bytes
    assert [one.training_samples for one in found.gaps] == [20, 20]
    with torch.no_grad():
        batch = default_data_collator(bert_examples())
        answers = trainer.model.eval()(input_ids=batch["input_ids"]).logits.argmax(-1)
    accuracy = float((answers == batch["labels"]).double().mean())
    assert found.metrics[0].pruned.value == pytest.approx(accuracy)


def test_training_in_bfloat16_changes_no_answers_of_the_pruned_model_alone(tmp_path):
    """The Trainer leaves autocast around its own model, and the dense one has none."""
    trainer = trainer_of(tmp_path / "run", bf16=True)
    trainer.evaluate()
    dense = bert()
    dense.load_state_dict(trainer.model.state_dict())
    found = trainer.explain(dense, settings=SETTINGS)
    assert found.answers.divergence.value == 0


def test_a_language_model_and_a_dense_one_that_was_given(tmp_path):
    rows = [tokenizer()(text, padding="max_length", max_length=10) for text in texts(20)]
    data = [dict(row) | {"labels": [token or -100 for token in row["input_ids"]]} for row in rows]
    for row in data:
        row.pop("token_type_ids", None)
    dense = llama().train()
    trainer = trainer_of(tmp_path / "run", llama(), data)
    found = trainer.explain(dense, settings=SETTINGS)
    assert dense.training
    assert all(parameter.requires_grad for parameter in dense.parameters())
    assert found.task == "text-generation"
    assert found.dense_model == "the given dense model"
    page = make_markdown(found, ()).decode()
    assert "20 texts of the trainer's evaluation data, compared with the given dense model." in page
    assert list((tmp_path / "run").rglob("*")) == []
    assert "not saved" in found.notes[0]
    trainer.model.eval()
    with torch.no_grad():
        batch = default_data_collator(data)
        loss = trainer.model(**batch).loss
    assert found.metrics[0].pruned.value == pytest.approx(float(loss), abs=1e-5)


def test_a_file_as_output_is_refused_before_anything_is_measured(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    trainer = trainer_of(tmp_path / "run")
    for output in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(ExplainError, match="output_dir: expected a folder to write into, found a file at"):
            trainer.explain(settings=SETTINGS, output_dir=output)


@pytest.mark.parametrize("with_dense", [True, False])
def test_tensorboard_gets_the_headline_figures_and_the_card_gets_none_of_them(tmp_path, monkeypatch, with_dense):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = trainer_of(tmp_path / "run", report_to="tensorboard")
    trainer.train()
    logged = len(trainer.state.log_history)
    found = trainer.explain(bert() if with_dense else None, settings=SETTINGS)
    answers, gaps, worst = found.answers, {gap.model: gap.gap.value for gap in found.gaps}, worst_first(found)[0]
    expected = {
        "accuracy": found.metrics[0].pruned.value,
        "calibration_error": answers.calibration.error.value,
        "generalisation_gap": gaps["pruned"],
        "worst_slice_accuracy": worst.metric.pruned.value,
    }
    if with_dense:
        expected |= {
            "dense_accuracy": found.metrics[0].dense.value,
            "agreement": answers.agreement.value,
            "kl": answers.divergence.value,
            "right_to_wrong": answers.to_wrong.value,
            "wrong_to_right": answers.to_right.value,
            "dense_calibration_error": answers.dense_calibration.error.value,
            "dense_generalisation_gap": gaps["dense"],
            "dense_worst_slice_accuracy": worst.metric.dense.value,
        }
    scalars = scalars_in(tmp_path / "events")
    reported = {tag: values for tag, values in scalars.items() if tag.startswith("eval/explain_")}
    assert reported == {f"eval/explain_{name}": [pytest.approx(value)] for name, value in expected.items()}
    assert "train/loss" in scalars
    assert len(trainer.state.log_history) == logged


def test_what_cannot_be_explained_is_refused(tmp_path):
    trainer = trainer_of(tmp_path)
    with pytest.raises(ExplainError, match="eval_dataset: expected samples with labels"):
        trainer.explain(eval_dataset=[{"input_ids": [1, 2]}] * 12, settings=SETTINGS)
    with pytest.raises(ExplainError, match="eval_dataset: expected tokenized samples"):
        trainer.explain(eval_dataset=[{"text": "a"}] * 12, settings=SETTINGS)
    with pytest.raises(ExplainError, match="slices: expected 40 values for 'kind', got 2"):
        trainer.explain(slices={"kind": [1, 2]}, settings=SETTINGS)
    with pytest.raises(TeacherError, match=r"^dense_model: cannot open a model at '/nope'"):
        trainer.explain("/nope", settings=SETTINGS)
    trainer.eval_dataset = {"a": bert_examples()}
    with pytest.raises(ExplainError, match="expected one data set with a length, got dict"):
        trainer.explain(settings=SETTINGS)


def test_what_was_cut_out_of_the_model_is_said_from_memory_and_from_the_saved_folder(tmp_path):
    trainer = trainer_of(tmp_path / "run", pruning_config=NEURONS)
    trainer.train()
    in_memory = trainer.explain(bert(), settings=SETTINGS)
    assert in_memory.removed_words == "75% of the neurons of each layer"
    saved = trainer.explain(settings=SETTINGS, output_dir=tmp_path / "model")
    assert saved.removed_words == in_memory.removed_words
