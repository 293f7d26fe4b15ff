"""What transformers does not document: methods of the Trainer that are overridden or called, and a few other names."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .entry import Foreign, attribute, check_method, find, find_in, incompatible

_NO_EVENT = "when the Trainer has a callback event there that may change what it does"
_DOCUMENTED = "never: it is documented, and checked for its signature"


def _of_trainer(*rows: tuple[str, str, str, str]) -> dict[str, Foreign]:
    return {name: Foreign(f"transformers.trainer:Trainer.{name}", why, until, call) for name, call, why, until in rows}


# Methods of the Trainer that the mixins override.
OVERRIDDEN = _of_trainer(
    ("train", "resume_from_checkpoint, trial, ...", "find the checkpoint to go on from", _DOCUMENTED),
    ("training_step", "...", "mask gradients before they are clipped", _DOCUMENTED),
    ("log", "logs, ...", "have sparsity in every reporter's logs", _DOCUMENTED),
    ("save_model", "output_dir, _internal_call", "save masks beside the weights", _DOCUMENTED),
    (
        "compute_loss",
        "model, inputs, num_items_in_batch=, return_outputs=",
        "add what a teacher says to the loss",
        _DOCUMENTED,
    ),
    ("evaluation_loop", "...", "know which weights an evaluation measured", _DOCUMENTED),
    ("create_model_card", "...", "make the card of what was counted", _DOCUMENTED),
    (
        "push_to_hub",
        "commit_message, blocking, token, revision, private=",
        "push model and card in one commit",
        _DOCUMENTED,
    ),
    ("_inner_training_loop", "...", "add up terms of the loss anew in every attempt", _NO_EVENT),
    ("_run_epoch", "...", "make no step beyond the last one when a finished training is resumed", _NO_EVENT),
    (
        "_get_output_dir",
        "trial=",
        "write a checkpoint in a folder aside",
        "when the Trainer itself gives a checkpoint its name once it is complete",
    ),
    (
        "_save_checkpoint",
        "model, trial, ...",
        "give a checkpoint its name once it is complete",
        "when the Trainer itself does",
    ),
    (
        "_push_from_checkpoint",
        "checkpoint_folder",
        "push a checkpoint that is complete, with its card",
        "when the Trainer pushes complete checkpoints and says which pushes failed",
    ),
    (
        "_finalize_training",
        "trial, ...",
        "report pushes that failed, and remove old checkpoints whole",
        "when the Trainer deletes checkpoints such that none is ever half there",
    ),
    ("_determine_best_metric", "...", "choose the best model among those at final sparsity", _NO_EVENT),
    ("_load_best_model", "...", "know of which step the model is", "when the state says so"),
    (
        "_load_from_checkpoint",
        "resume_from_checkpoint",
        "read checkpoints of FSDP without FSDP",
        "when the Trainer reads them itself",
    ),
    (
        "_load_optimizer_and_scheduler",
        "checkpoint",
        "read checkpoints of FSDP without FSDP",
        "when the Trainer reads them itself",
    ),
)

# Methods of the Trainer that are called, and not overridden.
CALLED = _of_trainer(
    ("_finish_current_push", "", "push after the pushes of training", "when pushes are futures"),
    (
        "_get_collator_with_removed_columns",
        "data_collator, description=",
        "measure the latency on what the model is given",
        "when a data loader of one sample costs no workers",
    ),
    ("_prepare_inputs", "inputs", "put that sample where the model is", "when it is public"),
)

_NAMES_OF_FILES = "when transformers documents how checkpoints are laid out"

NAMES: dict[str, Foreign] = {
    "PREFIX_CHECKPOINT_DIR": Foreign(
        "transformers.trainer_utils:PREFIX_CHECKPOINT_DIR", "find checkpoints by name", _NAMES_OF_FILES
    ),
    "TRAINER_STATE_NAME": Foreign(
        "transformers.trainer:TRAINER_STATE_NAME", "write the state into a checkpoint", _NAMES_OF_FILES
    ),
    "SCHEDULER_NAME": Foreign("transformers.trainer:SCHEDULER_NAME", "read the scheduler's state", _NAMES_OF_FILES),
    "sort_checkpoints": Foreign(
        "transformers.trainer_utils:sort_checkpoints", "remove the checkpoints that the Trainer would", _NAMES_OF_FILES
    ),
    "HubStrategy": Foreign(
        "transformers.trainer_utils:HubStrategy", "know what is pushed in training", "when it is documented"
    ),
    "PushInProgress": Foreign(
        "transformers.utils.hub:PushInProgress", "have the Trainer wait for our pushes", "when pushes are futures"
    ),
    "JITCheckpointCallback": Foreign(
        "transformers.trainer_jit_checkpoint:JITCheckpointCallback",
        "save on SIGTERM when a step is wholly done",
        "when the Trainer itself saves at the end of the step, on every process",
    ),
    "revert_weight_conversion": Foreign(
        "transformers.core_model_loading:revert_weight_conversion",
        "know which parameter a tensor in a file belongs to",
        "when a model tells the names that it is saved under",
    ),
    "TASK_MAPPING": Foreign(
        "transformers.modelcard:TASK_MAPPING", "name tasks in a card as the Hub does", "when huggingface_hub has them"
    ),
    "AUTOGENERATED_TRAINER_COMMENT": Foreign(
        "transformers.modelcard:AUTOGENERATED_TRAINER_COMMENT",
        "tell a card that a Trainer wrote from one that a person wrote",
        "when such cards say so in their metadata",
    ),
}


def __getattr__(name: str) -> Any:
    return find_in(NAMES, __name__, name)


# What objects have; see the functions that read it.
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

_MODEL_MAPPING = Foreign(
    "transformers:AutoModel._model_mapping",
    "find the class of a teacher that does the same task in another architecture",
    "when transformers tells the tasks of a model class",
)


def check_trainer(classes: tuple[type, ...], mixins: tuple[type, ...]) -> None:
    """Check the methods of a Trainer class that is extended: `classes` are it and what it inherits from.

    Raises IncompatibleVersionError for one that is gone, or that does not fit how `mixins` override and call it.
    """
    for name, entry in (OVERRIDDEN | CALLED).items():
        theirs = next((vars(one)[name] for one in classes if name in vars(one)), None)
        overrides = [vars(one)[name] for one in mixins if name in vars(one)]
        for ours in overrides or [None]:
            check_method(entry, theirs, ours)


def jit_parts(callback: Any) -> tuple[Any, Any]:
    """The Trainer of a `JITCheckpointCallback`, and what knows whether it got SIGTERM (`is_checkpoint_requested`)."""
    trainer, manager = (attribute(callback, ATTRIBUTES[name]) for name in ("trainer", "jit_manager"))
    if manager is not None:
        attribute(manager, ATTRIBUTES["is_checkpoint_requested"])
    return trainer, manager


def evaluation_collator(trainer: Any) -> Callable[..., Any]:
    """What a Trainer makes batches with when it evaluates."""
    collate: Callable[..., Any] = trainer._get_collator_with_removed_columns(
        trainer.data_collator, description="Evaluation"
    )
    return collate


def prepare_inputs(trainer: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A batch where a Trainer's model is."""
    prepared: dict[str, Any] = trainer._prepare_inputs(inputs)
    return prepared


def finish_current_push(trainer: Any) -> None:
    """Wait for the push of a checkpoint that a Trainer has begun."""
    trainer._finish_current_push()


def commit_of(config: Any) -> str | None:
    """The commit on the Hub that a configuration is of, where transformers keeps it: newer versions do not."""
    commit: str | None = getattr(config, "_commit_hash", None)
    return commit


def task_mappings() -> Iterator[Mapping[type, Any]]:
    """For each task, the classes that do it: type of the configuration -> class, or a tuple of classes."""
    if find(_MODEL_MAPPING) is None:
        raise incompatible(_MODEL_MAPPING)
    from transformers.models.auto import modeling_auto

    for name in modeling_auto.__all__:
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", None)
        if mapping is not None:
            yield mapping
