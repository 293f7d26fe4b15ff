"""`HubMixin`: what a Trainer shows of its model: the card, made from what was measured, and pushes to the Hub.

evaluation_loop          each evaluation is remembered with the digest of the weights that it measured
_push_from_checkpoint    during training: a copy of the checkpoint, its record, card and push, in the background
create_model_card        the model is saved; those evaluations that are of its weights go into record and card
push_to_hub              the same, and one commit of all of it
"""

import inspect
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub import CommitInfo, HfApi
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from ..engines.choose import is_shared_model, weights_digest
from ..masking.pruner import Pruner
from ..model.anatomy import has_adapters
from ..publish.card import write_card
from ..publish.hub_errors import explain_error
from ..publish.push import push_model
from ..publish.record import Latency, RunRecord, SavedFile, load_record, save_record, saved_files
from ..saved.files import weight_files
from ..saved.pruning_state import state_files
from .recording import CardInput, MeasuredEvaluation, measure_trainer, record_of

logger = logging.getLogger(__name__)


_VAR_KEYWORD = inspect.Parameter.VAR_KEYWORD


if TYPE_CHECKING:

    class _Base(Trainer):
        """What this is mixed into: a Trainer with a pruner."""

        _unfinished: Path | None  # the folder of a checkpoint that is being written

        @property
        def pruner(self) -> Pruner | None: ...

else:
    _Base = object


class HubMixin(_Base):
    """Makes the card of a Trainer's pruned model from what was measured, and pushes both in one commit.

    The class that it is mixed into has a property `pruner`; where that is None, all is as in the extended class.

    Attributes:
        failed_pushes: what went wrong with pushes during training (`hub_strategy`), a line each.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self.failed_pushes: list[str] = []
        self._pushes: list[tuple[str, Future]] = []  # those of this training: when each was begun, and its job
        self._hub = HfApi()  # its pushes in the background go one after another
        self._evaluated: list[MeasuredEvaluation] = []
        self._said: dict[str, Any] = {}  # what a person said of the model for the last card
        self._loaded_best = False  # whether the model is that of the best checkpoint, not of the last step
        super().__init__(*args, **kwargs)

    @property
    def _repo_id(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name

    @property
    def _makes_card(self) -> bool:
        """Whether card and push are ours: not without pruning, nor for adapters, whose zeros are elsewhere."""
        return self.pruner is not None and not has_adapters(self.accelerator.unwrap_model(self.model))

    def _never_save_token(self) -> None:
        """Keep the token out of `training_args.bin`, which the Trainer saves, and pushes in training."""
        if self.args.hub_token is not None:
            self.args.hub_token = UnsavedToken(self.args.hub_token)

    # ---- What was measured, and of which weights ----

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as the extended class does, and remember what was measured of which weights, for the card."""
        output = super().evaluation_loop(*args, **kwargs)
        if not self._makes_card or not output.metrics:
            return output
        digest = self._digest()
        if self.is_world_process_zero():
            bound = inspect.signature(super().evaluation_loop).bind(*args, **kwargs).arguments
            of_its_own = getattr(self, "evaluator", None) is not None  # it reads other data than the loader's
            self._evaluated.append(
                MeasuredEvaluation(
                    digest=digest,
                    prefix=bound.get("metric_key_prefix", "eval"),
                    values=dict(output.metrics),
                    samples=None if of_its_own else output.num_samples,
                    dataset=None if of_its_own else getattr(bound["dataloader"], "dataset", None),
                )
            )
        return output

    def _digest(self) -> str:
        """The digest of the model's weights as they are, on the first process; every process must ask for it."""
        model = self.accelerator.unwrap_model(self.model)
        if not self.is_world_process_zero() and not is_shared_model(model):
            return ""
        return weights_digest(model)

    def _load_best_model(self, *args: Any, **kwargs: Any) -> None:
        super()._load_best_model(*args, **kwargs)
        self._loaded_best = True

    # ---- The card ----

    def create_model_card(self, *args: Any, dense_metrics: Mapping[str, float] | None = None, **kwargs: Any) -> None:
        """Save the model into `output_dir`, and write its card beside it.

        README.md says what was counted in the saved files and measured by this trainer, and nothing else; beside it lie
        `sparsity.json`, `run_record.json` and `assets/`. What a person wrote into README.md is kept.

        While a checkpoint is written, nothing is done: some classes ask for a card then, and a checkpoint that is
        pushed has one of its own.

        Args:
            *args: those of the extended class.
            **kwargs: those of the extended class, and those of `Trainer.create_model_card`.
            dense_metrics: what `evaluate` returned for the dense model on the same data, to be compared with. Without
                it, the card says that the dense baseline was not measured.

        Raises: ValueError for dense metrics that are not among those of any evaluation.
        """
        if not self._makes_card:
            super().create_model_card(*args, **kwargs)
            return
        if self._unfinished is not None:
            return
        said = _said(inspect.signature(super().create_model_card), args, kwargs)
        said["dataset"] = said.pop("dataset_name", None) or said.get("dataset")
        said["dense_metrics"] = dense_metrics
        said = self._said | {name: value for name, value in said.items() if value is not None}
        folder = Path(str(self.args.output_dir))
        earlier = load_record(folder) if self.state.global_step == 0 else None
        self.save_model(_internal_call=True)
        digest = self._digest()
        if not self.is_world_process_zero():
            return
        record = self._make_record(said, digest, saved_files(weight_files(folder)), measure_trainer(self))
        self._said = said  # it holds for later cards, too
        base = record.base_model
        if base is not None and base.license is None and not record.chosen.get("license"):
            logger.warning(
                "The card says nothing of a license, for that of %s is not known: its card names none, or cannot be "
                "read. Give one, license=..., or write it into the card.",
                base.name,
            )
        if earlier is not None and earlier.weights == record.weights:
            # The model of an earlier run, as it was: what that run was is still so.
            record = earlier.model_copy(update={"evaluations": record.evaluations or earlier.evaluations})
        save_record(folder, record)
        write_card(folder)

    def _make_record(
        self,
        said: Mapping[str, Any],
        digest: str,
        weights: dict[str, SavedFile] | None = None,
        latency: Latency | None = None,
    ) -> RunRecord:
        """The record of this trainer's run, for the model as it is now, whose weights have this digest.

        `said` is what a person said of the model (the fields of `CardInput`), `weights` the files that it was saved in.
        """
        assert self.pruner is not None  # or the card would not be ours
        kept_step = self.state.best_global_step if self._loaded_best else self.state.global_step
        return record_of(
            self,
            weights or {},
            configs=self.pruner.configs,
            target_sparsity=self.pruner.target_sparsity,
            kept_step=int(kept_step or 0),
            evaluated=[evaluated for evaluated in self._evaluated if evaluated.digest == digest],
            latency=latency,
            given=CardInput(**{"model_name": self._repo_id.rsplit("/", 1)[-1], **said}),
        )

    # ---- The push, when it is asked for ----

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        create_pr: bool = False,
        with_masks: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Save the model, make its card, push both in one commit, and check what the Hub then holds.

        Args:
            commit_message: as in the extended class, and so are `blocking`, `token`, `revision` and `private`.
            **kwargs: those of `create_model_card`.
            create_pr: whether the commit is a pull request.
            with_masks: whether masks and the pruning state go with it, to resume training from there.

        Returns: the commit, or its future if not `blocking`; None in processes other than the first.

        Raises: PushError, saying what is and is not on the Hub; and what `hf_prune.publish.push.push_model` raises.
        """
        if not self._makes_card:
            return super().push_to_hub(commit_message, blocking, token, revision, private=private, **kwargs)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.create_model_card(**kwargs)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()

        def push() -> CommitInfo:
            return push_model(
                str(self.args.output_dir),
                self._repo_id,
                private=private if private is not None else self.args.hub_private_repo,
                revision=revision if revision is not None else self.args.hub_revision,
                create_pr=create_pr,
                with_masks=with_masks,
                message=commit_message or "End of training",
                token=token if token is not None else self.args.hub_token,
            ).commit

        return push() if blocking else self._hub.run_as_future(push)

    # ---- Pushes during training: in the background, of a copy that no later step changes ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the extended class does; `failed_pushes` is then what went wrong with pushes of this training."""
        self._loaded_best = False
        self.failed_pushes = []
        return super().train(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        output = super()._finalize_training(*args, **kwargs)
        self._report_pushes()
        return output

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Begin the push of a complete checkpoint, if `hub_strategy` wants one now; every process must call it."""
        if self.pruner is None:
            super()._push_from_checkpoint(checkpoint_folder)
            return
        if self.args.hub_strategy == HubStrategy.END:
            return
        digest = self._digest() if self._makes_card else ""
        if not self.is_world_process_zero():
            return
        in_progress: Any = self.push_in_progress
        if in_progress is not None and not in_progress.is_done() and not self.args.hub_always_push:
            return
        if self._makes_card:
            self._push_with_card(Path(checkpoint_folder), digest)
        else:
            self._push_without_card(Path(checkpoint_folder))

    def _push_without_card(self, folder: Path) -> None:
        """Begin the pushes that the extended class makes of a checkpoint, with the masks in them."""
        if self.push_in_progress is not None:  # it reads the files that are copied over now
            self.push_in_progress.wait_until_done()
        for path in state_files(folder):  # the Trainer copies only the model's own files
            shutil.copy(path, Path(str(self.args.output_dir), path.name))
        super()._push_from_checkpoint(str(folder))
        known = [job for _, job in self._pushes]
        when = f"step {self.state.global_step}"
        self._pushes += [(when, job) for job in cast(Any, self.push_in_progress).jobs if job not in known]

    def _push_with_card(self, folder: Path, digest: str) -> None:
        """Begin a push of a checkpoint's model and card in one commit, and of the checkpoint where that is wanted."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        copy = Path(tempfile.mkdtemp(prefix="_push_", dir=str(self.args.output_dir)))
        shutil.copytree(folder, copy, copy_function=link_or_copy, dirs_exist_ok=True)
        places = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: folder.name}
        place = places.get(HubStrategy(self.args.hub_strategy))
        files = [path for path in copy.rglob("*") if path.is_file()] if place is not None else []
        also = {f"{place}/{path.relative_to(copy).as_posix()}": path for path in files}
        said = {name: value for name, value in self._said.items() if name != "dense_metrics"}  # of the end of training
        record = self._make_record(said, digest)
        when = f"step {self.state.global_step}"
        job = self._hub.run_as_future(self._push_copy, copy, record, also, f"Training in progress, {when}")
        self._pushes.append((when, job))
        self.push_in_progress: Any = PushInProgress(cast(Any, [job]))

    def _push_copy(self, copy: Path, record: RunRecord, also: Mapping[str, Path], message: str) -> CommitInfo:
        """Push the copy of a checkpoint, with the record of its run and more files, and remove it."""
        try:
            save_record(copy, record.model_copy(update={"weights": saved_files(weight_files(copy))}))
            return push_model(
                copy,
                self._repo_id,
                revision=self.args.hub_revision,
                with_masks=True,
                also=also,
                message=message,
                token=self.args.hub_token,
            ).commit
        finally:
            shutil.rmtree(copy, ignore_errors=True)

    def _report_pushes(self) -> None:
        """Wait for the pushes that were begun, and tell those that failed."""
        errors = [(when, job.exception()) for when, job in self._pushes]
        self.failed_pushes = [
            f"{when}: {explain_error(error, self.args.hub_token)}" for when, error in errors if error is not None
        ]
        if self.failed_pushes:
            logger.error(
                "Of %d pushes to the Hub during training %d failed; push the model with trainer.push_to_hub().\n%s",
                len(errors),
                len(self.failed_pushes),
                "\n".join(self.failed_pushes),
            )
        self._pushes = []


def _said(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a person says of a model in the arguments of a class's `create_model_card`, or by the names of `CardInput`.

    What such a class takes without a name of its own (`**kwargs`) says nothing. Raises TypeError for other arguments.
    """
    known = {field.name for field in fields(CardInput)} - signature.parameters.keys()
    said = {name: value for name, value in kwargs.items() if name in known}
    bound = signature.bind(*args, **{name: value for name, value in kwargs.items() if name not in known}).arguments
    named = {name: value for name, value in bound.items() if signature.parameters[name].kind is not _VAR_KEYWORD}
    return said | named


class UnsavedToken(str):
    """A token that is None once it was pickled: the Trainer saves its arguments, and pushes them in training."""

    def __reduce__(self) -> tuple[type, tuple]:
        return type(None), ()

    def __copy__(self) -> "UnsavedToken":
        return self

    def __deepcopy__(self, memo: dict) -> "UnsavedToken":
        return self


def link_or_copy(source: str, target: str) -> None:
    """A hard link to a file, which costs nothing, or a copy where there can be none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)
