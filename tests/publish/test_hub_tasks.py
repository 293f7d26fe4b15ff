import pytest

from hf_prune.foreign.transformers import TASK_MAPPING
from hf_prune.publish.tasks import HUB_TASKS, main_metric, task_of


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("BertForSequenceClassification", "text-classification"),
        ("GPT2LMHeadModel", "text-generation"),
        ("ResNetForImageClassification", "image-classification"),
        ("BartForConditionalGeneration", "text2text-generation"),  # which also fills masks
        ("SegformerForSemanticSegmentation", "image-segmentation"),
        ("Mask2FormerForUniversalSegmentation", "image-segmentation"),
        ("Wav2Vec2ForCTC", "automatic-speech-recognition"),
        ("BertForMultipleChoice", "multiple-choice"),
        ("ViTMAEForPreTraining", None),
        ("BertModel", None),
        ("NobodysModel", None),
        (None, None),
    ],
)
def test_the_task_is_that_of_the_class(architecture, task):
    assert task_of(architecture) == task


def test_tasks_of_transformers_are_on_the_hub_and_those_hidden_there_are_not_named():
    assert set(TASK_MAPPING) <= HUB_TASKS
    assert not {"multiple-choice", "masked-auto-encoding", "speech-recognition"} & HUB_TASKS


@pytest.mark.parametrize(
    ("task", "metrics", "wanted", "expected"),
    [
        ("text-classification", ["loss", "f1", "accuracy"], None, "accuracy"),
        ("text-classification", ["loss", "f1", "accuracy"], "loss", "accuracy"),
        ("text-classification", ["loss", "accuracy", "f1"], "f1", "f1"),
        ("text-classification", ["accuracy"], "not_measured", "accuracy"),
        ("token-classification", ["LOC_precision", "overall_accuracy", "overall_f1"], "loss", "overall_f1"),
        ("token-classification", ["precision", "accuracy", "f1"], None, "f1"),
        ("question-answering", ["exact_match", "f1"], None, "f1"),
        ("text-generation", ["loss", "accuracy", "perplexity"], None, "perplexity"),
        ("image-segmentation", ["iou_wall", "overall_accuracy", "mean_iou"], None, "mean_iou"),
        ("translation", ["gen_len", "bleu"], None, "bleu"),
        ("summarization", ["gen_len", "rougeL", "rouge1"], None, "rouge1"),
        (None, ["Accuracy"], None, "Accuracy"),
        (None, ["loss", "gen_len"], "loss", None),
        (None, ["distillation_loss"], "distillation_loss", None),
        (None, [], None, None),
    ],
)
def test_the_main_metric_is_the_usual_one_of_the_task(task, metrics, wanted, expected):
    assert main_metric(task, metrics, wanted) == expected
