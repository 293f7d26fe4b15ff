"""The Hub's names of tasks, the task of a model class, and the metric that is usually reported for a task."""

from collections.abc import Iterable, Mapping
from typing import Any

from ..foreign.transformers import TASK_MAPPING

# The tasks of models on the Hub, which `pipeline_tag` may name: packages/tasks/src/pipelines.ts of huggingface.js,
# without those that it hides for models (`multiple-choice`).
HUB_TASKS = frozenset(
    (
        *("any-to-any", "audio-classification", "audio-text-to-text", "audio-to-audio", "automatic-speech-recognition"),
        *("biology", "depth-estimation", "document-question-answering", "feature-extraction", "fill-mask", "graph-ml"),
        *("image-classification", "image-feature-extraction", "image-segmentation", "image-text-to-text"),
        *("image-to-3d", "image-to-image", "image-to-text", "image-to-video", "keypoint-detection", "mask-generation"),
        *("object-detection", "question-answering", "reinforcement-learning", "robotics", "sentence-similarity"),
        *("summarization", "table-question-answering", "tabular-classification", "tabular-regression"),
        *("text-classification", "text-generation", "text-ranking", "text-to-3d", "text-to-audio", "text-to-image"),
        *("text-to-speech", "text-to-video", "text2text-generation", "time-series-forecasting"),
        *("token-classification", "translation", "unconditional-image-generation", "video-classification"),
        *("video-text-to-text", "visual-document-retrieval", "visual-question-answering"),
        *("voice-activity-detection", "zero-shot-classification", "zero-shot-image-classification"),
        "zero-shot-object-detection",
    )
)

# The ends of class names that `TASK_MAPPING` does not have.
_BY_ENDING = {
    "ForSemanticSegmentation": "image-segmentation",
    "ForInstanceSegmentation": "image-segmentation",
    "ForUniversalSegmentation": "image-segmentation",
    "ForDepthEstimation": "depth-estimation",
    "ForVideoClassification": "video-classification",
    "ForMultipleChoice": "multiple-choice",
}


def task_of(architecture: str | None) -> str | None:
    """The Hub's name for the task of a transformers class, or None. Not all are in `HUB_TASKS`: `multiple-choice`.

    Of several tasks it is the last and most special one: BART fills masks, but generates text from text.
    """
    mappings: Mapping[str, Any] = TASK_MAPPING
    found = None
    for task, classes in mappings.items():
        for names in classes.values():
            if architecture in ((names,) if isinstance(names, str) else names):
                found = task
    ends = (task for ending, task in _BY_ENDING.items() if architecture is not None and architecture.endswith(ending))
    return found or next(ends, None)


# The metrics that are reported first for a task, and then those for any other.
_OF_TASKS = {
    "token-classification": ("overall_f1", "f1"),
    "question-answering": ("f1", "exact_match"),
    "text-generation": ("perplexity",),
    "fill-mask": ("perplexity",),
    "image-segmentation": ("mean_iou", "map"),
    "object-detection": ("map",),
    "translation": ("bleu", "sacrebleu"),
}
_OF_ANY = (
    *("accuracy", "f1", "overall_f1", "matthews_correlation", "pearson", "pearsonr", "spearmanr", "exact_match"),
    *("wer", "cer", "rouge", "rouge1", "rougel", "rougelsum", "rouge2", "bleu", "sacrebleu", "chrf", "mean_iou"),
    *("overall_accuracy", "map", "perplexity", "mse", "rmse", "mae"),
)


def main_metric(task: str | None, metrics: Iterable[str], wanted: str | None = None) -> str | None:
    """The metric to report first: `wanted` unless it is a loss, else the usual one of the task, else None."""
    names = {name.lower(): name for name in reversed(list(metrics))}
    if wanted in names.values() and not (wanted == "loss" or str(wanted).endswith("_loss")):
        return wanted
    usual = (*_OF_TASKS.get(task or "", ()), *_OF_ANY)
    return next((names[name] for name in usual if name in names), None)
