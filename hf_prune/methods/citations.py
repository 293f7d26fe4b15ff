"""BibTeX entries of methods, reconstructions, schedules, scopes, patterns, penalties, losses, and shared values."""

from collections.abc import Mapping, Sequence
from typing import Any

from .patterns import PATTERNS, parse_pattern
from .penalties import PENALTIES
from .reconstructions import RECONSTRUCTIONS
from .schedules import SCHEDULES
from .scopes import SCOPES
from .table import method_of, reads_of

_DISTILLATION = """@article{hinton2015distilling,
  title = {Distilling the Knowledge in a Neural Network},
  author = {Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff},
  journal = {arXiv preprint arXiv:1503.02531},
  year = {2015}
}"""
_HIDDEN_STATES = """@article{kurtic2023sparse,
  title = {Sparse Fine-tuning for Inference Acceleration of Large Language Models},
  author = {Kurtic, Eldar and Kuznedelev, Denis and Frantar, Elias and Goin, Michael and Alistarh, Dan},
  journal = {arXiv preprint arXiv:2310.06927},
  year = {2023}
}"""

_SHARED_VALUES = """@inproceedings{han2016deep,
  title = {Deep Compression: Compressing Deep Neural Networks with Pruning, Trained Quantization and Huffman Coding},
  author = {Han, Song and Mao, Huizi and Dally, William J.},
  booktitle = {International Conference on Learning Representations},
  year = {2016}
}"""

_FEEDBACK = """@inproceedings{frantar2023gptq,
  title = {{GPTQ}: Accurate Post-Training Quantization for Generative Pre-trained Transformers},
  author = {Frantar, Elias and Ashkboos, Saleh and Hoefler, Torsten and Alistarh, Dan},
  booktitle = {International Conference on Learning Representations},
  year = {2023}
}"""


def citations(
    pruning: Sequence[Mapping[str, Any]],
    distilled: bool,
    hidden_states: bool,
    recorded: Mapping[str, str | None],
    at_once: bool = False,
) -> list[str]:
    """The BibTeX entries of all that was used, each once; what has no paper is left out.

    `recorded` has the papers of methods that no table has. `at_once`: without a schedule.
    """
    papers: list[str | None] = []
    for config in pruning:
        if config["method"] != "keep":
            method, scope = method_of(config["method"], config.get("structure")), SCOPES[config["scope"]]
            schedule = None if at_once else SCHEDULES[config["schedule"]].paper
            pattern = PATTERNS[parse_pattern(config["pattern"]).name]
            paper = method.paper if method is not None else recorded.get(config["method"])
            papers += [paper, schedule, scope.paper, pattern.paper]
        if config.get("penalty"):
            papers.append(PENALTIES[config["penalty"]].paper)
        if config.get("reconstruction") in RECONSTRUCTIONS:  # none of a package that is not installed here
            papers.append(RECONSTRUCTIONS[config["reconstruction"]].paper)
        if config.get("shared_values"):
            reads = reads_of(config["method"], "layer", reconstruction=config.get("reconstruction"))
            papers += [_SHARED_VALUES, _FEEDBACK if at_once and "products" in reads else None]
    papers += [_DISTILLATION if distilled else None, _HIDDEN_STATES if hidden_states else None]
    return list(dict.fromkeys(paper for paper in papers if paper is not None))
