"""`PublishingMixin`: a Trainer's model card, made from what was measured, and its push to the Hub.

create_model_card        saves the model if that was not done; the evaluations of these weights go into record and card
push_to_hub              does the same, and pushes all of it in one commit
"""

import inspect
import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo

from ..engines.choose import is_shared_model
from ..engines.processes import all_reduce
from ..foreign.transformers import finish_current_push
from ..publish.card import keep_generation_config, write_card
from ..publish.packing import packed_beside
from ..publish.push import push_model
from ..publish.record import Cost, RunRecord, load_record, save_record
from ..saved.files import SavedFile
from ..saved.model import SavedModel
from .base import TrainerBase
from .latency import measure_trainer
from .recording import CardInput, record_of, said_in

logger = logging.getLogger(__name__)


class PublishingMixin(TrainerBase):
    """Makes the card of a Trainer's pruned model from what was measured, and pushes both in one commit.

    Without a pruner it changes nothing.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self._said: dict[str, Any] = {}  # what was passed to the last create_model_card
        self._last_saved: tuple[tuple, SavedModel] | None = None  # the model that was last saved in `output_dir`
        self._saved: SavedModel | None = None  # the model of the last card
        super().__init__(*args, **kwargs)

    @property
    def _repo_id(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name

    # ---- The saved model ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as the extended class does; in `output_dir` of the arguments, remember which one it is."""
        super().save_model(output_dir, _internal_call)
        own = Path(str(self.args.output_dir)).resolve()
        if self._makes_card and self._unfinished is None and Path(output_dir or own).resolve() == own:
            digest = self._digest()
            if self.is_world_process_zero():
                self._last_saved = (self._identity(digest), SavedModel(own))

    def _identity(self, digest: str) -> tuple:
        """What tells whether a model is saved: where, its weights, the step of its masks, and its configuration."""
        config: Any = getattr(self.accelerator.unwrap_model(self.model), "config", None)
        written = config.to_json_string() if hasattr(config, "to_json_string") else None
        return Path(str(self.args.output_dir)).resolve(), digest, self.state.global_step, written

    def _save_if_changed(self, digest: str) -> None:
        """Save the model, with this digest, in `output_dir`, unless it is what was last saved there."""
        known = self._last_saved
        changed = known is None or known[0] != self._identity(digest) or not known[1].has_its_weights
        shared = is_shared_model(self.accelerator.unwrap_model(self.model))
        if shared or self.is_fsdp_enabled or self.is_deepspeed_enabled:  # all processes save, or none
            changed = bool(all_reduce(torch.tensor(int(changed and self.is_world_process_zero()))))
        if changed:
            with keep_generation_config(str(self.args.output_dir)) if self.args.should_save else nullcontext():
                self.save_model(_internal_call=True)

    # ---- The card ----

    def create_model_card(self, *args: Any, dense_metrics: Mapping[str, float] | None = None, **kwargs: Any) -> None:
        """Write the card of the model in `output_dir`; the model is saved there first if that is not done yet.

        README.md has only what was counted in the saved files or measured by this trainer; beside it are
        `sparsity.json`, `run_record.json` and `assets/`. Your own additions to README.md are kept.

        While a checkpoint is being written, this does nothing: some classes make a card then, and a checkpoint that is
        pushed gets its own.

        Args:
            *args: arguments of the extended class.
            **kwargs: arguments of the extended class and of `Trainer.create_model_card`.
            dense_metrics: what `evaluate` returned for the dense model on the same data, for comparison. Without it,
                the card says that the dense baseline was not measured.

        Raises: ValueError if `dense_metrics` has no metric of any evaluation.
        """
        if not self._makes_card:
            super().create_model_card(*args, **kwargs)
            return
        if self._unfinished is not None:
            return
        said = said_in(inspect.signature(super().create_model_card), args, kwargs)
        said["dataset"] = said.pop("dataset_name", None) or said.get("dataset")
        said["dense_metrics"] = dense_metrics
        said = self._said | {name: value for name, value in said.items() if value is not None}
        folder = Path(str(self.args.output_dir))
        earlier = load_record(folder) if self.state.global_step == 0 else None
        if self.pruner is not None:
            self.pruner.hold_zeros()  # before the digest: evaluations of other weights do not count
        digest = self._digest()
        self._save_if_changed(digest)
        if not self.is_world_process_zero():
            return
        self._saved = SavedModel(folder)
        record = self._make_record(said, digest, self._saved.hashes, measure_trainer(self))
        self._said = said  # also for later cards
        if said.get("tasks") and "pipeline_tag" not in record.chosen:
            logger.warning("The card does not name the task %r, which the Hub does not have.", said["tasks"])
        base = record.base_model
        if base is not None and base.license is None and not record.chosen.get("license"):
            logger.warning(
                "The card names no license: that of %s is unknown, because its card names none or cannot be read. Pass "
                "license=..., or write it into the card.",
                base.name,
            )
        if earlier is not None and earlier.weights == record.weights:
            # The unchanged model of an earlier run: its record still holds.
            record = earlier.model_copy(update={"evaluations": record.evaluations or earlier.evaluations})
        save_record(folder, record)
        write_card(self._saved)

    def _make_record(
        self,
        said: Mapping[str, Any],
        digest: str,
        weights: dict[str, SavedFile] | None = None,
        costs: Sequence[Cost] = (),
    ) -> RunRecord:
        """The record of this trainer's run, for the current model, whose weights have this digest.

        `said` has the fields of `CardInput`, `weights` the files that the model was saved in.
        """
        assert self.pruner is not None  # _makes_card is False without one
        kept_step = self.state.best_global_step if self._loaded_best else self.state.global_step
        return record_of(
            self,
            weights or {},
            configs=self.pruner.configs,
            target_sparsity=self.pruner.target_sparsity,
            kept_step=int(kept_step or 0),
            evaluated=[evaluated for evaluated in self._evaluated if evaluated.digest == digest],
            costs=costs,
            given=CardInput(**{"model_name": self._repo_id.rsplit("/", 1)[-1], **said}),
        )

    # ---- The push ----

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
        with_packed: bool = False,
        include: Collection[str] = (),
        **kwargs: Any,
    ) -> Any:
        """Make the card (see `create_model_card`), push it with the model in one commit, and check what the Hub holds.

        Args:
            commit_message: as in the extended class, like `blocking`, `token`, `revision` and `private`.
            **kwargs: arguments of `create_model_card`.
            create_pr: whether to open a pull request with the commit.
            with_masks: whether to push masks and pruning state as well, so that training can be resumed from them.
            with_packed: whether to push the weights packed as well, in the folder `packed`.
            include: names, or patterns such as `*.csv`, of further files in `output_dir` to push.

        Returns: the commit, or its future if not `blocking`; None on processes other than the first.

        Raises: PushError, which says what is and is not on the Hub; and what `hf_prune.publish.push.push_model` raises.
        """
        if not self._makes_card:
            return super().push_to_hub(commit_message, blocking, token, revision, private=private, **kwargs)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.create_model_card(**kwargs)
        if not self.is_world_process_zero():
            return None
        finish_current_push(self)
        saved = self._saved or str(self.args.output_dir)

        def push() -> CommitInfo:
            with packed_beside(saved, with_packed) as also:
                return push_model(
                    saved,
                    self._repo_id,
                    private=private if private is not None else self.args.hub_private_repo,
                    revision=revision if revision is not None else self.args.hub_revision,
                    create_pr=create_pr,
                    with_masks=with_masks,
                    also=also,
                    message=commit_message or "End of training",
                    token=token if token is not None else self.args.hub_token,
                    include=include,
                ).commit

        return push() if blocking else self._hub.run_as_future(push)
