"""What criteria remember of each weight from one optimizer step to the next, on what this process holds."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from ..methods.criteria import Criterion
from ..saved.masks import Remembered
from .local import LocalTensor

# What a criterion that lets weights come back remembers beside its own: the values of those that it has masked.
_VALUES = "masked_values"


class Memory:
    """Float32 tensors, flat as a process holds its part of a parameter.

    They are there from the first optimizer step on in which there was something to remember.

    Attributes:
        tensors: the tensors by `METHOD.NAME/PARAMETER`.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}

    def of(self, method: str, names: Sequence[str], parameter: str) -> dict[str, torch.Tensor] | None:
        """What a method remembers of a parameter, by name; None before there is anything."""
        there = {name: self.tensors[key] for name in names if (key := _key(method, name, parameter)) in self.tensors}
        return there if len(there) == len(names) else None

    def add_step(self, method: str, criterion: Criterion, tensor: LocalTensor, seed: int) -> None:
        """Let a criterion remember one optimizer step of a tensor, with what it reads in there."""
        assert criterion.remember is not None
        parameter = tensor.target.name
        if self.of(method, criterion.memory, parameter) is None:
            for name in criterion.memory:
                self.tensors[_key(method, name, parameter)] = torch.zeros_like(tensor.weight, dtype=torch.float32)
        memory = self.of(method, criterion.memory, parameter)
        assert memory is not None
        tensor = replace(tensor, memory=memory)
        for part in tensor.pieces():
            values = criterion.remember(tensor.weight[part], tensor.piece(criterion, seed, part))
            for name in criterion.memory:
                memory[name][part] = values[name]

    def masked_values(self, method: str, parameter: str) -> torch.Tensor | None:
        """The values that weights had before the method masked them, zero elsewhere; None where it has masked none."""
        return self.tensors.get(_key(method, _VALUES, parameter))

    def keep_masked_values(self, method: str, parameter: str, values: torch.Tensor) -> None:
        """Remember these values of masked weights in place of those so far."""
        self.tensors[_key(method, _VALUES, parameter)] = values.float()

    def saved(self, parameters: Container[str]) -> dict[str, Remembered]:
        """All that is remembered of these parameters, as it is saved."""
        found = {key: Remembered(key.partition("/")[2], tensor) for key, tensor in self.tensors.items()}
        return {key: one for key, one in found.items() if one.parameter in parameters}

    def take(self, saved: Mapping[str, Remembered], parameters: Mapping[str, nn.Parameter]) -> None:
        """Have what was saved in place of what is remembered."""
        self.tensors = {key: one.values.to(parameters[one.parameter].device) for key, one in saved.items()}


def _key(method: str, name: str, parameter: str) -> str:
    return f"{method}.{name}/{parameter}"
