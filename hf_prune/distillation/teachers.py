"""The teacher of a distillation: opened, checked against the model, and given the inputs that it takes."""

import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..errors import TeacherError
from ..foreign.transformers import task_mappings
from ..model.names import plain_model
from ..model.opening import LOADING_ERRORS, why_not_opened


def find_teacher(given: nn.Module | str | os.PathLike, model: nn.Module) -> nn.Module:
    """The frozen teacher, in eval mode: the given model itself, or the one at the given path or Hub name.

    A path or Hub name is opened by `from_pretrained` in the dtype of `model`, with the class of `model`, or for another
    architecture the class for the same task. Raises TeacherError if it cannot be opened, lacks weights, shares weights
    with `model`, or has other labels or another vocabulary.
    """
    teacher = given if isinstance(given, nn.Module) else _open_teacher(given, plain_model(model))
    if {id(parameter) for parameter in teacher.parameters()} & {id(parameter) for parameter in model.parameters()}:
        raise TeacherError(
            "teacher_model",
            "must not share weights with the model that is trained; give the path of a model, or copy.deepcopy(model)",
        )
    _check_answers(plain_model(model), plain_model(teacher))
    return teacher.requires_grad_(False).eval()


def _open_teacher(given: Any, student: nn.Module) -> nn.Module:
    """The model at a path or with a Hub name."""
    if not isinstance(given, (str, os.PathLike)) or not str(given):
        raise TeacherError("teacher_model", f"expected a model, or the path or Hub name of one, got {given!r}")
    if not isinstance(student, PreTrainedModel):
        raise TeacherError(
            "teacher_model", f"must be a model, not a path, if the trained one is no transformers model, got {given!r}"
        )
    if Path(given, "adapter_config.json").exists():
        raise TeacherError(
            "teacher_model",
            f"expected a full model, got only adapters at {str(given)!r}; merge them into their base model, "
            "or give the base model with its adapters",
        )
    try:
        config = AutoConfig.from_pretrained(given, trust_remote_code=False)
        opened, found = _class_for(student, config).from_pretrained(
            given, config=config, dtype=student.dtype, output_loading_info=True
        )
    except LOADING_ERRORS as error:
        raise TeacherError(
            "teacher_model", f"cannot open a model at {str(given)!r}: {why_not_opened(error)}"
        ) from error
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise TeacherError(
            "teacher_model",
            f"the {type(opened).__name__} at {str(given)!r} lacks the weights {some}; give a model that was "
            "trained for this task",
        )
    return cast(nn.Module, opened)


def _class_for(student: PreTrainedModel, config: PreTrainedConfig) -> Any:
    """The class for the student's task in a configuration's architecture; if there is none, the student's class."""
    if type(config) is type(student.config):
        return type(student)
    for mapping in task_mappings():
        if type(student.config) not in mapping or type(config) not in mapping:
            continue
        of_student, of_teacher = mapping[type(student.config)], mapping[type(config)]
        if type(student) in (of_student if isinstance(of_student, tuple) else (of_student,)):
            return of_teacher[0] if isinstance(of_teacher, tuple) else of_teacher
    return type(student)


def _check_answers(student: nn.Module, teacher: nn.Module) -> None:
    """Raise TeacherError if vocabulary or labels of the teacher are not those of the model."""
    of_student, of_teacher = (getattr(one, "config", None) for one in (student, teacher))
    if of_student is None or of_teacher is None:
        return
    vocabularies = [getattr(config, "vocab_size", None) for config in (of_student, of_teacher)]
    head = [one.get_output_embeddings() if isinstance(one, PreTrainedModel) else None for one in (student, teacher)]
    if all(one is not None for one in head):
        expected, came = (cast(Any, one).weight.shape[0] for one in head)
        if expected != came:
            raise TeacherError("teacher_model", f"expected the model's vocabulary of {expected} tokens, got {came}")
    elif None not in vocabularies and vocabularies[0] != vocabularies[1]:
        raise TeacherError(
            "teacher_model", f"expected the model's vocabulary of {vocabularies[0]} tokens, got {vocabularies[1]}"
        )
    elif of_student.num_labels != of_teacher.num_labels:
        raise TeacherError(
            "teacher_model", f"expected the model's {of_student.num_labels} labels, got {of_teacher.num_labels}"
        )
    elif of_student.id2label != of_teacher.id2label and not any(
        _are_numbered(config.id2label) for config in (of_student, of_teacher)
    ):
        raise TeacherError(
            "teacher_model",
            f"expected the model's labels {of_student.id2label}, got {of_teacher.id2label}; train the "
            "model with the teacher's id2label, and number the labels of the data accordingly",
        )


def _are_numbered(labels: Mapping[int, str]) -> bool:
    """Whether all labels have transformers' default names."""
    return all(name == f"LABEL_{index}" for index, name in labels.items())


def takes_input(model: nn.Module, name: str) -> bool:
    """Whether a model's forward pass takes an input of this name."""
    return bool(_taken(model, [name]))


def _taken(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The inputs among these names that a model's forward pass takes."""
    parameters = inspect.signature(plain_model(model).forward).parameters
    takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    return [name for name in names if takes_all or name in parameters]


def teacher_inputs(teacher: nn.Module, inputs: Mapping[str, Any], label_names: Sequence[str]) -> dict[str, Any]:
    """The inputs for a teacher: those of the model that it takes by name, and no labels unless it needs them.

    It is told not to keep a cache of keys and values.
    """
    asked = {name: inputs[name] for name in _taken(teacher, inputs) if name not in label_names}
    if "use_cache" in inspect.signature(plain_model(teacher).forward).parameters:
        asked["use_cache"] = False
    if "labels" in inputs and "decoder_input_ids" not in asked:
        asked |= _decoder_inputs(teacher, inputs["labels"])
    return asked


def _decoder_inputs(model: nn.Module, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """The labels as a decoder's inputs, shifted right as its model does it; nothing for models without a decoder."""
    plain: Any = plain_model(model)
    if not getattr(getattr(plain, "config", None), "is_encoder_decoder", False):
        return {}
    if hasattr(plain, "prepare_decoder_input_ids_from_labels"):
        return {"decoder_input_ids": plain.prepare_decoder_input_ids_from_labels(labels=labels)}
    return {"labels": labels}  # such models shift only labels that they are given
