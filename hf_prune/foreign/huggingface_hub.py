"""Undocumented names of huggingface_hub."""

from typing import Any

from .entry import Foreign, find_in

NAMES: dict[str, Foreign] = {
    "REGEX_YAML_BLOCK": Foreign(
        "huggingface_hub.repocard:REGEX_YAML_BLOCK",
        "change a card's metadata and leave its text unchanged",
        "when ModelCard preserves text and metadata exactly",
    ),
    "eval_results_to_model_index": Foreign(
        "huggingface_hub.repocard_data:eval_results_to_model_index",
        "write evaluation results in the Hub's format",
        "when ModelCardData accepts them beside an existing model-index",
    ),
}


def __getattr__(name: str) -> Any:
    return find_in(NAMES, __name__, name)
