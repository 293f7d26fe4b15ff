"""The teacher of a distillation: found, checked against the model, and placed as the engine places models."""

import copy
import inspect
import os
from collections.abc import Mapping
from typing import Any, cast

import torch
import transformers
from accelerate import Accelerator
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel


class TeacherError(ValueError):
    """A teacher that a model cannot be distilled from."""


def find_teacher(given: nn.Module | str | os.PathLike, model: nn.Module) -> nn.Module:
    """The frozen teacher, in eval mode: a model as it is given, this very object, or one opened for `model`.

    A path or a name on the Hub is opened by `from_pretrained` in the model's dtype; with the model's class, or that
    which is written there if it is another architecture. Raises TeacherError where it cannot be opened, has not all
    weights, is the model itself, or answers with other labels or another vocabulary.
    """
    teacher = given if isinstance(given, nn.Module) else _open_teacher(given, plain_model(model))
    if {id(parameter) for parameter in teacher.parameters()} & {id(parameter) for parameter in model.parameters()}:
        raise TeacherError(
            "teacher_model: expected another model than the one that is trained, got one that shares weights with it; "
            "give its path, or copy.deepcopy(model)"
        )
    _check_answers(plain_model(model), plain_model(teacher))
    return teacher.requires_grad_(False).eval()


def _open_teacher(given: Any, student: nn.Module) -> nn.Module:
    """The model of a path or of a name on the Hub."""
    if not isinstance(given, (str, os.PathLike)) or not str(given):
        raise TeacherError(f"teacher_model: expected a model, or the path or Hub name of one, got {given!r}")
    if not isinstance(student, PreTrainedModel):
        raise TeacherError(
            f"teacher_model: expected a model where the one that is trained is none of transformers, got {given!r}"
        )
    try:
        config = AutoConfig.from_pretrained(given)
        opened, found = _class_of(config, student).from_pretrained(
            given, config=config, dtype=student.dtype, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise TeacherError(f"teacher_model: expected a model at {str(given)!r}: {error}") from error
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise TeacherError(
            f"teacher_model: expected all weights of a {type(opened).__name__} at {str(given)!r}, found none for "
            f"{some}; give a model that was trained for this task"
        )
    return cast(nn.Module, opened)


def _class_of(config: PreTrainedConfig, student: PreTrainedModel) -> Any:
    """The class to open a model with: that of the student, or of its own where it is another architecture."""
    own = next(iter(config.architectures or ()), "")
    if config.model_type == student.config.model_type or not hasattr(transformers, own):
        return type(student)
    return getattr(transformers, own)


def plain_model(model: nn.Module) -> nn.Module:
    """The model that adapters were put on, or the model."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _check_answers(student: nn.Module, teacher: nn.Module) -> None:
    """Raise TeacherError where a class of the teacher is not the same class of the model."""
    of_student, of_teacher = (getattr(one, "config", None) for one in (student, teacher))
    if of_student is None or of_teacher is None:
        return
    head = [one.get_output_embeddings() if isinstance(one, PreTrainedModel) else None for one in (student, teacher)]
    if all(one is not None for one in head):
        expected, came = (cast(Any, one).weight.shape[0] for one in head)
        if expected != came:
            raise TeacherError(f"teacher_model: expected the model's vocabulary of {expected} tokens, got {came}")
    elif of_student.num_labels != of_teacher.num_labels:
        raise TeacherError(
            f"teacher_model: expected the model's {of_student.num_labels} labels, got {of_teacher.num_labels}"
        )
    elif of_student.id2label != of_teacher.id2label and not any(
        _are_numbered(config.id2label) for config in (of_student, of_teacher)
    ):
        raise TeacherError(
            f"teacher_model: expected the model's labels {of_student.id2label}, got {of_teacher.id2label}; train the "
            "model with the teacher's id2label and number the data's labels so"
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
    """What a model's forward pass takes of inputs by name; it is told to keep no cache of keys and values."""
    parameters = inspect.signature(plain_model(model).forward).parameters
    without_cache = {"use_cache": False} if "use_cache" in parameters else {}
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return {**inputs, **without_cache}
    return {name: value for name, value in inputs.items() if name in parameters} | without_cache


def decoder_inputs(model: nn.Module, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """What makes a decoder read the labels, shifted right as its model does it; nothing for models without one."""
    plain: Any = plain_model(model)
    if not getattr(getattr(plain, "config", None), "is_encoder_decoder", False):
        return {}
    if hasattr(plain, "prepare_decoder_input_ids_from_labels"):
        return {"decoder_input_ids": plain.prepare_decoder_input_ids_from_labels(labels=labels)}
    return {"labels": labels}  # such models shift those that they are given, and no others
