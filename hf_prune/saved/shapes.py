"""Whether opening a saved model gives the shapes of the tensors in its files."""

import os
from pathlib import Path

from safetensors import safe_open

from ..errors import StructureError
from . import files
from .skeleton import build_skeleton, owners_of


def check_shapes(folder: str | os.PathLike) -> None:
    """Raise StructureError if the model of a folder's config.json has other shapes than the tensors in its files.

    Fields that a class does not read are ignored without an error, so the shapes are looked at, not the fields. Only
    the headers of the files are read. Tensors that the model saves under other names than its own are left out.
    """
    folder = Path(folder)
    skeleton, why = build_skeleton(folder)
    if skeleton is None:
        raise StructureError("structure", f"{folder}: the smaller model that was saved cannot be opened: {why}")
    expected = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
    owners = owners_of(skeleton)
    for path in files.weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (it is no dictionary)
                shape = tuple(file.get_slice(key).get_shape())
                if owners.get(key) == key and expected[key] != shape:
                    raise StructureError(
                        "structure",
                        f"{folder}: expected {key} of shape {expected[key]}, which config.json gives, got {shape} in "
                        f"{path.name}: the smaller model would not open",
                    )
