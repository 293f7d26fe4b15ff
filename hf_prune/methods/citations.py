"""BibTeX of the methods, schedules, scopes, patterns and losses that a model can be made with."""

from collections.abc import Mapping, Sequence
from typing import Any

from .patterns import parse_pattern

_CITATIONS = {
    "magnitude": """@inproceedings{han2015learning,
  title = {Learning both Weights and Connections for Efficient Neural Networks},
  author = {Han, Song and Pool, Jeff and Tran, John and Dally, William J.},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2015}
}""",
    "wanda": """@inproceedings{sun2024simple,
  title = {A Simple and Effective Pruning Approach for Large Language Models},
  author = {Sun, Mingjie and Liu, Zhuang and Bair, Anna and Kolter, J. Zico},
  booktitle = {International Conference on Learning Representations},
  year = {2024}
}""",
    "taylor": """@inproceedings{molchanov2019importance,
  title = {Importance Estimation for Neural Network Pruning},
  author = {Molchanov, Pavlo and Mallya, Arun and Tyree, Stephen and Frosio, Iuri and Kautz, Jan},
  booktitle = {Conference on Computer Vision and Pattern Recognition},
  year = {2019}
}""",
    "cubic": """@article{zhu2017prune,
  title = {To prune, or not to prune: exploring the efficacy of pruning for model compression},
  author = {Zhu, Michael and Gupta, Suyog},
  journal = {arXiv preprint arXiv:1710.01878},
  year = {2017}
}""",
    "erk": """@inproceedings{evci2020rigging,
  title = {Rigging the Lottery: Making All Tickets Winners},
  author = {Evci, Utku and Gale, Trevor and Menick, Jacob and Castro, Pablo Samuel and Elsen, Erich},
  booktitle = {International Conference on Machine Learning},
  year = {2020}
}""",
    "n:m": """@article{mishra2021accelerating,
  title = {Accelerating Sparse Deep Neural Networks},
  author = {Mishra, Asit and Latorre, Jorge Albericio and Pool, Jeff and Stosic, Darko and Stosic, Dusan and
            Venkatesh, Ganesh and Yu, Chong and Micikevicius, Paulius},
  journal = {arXiv preprint arXiv:2104.08378},
  year = {2021}
}""",
    "block": """@article{narang2017block,
  title = {Block-Sparse Recurrent Neural Networks},
  author = {Narang, Sharan and Undersander, Eric and Diamos, Gregory},
  journal = {arXiv preprint arXiv:1711.02782},
  year = {2017}
}""",
    "l1": """@article{tibshirani1996regression,
  title = {Regression Shrinkage and Selection via the Lasso},
  author = {Tibshirani, Robert},
  journal = {Journal of the Royal Statistical Society: Series B},
  volume = {58},
  number = {1},
  pages = {267--288},
  year = {1996}
}""",
    "group_lasso": """@article{yuan2006model,
  title = {Model selection and estimation in regression with grouped variables},
  author = {Yuan, Ming and Lin, Yi},
  journal = {Journal of the Royal Statistical Society: Series B},
  volume = {68},
  number = {1},
  pages = {49--67},
  year = {2006}
}""",
    "distillation": """@article{hinton2015distilling,
  title = {Distilling the Knowledge in a Neural Network},
  author = {Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff},
  journal = {arXiv preprint arXiv:1503.02531},
  year = {2015}
}""",
    "hidden states": """@article{kurtic2023sparse,
  title = {Sparse Fine-tuning for Inference Acceleration of Large Language Models},
  author = {Kurtic, Eldar and Kuznedelev, Denis and Frantar, Elias and Goin, Michael and Alistarh, Dan},
  journal = {arXiv preprint arXiv:2310.06927},
  year = {2023}
}""",
}


def citations(pruning: Sequence[Mapping[str, Any]], distilled: bool, hidden_states: bool) -> list[str]:
    """An entry for each thing that was used of which there is a paper."""
    used: dict[str, None] = {}
    for config in pruning:
        if config["method"] != "keep":
            used |= dict.fromkeys(
                [config["method"], config["schedule"], config["scope"], parse_pattern(config["pattern"]).name]
            )
        if config.get("penalty"):
            used[config["penalty"]] = None
    if distilled:
        used["distillation"] = None
    if hidden_states:
        used["hidden states"] = None
    return [_CITATIONS[name] for name in used if name in _CITATIONS]
