"""The width of a model: the dimensions of its hidden states, with everything that reads or writes them."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

from .fields import Effect, Path, number_fields, section_of
from .units import CoupledUnits, Family, Field, Part


def hidden_families(
    config: PreTrainedConfig,
    effect_of_fields: Callable[[Mapping[Path, Any]], Effect | None],
    inputs: Mapping[str, int | None],
    linear: Collection[str],
    outside: Collection[str],
) -> list[Family]:
    """The widths that fields of a configuration set.

    If such a field is doubled and the size of heads stays, one dimension of many tensors is doubled: embeddings, norms,
    and the sides of linear layers that read or write hidden states.

    Args:
        effect_of_fields: what other values of fields change.
        inputs: parameter name -> the dimension of its inputs; None where it has none.
        linear: the names of the weights of linear layers.
        outside: the names of parameters that are not in layers; hidden states have some of them.
    """
    found = []
    for path, value in number_fields(config):
        for fixed in _sizes_of_heads(config, path) if type(value) is int else ():
            effect = effect_of_fields({path: 2 * value, **fixed})
            names = [name for name, _ in effect.sizes] if effect is not None else []
            if effect is None or not effect.only_resizes or len(set(names)) != len(names):
                continue  # nothing, or a tensor that is doubled on both sides
            if set(effect.sizes.values()) != {(value, 2 * value)} or not set(names) & set(outside):
                continue
            parts = {key: Part(*key, ((0, 1),)) for key in effect.sizes}
            readers = tuple(part for part in parts.values() if part.name in linear and inputs[part.name] == part.dim)
            others = tuple(part for part in parts.values() if part not in readers)
            if readers and any(part.name in linear for part in others):
                group = CoupledUnits("hidden", _place(names), value, others, readers)
                found.append(Family("hidden", (Field(path, 1),), (group,), fixed))
                break
    return found


def _place(names: Sequence[str]) -> str:
    """The path of the innermost module that most of the parameters are in: that of the model without its head."""
    paths = Counter(name.partition(".")[0] for name in names)
    return paths.most_common(1)[0][0]


def _sizes_of_heads(config: PreTrainedConfig, path: Path) -> Iterator[dict[Path, Any]]:
    """Values that keep the size of heads: none, or that of the field for it."""
    yield {}
    section = section_of(config, path)
    width, heads = getattr(section, "hidden_size", None), getattr(section, "num_attention_heads", None)
    size = getattr(section, "head_dim", None)
    if type(size) is not int and type(width) is int and type(heads) is int and heads and width % heads == 0:
        size = width // heads
    if type(size) is int:
        yield {(*path[:-1], "head_dim"): size}
