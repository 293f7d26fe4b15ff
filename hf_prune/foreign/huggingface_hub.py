"""What huggingface_hub does not document."""

from typing import Any

from .entry import Foreign, find_in

NAMES: dict[str, Foreign] = {
    "REGEX_YAML_BLOCK": Foreign(
        "huggingface_hub.repocard:REGEX_YAML_BLOCK",
        "change a card's metadata and leave its text as it is",
        "when a card gives its text and metadata back as they were",
    ),
    "eval_results_to_model_index": Foreign(
        "huggingface_hub.repocard_data:eval_results_to_model_index",
        "write results of an evaluation as the Hub reads them",
        "when a card takes them beside a model-index that is there",
    ),
}


def __getattr__(name: str) -> Any:
    return find_in(NAMES, __name__, name)
