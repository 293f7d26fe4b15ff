"""Undocumented names of transformers: the Trainer's methods that are overridden or called, and a few others."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .entry import Foreign, attribute, check_method, find, find_in, incompatible

_NO_EVENT = "when a callback event of the Trainer can do the same"
_DOCUMENTED = "never: it is documented, and only its signature is checked"


def _of_trainer(*rows: tuple[str, str, str, str]) -> dict[str, Foreign]:
    return {name: Foreign(f"transformers.trainer:Trainer.{name}", why, until, call) for name, call, why, until in rows}


# Methods of the Trainer that the mixins override.
OVERRIDDEN = _of_trainer(
    ("train", "resume_from_checkpoint, trial, ...", "find the checkpoint to resume from", _DOCUMENTED),
    ("training_step", "...", "mask gradients before they are clipped", _DOCUMENTED),
    ("log", "logs, ...", "log the sparsity", _DOCUMENTED),
    ("save_model", "output_dir, _internal_call", "save masks beside the weights", _DOCUMENTED),
    (
        "compute_loss",
        "model, inputs, num_items_in_batch=, return_outputs=",
        "add the distillation losses",
        _DOCUMENTED,
    ),
    ("evaluation_loop", "...", "know which weights an evaluation measured", _DOCUMENTED),
    ("create_model_card", "...", "write a card with the counted sparsity", _DOCUMENTED),
    (
        "push_to_hub",
        "commit_message, blocking, token, revision, private=",
        "push model and card in one commit",
        _DOCUMENTED,
    ),
    ("_inner_training_loop", "...", "reset the logged loss terms in every attempt", _NO_EVENT),
    ("_run_epoch", "...", "take no further step when a finished training is resumed", _NO_EVENT),
    (
        "_get_output_dir",
        "trial=",
        "write a checkpoint into a temporary folder",
        "when the Trainer itself renames complete checkpoints",
    ),
    (
        "_save_checkpoint",
        "model, trial, ...",
        "rename a checkpoint once it is complete",
        "when the Trainer itself does",
    ),
    ("_save", "output_dir, state_dict", "save the smaller model in place of a sharded one", "when a callback can"),
    (
        "_push_from_checkpoint",
        "checkpoint_folder",
        "push complete checkpoints with their card",
        "when the Trainer pushes complete checkpoints and reports failed pushes",
    ),
    (
        "_finalize_training",
        "trial, ...",
        "report failed pushes and delete old checkpoints atomically",
        "when the Trainer deletes checkpoints atomically",
    ),
    ("_determine_best_metric", "...", "choose the best model among those at final sparsity", _NO_EVENT),
    ("_load_best_model", "...", "know the step of the loaded model", "when TrainerState has it"),
    (
        "_load_from_checkpoint",
        "resume_from_checkpoint",
        "read FSDP checkpoints without FSDP",
        "when the Trainer reads them itself",
    ),
    (
        "_load_optimizer_and_scheduler",
        "checkpoint",
        "read FSDP checkpoints without FSDP",
        "when the Trainer reads them itself",
    ),
)

# Methods of the Trainer that are called, and not overridden.
CALLED = _of_trainer(
    ("_finish_current_push", "", "wait for the pushes of training", "when pushes are futures"),
    (
        "_get_collator_with_removed_columns",
        "data_collator, description=",
        "measure the latency on the model's inputs",
        "when a data loader of one sample starts no workers",
    ),
    ("_prepare_inputs", "inputs", "move inputs to the model's device", "when it is public"),
)

_NAMES_OF_FILES = "when transformers documents the files of checkpoints"

NAMES: dict[str, Foreign] = {
    "PREFIX_CHECKPOINT_DIR": Foreign(
        "transformers.trainer_utils:PREFIX_CHECKPOINT_DIR", "find checkpoints by name", _NAMES_OF_FILES
    ),
    "TRAINER_STATE_NAME": Foreign(
        "transformers.trainer:TRAINER_STATE_NAME", "write the state into a checkpoint", _NAMES_OF_FILES
    ),
    "SCHEDULER_NAME": Foreign("transformers.trainer:SCHEDULER_NAME", "read the scheduler's state", _NAMES_OF_FILES),
    "sort_checkpoints": Foreign(
        "transformers.trainer_utils:sort_checkpoints", "delete the same old checkpoints as the Trainer", _NAMES_OF_FILES
    ),
    "HubStrategy": Foreign(
        "transformers.trainer_utils:HubStrategy", "know what is pushed during training", "when it is documented"
    ),
    "PushInProgress": Foreign(
        "transformers.utils.hub:PushInProgress", "make the Trainer wait for our pushes", "when pushes are futures"
    ),
    "JITCheckpointCallback": Foreign(
        "transformers.trainer_jit_checkpoint:JITCheckpointCallback",
        "save on SIGTERM at the end of a step",
        "when the Trainer itself saves at the end of the step, on every process",
    ),
    "revert_weight_conversion": Foreign(
        "transformers.core_model_loading:revert_weight_conversion",
        "map the tensors in a file to parameters",
        "when a model can list the names of its saved tensors",
    ),
    "no_init_weights": Foreign(
        "transformers.initialization:no_init_weights",
        "build a model whose weights are copied from another",
        "when a model can be built without drawing its weights",
    ),
    "GradientCheckpointingLayer": Foreign(
        "transformers.modeling_layers:GradientCheckpointingLayer",
        "know which classes are the layers of a model",
        "when models read per_layer_config themselves",
    ),
    "WeightConverter": Foreign(
        "transformers.core_model_loading:WeightConverter",
        "unpack weights when they are loaded",
        "when quantizers can unpack weights without naming them",
    ),
    "ConversionOps": Foreign(
        "transformers.core_model_loading:ConversionOps",
        "unpack weights when they are loaded",
        "when quantizers can unpack weights without naming them",
    ),
    "HfQuantizer": Foreign(
        "transformers.quantizers.base:HfQuantizer",
        "open packed models",
        "when it can be imported from transformers.quantizers while that is imported",
    ),
    "QuantizationConfigMixin": Foreign(
        "transformers.utils.quantization_config:QuantizationConfigMixin",
        "open packed models",
        "when it can be imported from transformers.quantizers while that is imported",
    ),
    "is_deepspeed_zero3_enabled": Foreign(
        "transformers.integrations.deepspeed:is_deepspeed_zero3_enabled",
        "refuse to open packed weights where ZeRO-3 shards them",
        "when it is documented",
    ),
    "get_relative_imports": Foreign(
        "transformers.dynamic_module_utils:get_relative_imports",
        "push the files that a model's own code imports",
        "when a model can list the files of its code",
    ),
    "TASK_MAPPING": Foreign(
        "transformers.modelcard:TASK_MAPPING", "use the Hub's task names in cards", "when huggingface_hub has them"
    ),
    "AUTOGENERATED_TRAINER_COMMENT": Foreign(
        "transformers.modelcard:AUTOGENERATED_TRAINER_COMMENT",
        "distinguish cards that a Trainer wrote from those that a person wrote",
        "when the metadata of such cards says so",
    ),
}


def __getattr__(name: str) -> Any:
    return find_in(NAMES, __name__, name)


# Attributes of instances; see the functions that read them.
ATTRIBUTES: dict[str, Foreign] = {
    "trainer": Foreign(
        "transformers.trainer_jit_checkpoint:JITCheckpointCallback.trainer", "save on SIGTERM", "with the callback"
    ),
    "jit_manager": Foreign(
        "transformers.trainer_jit_checkpoint:JITCheckpointCallback.jit_manager", "save on SIGTERM", "with the callback"
    ),
    "is_checkpoint_requested": Foreign(
        "transformers.trainer_jit_checkpoint:CheckpointManager.is_checkpoint_requested",
        "save on SIGTERM",
        "with the callback",
    ),
}

_DEEPSPEED_CONFIG = Foreign(
    "transformers.integrations.deepspeed:_hf_deepspeed_config_weak_ref",
    "open a whole model where ZeRO-3 will train it",
    "when from_pretrained can be told not to shard a model",
)

_NOT_SAVED = Foreign(
    "transformers:PreTrainedModel._keys_to_ignore_on_save",
    "know which weights a class computes anew, and does not save",
    "when a model can list the names of its saved tensors",
)

_DTYPE_PLAN = Foreign(
    "transformers:PreTrainedModel._get_dtype_plan",
    "load packed weights in the data types that a model class asks for",
    "when a quantizer is told the data type of each weight",
    "dtype",
)

_CONVERSIONS = Foreign(
    "transformers:PreTrainedModel._weight_conversions",
    "save a model that was packed as if it had not been",
    "when quantizers can unpack weights without naming them",
)

_REPORTING = Foreign(
    "transformers.integrations:get_reporting_integration_callbacks",
    "end what a Trainer reports as one run, before the next begins",
    "when the Trainer can end it",
)

_MODEL_MAPPING = Foreign(
    "transformers:AutoModel._model_mapping",
    "find the teacher's class for the same task in another architecture",
    "when transformers can list the tasks of a model class",
)


@contextmanager
def opened_whole() -> Iterator[None]:
    """While it lasts, `from_pretrained` opens whole models: ZeRO-3 shards them once TrainingArguments are made."""
    from transformers.integrations import deepspeed

    kept = find(_DEEPSPEED_CONFIG)
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept


def check_trainer(classes: tuple[type, ...], mixins: tuple[type, ...]) -> None:
    """Check the methods of a Trainer class that is extended: `classes` are the class and its base classes.

    Raises IncompatibleVersionError for a method that is missing, or that `mixins` cannot override or call.
    """
    for name, entry in (OVERRIDDEN | CALLED).items():
        theirs = next((vars(one)[name] for one in classes if name in vars(one)), None)
        overrides = [vars(one)[name] for one in mixins if name in vars(one)]
        for ours in overrides or [None]:
            check_method(entry, theirs, ours)


def jit_parts(callback: Any) -> tuple[Any, Any]:
    """The Trainer of a `JITCheckpointCallback`, and the manager that knows of a SIGTERM (`is_checkpoint_requested`)."""
    trainer, manager = (attribute(callback, ATTRIBUTES[name]) for name in ("trainer", "jit_manager"))
    if manager is not None:
        attribute(manager, ATTRIBUTES["is_checkpoint_requested"])
    return trainer, manager


def evaluation_collator(trainer: Any) -> Callable[..., Any]:
    """The collator of a Trainer's evaluation batches."""
    collate: Callable[..., Any] = trainer._get_collator_with_removed_columns(
        trainer.data_collator, description="Evaluation"
    )
    return collate


def prepare_inputs(trainer: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A batch on the device of a Trainer's model."""
    prepared: dict[str, Any] = trainer._prepare_inputs(inputs)
    return prepared


def reporting_callbacks(trainer: Any) -> list[Any]:
    """The callbacks of a Trainer that report to TensorBoard and the like."""
    classes = tuple(find(_REPORTING)(trainer.args.report_to))
    return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, classes)]


def finish_current_push(trainer: Any) -> None:
    """Wait for the push of a checkpoint that a Trainer has started."""
    trainer._finish_current_push()


def commit_of(config: Any) -> str | None:
    """The commit on the Hub that a configuration came from, where transformers keeps it: newer versions do not."""
    commit: str | None = getattr(config, "_commit_hash", None)
    return commit


def keep_origin(config: Any, origin: Any) -> None:
    """Give a configuration the model name of another one, and the commit, where transformers keeps it."""
    config.name_or_path = origin.name_or_path or ""
    config._commit_hash = commit_of(origin)


def names_not_saved(model: Any) -> set[str]:
    """The names of parameters and buffers that `save_pretrained` leaves out, as the class computes them anew."""
    return set(attribute(model, _NOT_SAVED) or ())


def dtypes_kept(model: Any, dtype: Any) -> list[tuple[re.Pattern[str], Any]]:
    """Which parameters keep another data type when a model is loaded in this one: by name, and what they keep."""
    check_method(_DTYPE_PLAN, type(model)._get_dtype_plan)
    plan: dict[str, Any] = model._get_dtype_plan(dtype)
    return [(re.compile(name.replace("*", ".*")), kept) for name, kept in plan.items()]


def loaded_conversions(model: Any) -> list[Any]:
    """The conversions that the weights of a model went through when it was loaded."""
    return list(attribute(model, _CONVERSIONS))


def keep_conversions(model: Any, conversions: list[Any]) -> None:
    """Set the conversions that `save_pretrained` reverts."""
    model._weight_conversions = conversions


_IMPLEMENTATIONS = ("_attn_implementation", "_experts_implementation")


def keep_implementations(config: Any, origin: Any) -> None:
    """Give a configuration the implementations of attention and experts of another one: config.json has none."""
    for name, value in implementations_of(origin).items():
        setattr(config, name, value)


def implementations_of(config: Any) -> dict[str, Any]:
    """The implementations of attention and experts that a configuration has: how fast a model is depends on them."""
    return {name: getattr(config, name) for name in _IMPLEMENTATIONS if hasattr(config, name)}


def experts_implementation(config: Any) -> str | None:
    """How a model of this configuration computes fused experts; None if it has no say in it."""
    name: str | None = getattr(config, "_experts_implementation", None)
    return name


def set_experts_implementation(config: Any, name: str | None) -> None:
    """Set how a model of this configuration computes fused experts, and leave the configurations within it."""
    config._experts_implementation = {"": name}


def computes_experts_together(config: Any) -> bool:
    """Whether a model of this configuration computes its experts in one grouped matrix product."""
    return getattr(config, "_experts_implementation", None) == "grouped_mm"


def task_mappings() -> Iterator[Mapping[type, Any]]:
    """For each task, the model classes: configuration class -> model class, or a tuple of classes."""
    if find(_MODEL_MAPPING) is None:
        raise incompatible(_MODEL_MAPPING)
    from transformers.models.auto import modeling_auto

    for name in modeling_auto.__all__:
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", None)
        if mapping is not None:
            yield mapping
