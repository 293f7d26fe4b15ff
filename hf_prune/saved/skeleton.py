"""The skeleton of a saved model (on the meta device), and which parameter each saved tensor belongs to."""

from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from ..config.safe_json import read_json
from ..errors import first_line
from ..foreign.transformers import revert_weight_conversion
from ..model.limits import few_modules, too_large
from ..model.opening import why_not_opened
from ..structure.fields import MISFITS
from .files import lies_inside


def build_skeleton(folder: Path) -> tuple[PreTrainedModel | None, str | None]:
    """The model of a folder's config.json without weights (on the meta device), or None and the reason.

    The reason is also a model of more than 2,000 layers, a million labels or 200,000 modules: it is not built.
    """
    problem = _check_configurations(folder)
    if problem is not None:
        return None, problem
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        architectures = getattr(config, "architectures", None)
        names = [str(name) for name in architectures] if isinstance(architectures, (list, tuple)) else []
        model_class = getattr(transformers, names[0], None) if names else None
    except (OSError, *MISFITS) as error:
        return None, f"the model class is unknown: {why_not_opened(error, first_line)}"
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        return None, f"the model class {names[0] if names else '(none named)'} is not part of transformers"
    try:
        with torch.device("meta"), few_modules():
            return model_class(config), None
    except MISFITS as error:
        return None, f"{names[0]} cannot be created from config.json: {first_line(error)}"


def _check_configurations(folder: Path) -> str | None:
    """Why config.json, or a file that it names for versions of transformers, cannot be used; None if nothing is wrong.

    A file that does not exist is left to transformers.
    """
    names = ["config.json"]
    for name in names:
        path = folder / name
        if not lies_inside(path, folder):
            return f"the model class is unknown: {path}: it is a link to outside the folder"
        try:
            content = read_json(path, finite=False)
        except FileNotFoundError:
            continue
        except ValueError as error:
            return f"the model class is unknown: {path}: {first_line(error)}"
        problem = too_large(content)
        if problem is not None:
            return f"{path}: {problem}"
        listed = content.get("configuration_files") if name == "config.json" and isinstance(content, dict) else None
        others = [other for other in listed if isinstance(other, str)] if isinstance(listed, list) else []
        names += {other for other in others if other.isprintable() and other == Path(other).name} - {*names}
    return None


def owner_of(key: str, owners: dict[str, str], skeleton: PreTrainedModel | None) -> str:
    """The parameter that a name in the file belongs to, with or without the prefix of the base model."""
    if skeleton is None or key in owners:
        return owners.get(key, key)
    prefix = f"{skeleton.base_model_prefix}."
    other = key.removeprefix(prefix) if key.startswith(prefix) else prefix + key
    return owners.get(other, key)


def owners_of(skeleton: PreTrainedModel) -> dict[str, str]:
    """Name in the file -> name of the parameter, as `save_pretrained` of the model converts it."""
    owners = {}
    for name, parameter in skeleton.named_parameters():
        owners.update(dict.fromkeys(revert_weight_conversion(skeleton, {name: parameter}), name))
    return owners
