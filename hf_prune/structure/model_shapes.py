"""What is known of a model's tensors when its units are looked for: shapes, inputs, layers, and what fields change."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from ..errors import StructureError
from ..model.anatomy import is_experts, is_layer, stacks
from ..model.layouts import layout_of
from ..model.names import named_modules_of, shape_of
from .fields import Effect, Path, effect_of, scaled_overrides, section_of, shapes_of, without_overrides
from .units import CoupledUnits


class ModelShapes:
    """A model as its class builds it from its configuration, by the names of its parameters.

    The shapes do not say in which order the parts of a fused tensor lie. By default gate and up are taken to be two
    blocks of neurons, and query, key and value to lie together for each head; if `interleaved`, the other way.

    Attributes:
        config: the configuration; `globals` is the same with one value for all layers.
        before: the shape.
        inputs: the dimension of the inputs; None where there is none.
        fused: the names of the tensors of fused experts.
        linear: the names of the weights of linear layers.
        depths: the number of layers by the path of each stack.

    Raises StructureError if it cannot be built, or has other tensors than that.
    """

    def __init__(self, model: PreTrainedModel, interleaved: bool):
        self.model_class, self.config, self.interleaved = type(model), model.config, interleaved
        self.model, self.globals = model, without_overrides(model.config)
        before = shapes_of(self.model_class, self.config)
        if before is None:
            raise StructureError(
                "structure", f"{self.model_class.__name__} cannot be built from its configuration alone; prune weights"
            )
        self.before = before
        check_as_built(model, before)
        modules = named_modules_of(model, self.before.keys())
        self.inputs = {}
        for name, module in modules.items():
            is_bias = is_experts(module) and len(self.before[name]) < 3  # a row for each expert
            self.inputs[name] = None if is_bias else _input_dim(layout_of(module, len(self.before[name])))
        self.fused = {
            name for name, module in modules.items() if layout_of(module, len(self.before[name])).startswith("experts")
        }
        self.linear = {name for name, module in modules.items() if is_layer(module) and name.endswith("weight")}
        self.depths = {stack: len(list(model.get_submodule(stack).children())) for stack in stacks(model)}

    def effect(self, values: Mapping[Path, Any]) -> Effect | None:
        """The effect of other values, also of the layers' own ones, in the same proportion."""
        return effect_of(
            self.model_class, self.config, {**scaled_overrides(self.config, values), **values}, self.before
        )

    def stack_of(self, path: Path, groups: Sequence[CoupledUnits]) -> str:
        """The outermost stack of as many layers as the configuration counts that has all of these groups, or none."""
        depth = getattr(section_of(self.globals, path), "num_hidden_layers", None)
        found = [
            stack
            for stack, layers in self.depths.items()
            if layers == depth and all(f"{group.path}.".startswith(f"{stack}.") for group in groups)
        ]
        return min(found, key=len, default="")

    def in_stack(self, name: str) -> bool:
        """Whether a parameter is in a layer of a stack."""
        return any(name.startswith(f"{stack}.") for stack in self.depths)

    def layer_of(self, name: str) -> str:
        """The path of the innermost layer of a stack that a parameter is in; empty if it is in none."""
        inside = max((stack for stack in self.depths if name.startswith(f"{stack}.")), key=len, default=None)
        return "" if inside is None else f"{inside}.{name.removeprefix(f'{inside}.').partition('.')[0]}"


def check_as_built(model: PreTrainedModel, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise StructureError for a model with other tensors than its class builds; `from_pretrained` opens none such."""
    found = {name: shape_of(parameter) for name, parameter in model.named_parameters()}
    other = next((name for name in (*expected, *found) if expected.get(name) != found.get(name)), None)
    if other is not None:
        got = f"{other} of shape {found[other]}" if other in found else f"no {other}"
        built = f"one of shape {expected[other]}" if other in expected else "none"
        raise StructureError(
            "structure",
            f"expected a model as {type(model).__name__} builds it from its configuration, or from_pretrained could "
            f"not open a smaller one; got {got}, where it builds {built}",
        )


def _input_dim(layout: str) -> int | None:
    """The dimension of the inputs of a tensor of this layout."""
    return {"matrix": 1, "transposed": 0, "convolution": 1, "experts": 2, "experts_transposed": 1}.get(layout)
