"""The teacher of a distillation: found, checked against the model, and placed as the engine places models."""

import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..errors import TeacherError, one_line
from ..foreign.transformers import task_mappings
from ..model.names import plain_model
from ..model.opening import LOADING_ERRORS


def find_teacher(given: nn.Module | str | os.PathLike, model: nn.Module) -> nn.Module:
    """The frozen teacher, in eval mode: a model as it is given, this very object, or one opened for `model`.

    A path or a name on the Hub is opened by `from_pretrained` in the model's dtype; with the model's class, or that
    which is written there if it is another architecture. Raises TeacherError where it cannot be opened, has not all
    weights, is the model itself, or answers with other labels or another vocabulary.
    """
    teacher = given if isinstance(given, nn.Module) else _open_teacher(given, plain_model(model))
    if {id(parameter) for parameter in teacher.parameters()} & {id(parameter) for parameter in model.parameters()}:
        raise TeacherError(
            "teacher_model",
            "expected another model than the one that is trained, got one that shares weights with it; "
            "give its path, or copy.deepcopy(model)",
        )
    _check_answers(plain_model(model), plain_model(teacher))
    return teacher.requires_grad_(False).eval()


def _open_teacher(given: Any, student: nn.Module) -> nn.Module:
    """The model of a path or of a name on the Hub."""
    if not isinstance(given, (str, os.PathLike)) or not str(given):
        raise TeacherError("teacher_model", f"expected a model, or the path or Hub name of one, got {given!r}")
    if not isinstance(student, PreTrainedModel):
        raise TeacherError(
            "teacher_model", f"expected a model where the one that is trained is none of transformers, got {given!r}"
        )
    if Path(given, "adapter_config.json").exists():
        raise TeacherError(
            "teacher_model",
            f"expected a whole model, got adapters at {str(given)!r}; merge them into it, or give a "
            "model that has them",
        )
    try:
        config = AutoConfig.from_pretrained(given)
        opened, found = _class_for(student, config).from_pretrained(
            given, config=config, dtype=student.dtype, output_loading_info=True
        )
    except LOADING_ERRORS as error:
        raise TeacherError("teacher_model", f"expected a model at {str(given)!r}: {one_line(error)}") from error
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise TeacherError(
            "teacher_model",
            f"expected all weights of a {type(opened).__name__} at {str(given)!r}, found none for "
            f"{some}; give a model that was trained for this task",
        )
    return cast(nn.Module, opened)


def _class_for(student: PreTrainedModel, config: PreTrainedConfig) -> Any:
    """The class that does the student's task in a configuration's architecture; if there is none, the student's."""
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
    """Raise TeacherError where a class of the teacher is not the same class of the model."""
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
            "model with the teacher's id2label and number the data's labels so",
        )


def _are_numbered(labels: Mapping[int, str]) -> bool:
    """Whether labels have no names but those that transformers gives."""
    return all(name == f"LABEL_{index}" for index, name in labels.items())


def takes_input(model: nn.Module, name: str) -> bool:
    """Whether a model's forward pass takes an input of this name."""
    return bool(_taken(model, [name]))


def _taken(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of these inputs that a model's forward pass takes by name."""
    parameters = inspect.signature(plain_model(model).forward).parameters
    takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    return [name for name in names if takes_all or name in parameters]


def teacher_inputs(teacher: nn.Module, inputs: Mapping[str, Any], label_names: Sequence[str]) -> dict[str, Any]:
    """What a teacher is given of a model's inputs: what it takes by name, and no labels where it can do without.

    It is told to keep no cache of keys and values.
    """
    asked = {name: inputs[name] for name in _taken(teacher, inputs) if name not in label_names}
    if "use_cache" in inspect.signature(plain_model(teacher).forward).parameters:
        asked["use_cache"] = False
    if "labels" in inputs and "decoder_input_ids" not in asked:
        asked |= _decoder_inputs(teacher, inputs["labels"])
    return asked


def _decoder_inputs(model: nn.Module, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """What makes a decoder read the labels, shifted right as its model does it; nothing for models without one."""
    plain: Any = plain_model(model)
    if not getattr(getattr(plain, "config", None), "is_encoder_decoder", False):
        return {}
    if hasattr(plain, "prepare_decoder_input_ids_from_labels"):
        return {"decoder_input_ids": plain.prepare_decoder_input_ids_from_labels(labels=labels)}
    return {"labels": labels}  # such models shift those that they are given, and no others
