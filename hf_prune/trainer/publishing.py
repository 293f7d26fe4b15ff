"""`PublishingMixin`: a Trainer's model card, made from what was measured, and its push to the Hub.

evaluation_loop          records each evaluation with the digest of the weights that were evaluated
create_model_card        saves the model; the evaluations of these weights go into record and card
push_to_hub              does the same, and pushes all of it in one commit
"""

import inspect
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo

from ..engines.choose import is_shared_model, weights_digest
from ..foreign.transformers import finish_current_push
from ..model.anatomy import has_adapters
from ..publish.card import write_card
from ..publish.push import push_model
from ..publish.record import Latency, RunRecord, load_record, save_record
from ..saved.files import SavedFile
from ..saved.model import SavedModel
from .base import TrainerBase
from .latency import measure_trainer
from .recording import CardInput, MeasuredEvaluation, record_of, said_in

logger = logging.getLogger(__name__)


class PublishingMixin(TrainerBase):
    """Makes the card of a Trainer's pruned model from what was measured, and pushes both in one commit.

    Without a pruner it changes nothing.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self._evaluated: list[MeasuredEvaluation] = []
        self._said: dict[str, Any] = {}  # what was passed to the last create_model_card
        self._saved: SavedModel | None = None  # the model of the last card
        super().__init__(*args, **kwargs)

    @property
    def _repo_id(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name

    @property
    def _makes_card(self) -> bool:
        """Whether this class makes card and push: with pruning, and not for adapters, whose zeros are elsewhere."""
        return self.pruner is not None and not has_adapters(self.accelerator.unwrap_model(self.model))

    # ---- Measurements ----

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as the extended class does, and record the metrics with a digest of the weights, for the card."""
        output = super().evaluation_loop(*args, **kwargs)
        if not self._makes_card or not output.metrics:
            return output
        digest = self._digest()
        if self.is_world_process_zero():
            bound = inspect.signature(super().evaluation_loop).bind(*args, **kwargs).arguments
            of_its_own = getattr(self, "evaluator", None) is not None  # sentence-transformers: it has data of its own
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
        """The digest of the model's current weights, on the first process; every process must call it."""
        model = self.accelerator.unwrap_model(self.model)
        if not self.is_world_process_zero() and not is_shared_model(model):
            return ""
        return weights_digest(model)

    # ---- The card ----

    def create_model_card(self, *args: Any, dense_metrics: Mapping[str, float] | None = None, **kwargs: Any) -> None:
        """Save the model into `output_dir`, and write its card there.

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
        self.save_model(_internal_call=True)
        digest = self._digest()
        if not self.is_world_process_zero():
            return
        self._saved = SavedModel(folder)
        record = self._make_record(said, digest, self._saved.hashes, measure_trainer(self))
        self._said = said  # also for later cards
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
        latency: Latency | None = None,
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
            latency=latency,
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
        include: Collection[str] = (),
        **kwargs: Any,
    ) -> Any:
        """Save the model, make its card, push both in one commit, and check what the Hub then holds.

        Args:
            commit_message: as in the extended class, like `blocking`, `token`, `revision` and `private`.
            **kwargs: arguments of `create_model_card`.
            create_pr: whether to open a pull request with the commit.
            with_masks: whether to push masks and pruning state as well, so that training can be resumed from them.
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
            return push_model(
                saved,
                self._repo_id,
                private=private if private is not None else self.args.hub_private_repo,
                revision=revision if revision is not None else self.args.hub_revision,
                create_pr=create_pr,
                with_masks=with_masks,
                message=commit_message or "End of training",
                token=token if token is not None else self.args.hub_token,
                include=include,
            ).commit

        return push() if blocking else self._hub.run_as_future(push)
