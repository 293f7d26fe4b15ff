"""Small scripts in the style of transformers' examples, with one word changed: pruned, reopened, their cards read.

What they have in common with the examples is where their metrics come from, what they pass to `create_model_card`, and
which parts of the model they freeze.
"""

import math
import re
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
import yaml
from models import VOCABULARY, bert, segformer_config, training_arguments
from safetensors import safe_open
from transformers import Trainer
from transformers.trainer_utils import EvalPrediction, PredictionOutput, speed_metrics

from hf_prune import PruningConfig, PruningMixin, PruningTrainer
from hf_prune.publish.record import load_record

HALF = PruningConfig(sparsity=0.5, schedule="one_shot", begin=0)


def examples(make, count=8):
    generator = torch.Generator().manual_seed(1)
    return [make(generator) for _ in range(count)]


def finish(trainer, **said):
    """The end of a script: save, evaluate, card. Checks the model that is there then; its card and its record."""
    trainer.train()
    trainer.save_model()
    metrics = trainer.evaluate()
    trainer.create_model_card(**said)
    folder = trainer.args.output_dir
    opened = type(trainer.model).from_pretrained(folder)
    weights = dict(opened.named_parameters())
    assert trainer.pruner.masks
    for name, mask in trainer.pruner.masks.items():
        assert int((weights[name] == 0).sum()) >= int((~mask).sum()) == round(mask.numel() / 2), name
    with open(f"{folder}/README.md", encoding="utf-8") as file:
        card = file.read()
    rows = re.findall(r"^\| `([^`]+)` \| [\d×]+ \|", card, flags=re.MULTILINE)
    with safe_open(f"{folder}/model.safetensors", framework="pt") as saved:
        assert len(rows) == len(trainer.pruner.masks)
        assert set(rows) <= set(saved.keys())
    summary = card.split("<!-- hf-prune: end summary")[0]
    headline = re.search(r"^`(\w+)` is \*\*(.+)\*\*", summary, flags=re.MULTILINE)
    return SimpleNamespace(
        metrics=metrics,
        card=card,
        metadata=yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n")),
        headline=headline[1] if headline else None,
        record=load_record(folder),
    )


# ---- Question answering: metrics of answers, made in `evaluate` after the loop ----


def question_answering_trainer(base):
    """The class of run_qa.py, in short."""

    class QuestionAnsweringTrainer(base):
        def __init__(self, *args, eval_examples=None, post_process_function=None, **kwargs):
            super().__init__(*args, **kwargs)
            self.eval_examples = eval_examples
            self.post_process_function = post_process_function

        def evaluate(self, eval_dataset=None, eval_examples=None, ignore_keys=None, metric_key_prefix="eval"):
            eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
            output = self._loop(self.get_eval_dataloader(eval_dataset), ignore_keys, metric_key_prefix)
            metrics = self._metrics(eval_examples or self.eval_examples, output, metric_key_prefix)
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

        def predict(self, predict_dataset, predict_examples, ignore_keys=None, metric_key_prefix="test"):
            output = self._loop(self.get_test_dataloader(predict_dataset), ignore_keys, metric_key_prefix)
            metrics = self._metrics(predict_examples, output, metric_key_prefix)
            return PredictionOutput(predictions=output.predictions, label_ids=None, metrics=metrics)

        def _loop(self, dataloader, ignore_keys, prefix):
            compute_metrics, self.compute_metrics = self.compute_metrics, None
            start = time.time()
            try:
                output = self.evaluation_loop(
                    dataloader,
                    description="Evaluation",
                    prediction_loss_only=True if compute_metrics is None else None,
                    ignore_keys=ignore_keys,
                    metric_key_prefix=prefix,
                )
            finally:
                self.compute_metrics = compute_metrics
            output.metrics.update(speed_metrics(prefix, start, num_samples=output.num_samples, num_steps=1))
            return output

        def _metrics(self, answered, output, prefix):
            metrics = self.compute_metrics(self.post_process_function(answered, output.predictions))
            return {f"{prefix}_{name}": value for name, value in metrics.items()} | output.metrics

    return QuestionAnsweringTrainer


class PruningPlainQuestions(PruningMixin, question_answering_trainer(Trainer)):
    pass


def question(generator):
    return {"input_ids": torch.randint(1, VOCABULARY, (8,), generator=generator)}


def answered(generator):
    start = torch.randint(0, 4, (), generator=generator)
    return question(generator) | {"start_positions": start, "end_positions": start + 2}


def answers(examples, predictions):
    starts, ends = (np.argmax(logits, axis=-1) for logits in predictions[:2])
    return EvalPrediction(predictions=list(zip(starts, ends, strict=True)), label_ids=examples)


def squad(prediction):
    exact = [float(guess == truth) for guess, truth in zip(prediction.predictions, prediction.label_ids, strict=True)]
    return {"exact_match": float(np.mean(exact)), "f1": float(np.mean([start for start, _ in prediction.predictions]))}


def qa_trainer(cls, folder, config=HALF, **changes):
    return cls(
        model=transformers.BertForQuestionAnswering(bert().config),
        args=training_arguments(folder, max_steps=4, **changes),
        train_dataset=examples(answered),
        eval_dataset=examples(question, 6),  # features have no labels
        eval_examples=[(1, 3)] * 6,
        post_process_function=answers,
        compute_metrics=squad,
        pruning_config=config,
    )


@pytest.mark.parametrize("cls", [question_answering_trainer(PruningTrainer), PruningPlainQuestions])
def test_question_answering(tmp_path, cls):
    """What `evaluate` and `predict` return counts, whatever is computed after the loop, and of these weights only."""
    dense = qa_trainer(cls, tmp_path / "dense", config=None).evaluate()
    trainer = qa_trainer(cls, tmp_path / "out", eval_strategy="steps", eval_steps=2)
    done = finish(trainer, dense_metrics=dense, tasks="question-answering")
    (evaluation,) = done.record.evaluations
    assert evaluation.metrics == {"exact_match": done.metrics["eval_exact_match"], "f1": done.metrics["eval_f1"]}
    assert evaluation.dense_metrics == {"exact_match": dense["eval_exact_match"], "f1": dense["eval_f1"]}
    assert (evaluation.samples, done.headline) == (6, "f1")
    assert done.metadata["pipeline_tag"] == "question-answering"
    predicted = trainer.predict(trainer.eval_dataset, trainer.eval_examples).metrics
    trainer.create_model_card()
    assert load_record(tmp_path / "out").evaluations[1].metrics["f1"] == predicted["test_f1"]
    with torch.no_grad():
        trainer.model.qa_outputs.bias += 1
    trainer.create_model_card()
    assert load_record(tmp_path / "out").evaluations == []


def test_metrics_without_a_loop_count_for_the_weights_that_the_model_has_then(tmp_path):
    class OwnLoop(PruningTrainer):
        def evaluate(self, *args, **kwargs):
            return {"bleu": 12.5, "epoch": 1.0}

    trainer = OwnLoop(
        model=transformers.BertForQuestionAnswering(bert().config),
        args=training_arguments(tmp_path, max_steps=2),
        train_dataset=examples(answered),
        pruning_config=HALF,
    )
    trainer.train()
    trainer.evaluate()["eval_rouge1"] = 5.0  # unknown to the trainer
    trainer.create_model_card()
    (evaluation,) = load_record(tmp_path).evaluations
    assert (evaluation.metrics, evaluation.samples, evaluation.main_metric) == ({"bleu": 12.5}, None, "bleu")
    trainer.train()
    trainer.create_model_card()
    assert load_record(tmp_path).evaluations == []


def test_each_of_several_data_sets_has_what_evaluate_returned_for_it(tmp_path):
    class Adding(PruningTrainer):
        def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            return metrics | {f"{metric_key_prefix}_f1": float(len(metric_key_prefix))}

    trainer = Adding(
        model=transformers.BertForQuestionAnswering(bert().config),
        args=training_arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1),
        train_dataset=examples(answered),
        eval_dataset={"news": examples(answered, 4), "films": examples(answered, 6)},
        pruning_config=HALF,
    )
    trainer.train()
    trainer.create_model_card()
    found = {one.part: (one.metrics["f1"], one.samples) for one in load_record(tmp_path).evaluations}
    assert found == {"eval_news": (9.0, 4), "eval_films": (10.0, 6)}


# ---- Token classification: metrics of entities, the best model by its loss, a base in a folder ----


def entities(prediction):
    guessed = np.argmax(prediction.predictions, axis=-1)
    of_entity = {f"{name}_{kind}": 0.5 for name in ("LOC", "PER") for kind in ("precision", "recall", "f1")}
    accuracy = float(np.mean(guessed == prediction.label_ids))
    return of_entity | {"overall_precision": 0.5, "overall_f1": accuracy / 2, "overall_accuracy": accuracy}


def tagged(generator):
    tokens = question(generator)
    return tokens | {"labels": tokens["input_ids"] % 2}


def test_token_classification(tmp_path):
    base = tmp_path / "models" / "my-base"
    transformers.BertForTokenClassification(bert().config).save_pretrained(base)
    trainer = PruningTrainer(
        model=transformers.BertForTokenClassification.from_pretrained(base),
        args=training_arguments(
            tmp_path / "out",
            max_steps=4,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
            load_best_model_at_end=True,
        ),
        train_dataset=examples(tagged),
        eval_dataset=examples(tagged, 4),
        compute_metrics=entities,
        pruning_config=HALF,
    )
    done = finish(trainer, finetuned_from=str(base), tasks="token-classification", dataset="CoNLL", license="mit")
    assert done.headline == "overall_f1"
    assert done.metadata["pipeline_tag"] == "token-classification"
    assert "base_model" not in done.metadata
    assert "`my-base`, fine-tuned" in done.card
    assert str(tmp_path) not in done.card + str(done.record)
    (result,) = done.metadata["model-index"][0]["results"]
    assert {row["type"]: row["value"] for row in result["metrics"]}["overall_f1"] == round(
        done.metrics["eval_overall_f1"], 6
    )


# ---- Speech recognition with a frozen extractor of features, whose task the script names wrongly ----


def spoken(generator):
    return {
        "input_values": torch.randn(400, generator=generator),
        "labels": torch.randint(1, 8, (3,), generator=generator),
    }


def word_errors(prediction):
    return {"wer": float(np.mean(np.argmax(prediction.predictions, axis=-1)[:, :3] != prediction.label_ids))}


def test_speech_recognition(tmp_path):
    config = transformers.Wav2Vec2Config(
        vocab_size=8,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        conv_dim=(8, 8),
        conv_stride=(5, 4),
        conv_kernel=(10, 3),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0,
        pad_token_id=0,
    )
    model = transformers.Wav2Vec2ForCTC(config)
    model.freeze_feature_encoder()
    trainer = PruningTrainer(
        model=model,
        args=training_arguments(tmp_path, max_steps=3),
        train_dataset=examples(spoken),
        eval_dataset=examples(spoken, 4),
        compute_metrics=word_errors,
        pruning_config=HALF,
    )
    done = finish(trainer, tasks="speech-recognition", tags=["automatic-speech-recognition", "librispeech"])
    assert done.metadata["pipeline_tag"] == "automatic-speech-recognition"
    assert done.headline == "wer"
    assert done.record.evaluation.metrics["wer"] == done.metrics["eval_wer"]


# ---- Semantic segmentation: metrics of each category ----


def segmented(generator):
    return {
        "pixel_values": torch.randn(3, 16, 16, generator=generator),
        "labels": torch.randint(0, 3, (16, 16), generator=generator),
    }


def overlaps(prediction):
    shares = [float(np.mean(prediction.label_ids == category)) for category in range(3)]
    of_categories = {f"iou_{category}": share for category, share in enumerate(shares)}
    return of_categories | {"mean_accuracy": 0.5, "overall_accuracy": 0.5, "mean_iou": float(np.mean(shares))}


def test_semantic_segmentation(tmp_path):
    trainer = PruningTrainer(
        model=transformers.SegformerForSemanticSegmentation(segformer_config(num_labels=3)),
        args=training_arguments(tmp_path, max_steps=3, remove_unused_columns=False),
        train_dataset=examples(segmented),
        eval_dataset=examples(segmented, 4),
        compute_metrics=overlaps,
        pruning_config=HALF,
    )
    done = finish(trainer, tags=["image-segmentation", "vision"])
    assert done.metadata["pipeline_tag"] == "image-segmentation"
    assert done.headline == "mean_iou"


# ---- Masked autoencoding: a loss, and a task that the Hub does not have ----


def test_masked_autoencoding(tmp_path, caplog):
    config = transformers.ViTMAEConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=24,
        image_size=16,
        patch_size=4,
    )
    pictures = examples(lambda generator: {"pixel_values": torch.randn(3, 16, 16, generator=generator)})
    trainer = PruningTrainer(
        model=transformers.ViTMAEForPreTraining(config),
        args=training_arguments(tmp_path, max_steps=3, label_names=["pixel_values"]),
        train_dataset=pictures,
        eval_dataset=pictures[:4],
        pruning_config=HALF,
    )
    done = finish(trainer, tasks="masked-auto-encoding", dataset="pictures")
    assert not {"pipeline_tag", "model-index", "metrics"} & set(done.metadata)
    assert done.headline is None
    assert math.isfinite(done.record.evaluation.metrics["loss"])
    assert "does not name the task 'masked-auto-encoding', which the Hub does not have" in caplog.text
