"""Texts that are changed a little, as people write them: whether a classifier still answers the same."""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Perturbation:
    """A change of a text: its name, what it does in words, the function, and whether it draws from its generator."""

    name: str
    words: str
    change: Callable[[str, random.Random], str]
    is_random: bool


def _with_typos(text: str, generator: random.Random) -> str:
    def swapped(word: re.Match[str]) -> str:
        letters = list(word.group())
        if generator.random() < 0.2:
            place = generator.randrange(len(letters) - 1)
            letters[place], letters[place + 1] = letters[place + 1], letters[place]
        return "".join(letters)

    return re.sub(r"[^\W\d_]{4,}", swapped, text)


def _without_words(text: str, generator: random.Random) -> str:
    words = text.split()
    left = [word for word in words if generator.random() >= 0.1]
    return " ".join(left or words)


PERTURBATIONS = (
    Perturbation(
        "typos", "two neighbouring letters are swapped in one of five words of four letters or more", _with_typos, True
    ),
    Perturbation("upper case", "all letters are upper case", lambda text, generator: text.upper(), False),
    Perturbation("lower case", "all letters are lower case", lambda text, generator: text.lower(), False),
    Perturbation("dropped words", "one of ten words is left out", _without_words, True),
)


def perturbed(texts: Sequence[str], perturbation: Perturbation, seed: int) -> list[str]:
    """The texts, each changed; the same for one seed."""
    generator = random.Random(seed)
    return [perturbation.change(text, generator) for text in texts]
