"""The teacher of a distillation: found, checked against the model, and placed as the engine places models."""

import copy
import inspect
import os
from collections.abc import Mapping
from typing import Any, cast

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel


class TeacherError(ValueError):
    """A teacher that a model cannot be distilled from."""


def find_teacher(given: nn.Module | str | os.PathLike, model: nn.Module) -> nn.Module:
    """The frozen teacher, in eval mode: a model as it is given, or one opened with the class of `model`.

    A path or a name on the Hub is opened by `from_pretrained` with the model's class and dtype. Raises TeacherError
    where it is the model itself, or answers with other labels or another vocabulary.
    """
    student = _plain(model)
    if isinstance(given, nn.Module):
        teacher = given
    elif isinstance(student, PreTrainedModel):
        teacher = type(student).from_pretrained(given, dtype=student.dtype)
    else:
        raise TeacherError(
            f"teacher_model: expected a model where the one that is trained is none of transformers, got {given!r}"
        )
    if {id(parameter) for parameter in teacher.parameters()} & {id(parameter) for parameter in model.parameters()}:
        raise TeacherError(
            "teacher_model: expected another model than the one that is trained, got one that shares weights with it; "
            "give its path, or copy.deepcopy(model)"
        )
    _check_answers(student, _plain(teacher))
    return teacher.requires_grad_(False).eval()


def _plain(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _check_answers(student: nn.Module, teacher: nn.Module) -> None:
    """Raise TeacherError where a class of the teacher is not the same class of the model."""
    of_student, of_teacher = (getattr(one, "config", None) for one in (student, teacher))
    if of_student is None or of_teacher is None:
        return
    head = [one.get_output_embeddings() if isinstance(one, PreTrainedModel) else None for one in (student, teacher)]
    if all(one is not None for one in head):
        wanted, came = (cast(Any, one).weight.shape[0] for one in head)
        if wanted != came:
            raise TeacherError(f"teacher_model: expected the model's vocabulary of {wanted} tokens, got {came}")
    elif of_student.num_labels != of_teacher.num_labels:
        raise TeacherError(
            f"teacher_model: expected the model's {of_student.num_labels} labels, got {of_teacher.num_labels}"
        )
    elif of_student.id2label != of_teacher.id2label and not _are_numbered(of_teacher.id2label):
        raise TeacherError(
            f"teacher_model: expected the model's labels {of_student.id2label}, got {of_teacher.id2label}"
        )


def _are_numbered(labels: Mapping[int, str]) -> bool:
    """Whether labels have no names but those that transformers gives."""
    return all(name == f"LABEL_{index}" for index, name in labels.items())


def place_teacher(teacher: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Put a teacher where the engine has models: sharded by FSDP2 and ZeRO-3, else whole on each process's device.

    It is not the accelerator's, so it is in no checkpoint. Every process must call it, once training has begun.
    """
    if accelerator.is_fsdp2:
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        return cast(nn.Module, fsdp2_prepare_model(accelerator, teacher)).eval()
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        return _with_zero_three(teacher, plugin.deepspeed_config)
    return teacher.to(accelerator.device).eval()


def _with_zero_three(teacher: nn.Module, config: Mapping[str, Any]) -> nn.Module:
    """A model whose weights ZeRO-3 keeps in parts and puts together for its forward pass, without an optimizer."""
    import deepspeed

    settings = copy.deepcopy(dict(config))
    for training_only in ("optimizer", "scheduler"):
        settings.pop(training_only, None)
    settings["zero_optimization"].pop("offload_optimizer", None)
    engine, *_ = deepspeed.initialize(model=teacher, config=settings)
    engine.eval()
    return cast(nn.Module, engine)


def accepted_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a model's forward pass takes of inputs by name."""
    parameters = inspect.signature(_plain(model).forward).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(inputs)
    return {name: value for name, value in inputs.items() if name in parameters}


def decoder_inputs(model: nn.Module, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a decoder reads of the labels, shifted right as its model does it; nothing for models without one."""
    plain: Any = _plain(model)
    if not getattr(getattr(plain, "config", None), "is_encoder_decoder", False):
        return {}
    if hasattr(plain, "prepare_decoder_input_ids_from_labels"):
        return {"decoder_input_ids": plain.prepare_decoder_input_ids_from_labels(labels=labels)}
    return {}
