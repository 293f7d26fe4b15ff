"""The schema of a recipe: its sections, their fields and defaults."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, PrivateAttr
from transformers import Seq2SeqTrainingArguments, TrainingArguments

from ..config.calibration import CalibrationConfig
from ..config.checks import is_number
from ..config.distillation import DistillationConfig
from ..config.pruning import PruningConfig
from ..engines.launched import check_launch, check_processes, deepspeed_precision, launched_processes
from ..errors import RecipeError, one_line
from .names import resolve_name

# Tasks whose Trainer takes more arguments, and which of those differ from their defaults.
_ARGUMENTS: dict[str, type[TrainingArguments]] = {"summarization": Seq2SeqTrainingArguments}

_DEFAULTS: dict[str, dict[str, Any]] = {"summarization": {"predict_with_generate": True}}

COMMAND_LINE = "command line"  # the place of keys that are given there


@dataclass(frozen=True)
class Places:
    """The places of a recipe's keys: its file, and their lines in it, or None for keys of the command line."""

    path: str
    lines: dict[tuple, int | None]

    def error(self, problems: Iterable[tuple[tuple, str]]) -> RecipeError:
        """The error for problems with keys, each with the place of its key."""
        found = list(problems)
        named = [(".".join(map(str, key)), message) for key, message in found]
        return RecipeError(problems=named, at=[self._place(key) for key, _ in found])

    def _place(self, key: tuple) -> str:
        for length in range(len(key), 0, -1):
            if key[:length] in self.lines:
                line = self.lines[key[:length]]
                return f"{self.path}:{line}" if line is not None else COMMAND_LINE
        return self.path


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ModelSection(_Section):
    """Which model to start from.

    `name` is a name on the Hub, a folder, or `package:NAME/PATH` for a folder inside an installed Python package;
    `gguf_file` is a file there to read weights and tokenizer from. Without a name, a new model is made from `config`,
    the fields of a model configuration with its `model_type`, and the tokenizer that `tokenizer` names in the same way.
    `freeze` lists regular expressions that match the whole names of parameters that are not trained. `base_model` is
    the name on the Hub of a model in a folder or package, for the card. With `vocabulary: data`, tokens that no text of
    the training split has are removed before the pruned run, from the model, its tokenizer and the teacher.
    """

    name: str | None = None
    gguf_file: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None
    base_model: str | None = None
    freeze: list[str] = []
    vocabulary: Literal["data"] | None = None


class DatasetSection(_Section):
    """Which data to train and evaluate on.

    `name` is a name on the Hub, a folder or file (CSV, JSON, Parquet, or `save_to_disk`), or `package:NAME/PATH`;
    `config` is the configuration of a data set on the Hub. `where` keeps the rows whose columns have the given values.
    Validation and test data are splits of the data set (`validation_split`, `test_split`), or are cut from the training
    split (`validation_size`, `test_size` rows, after it is shuffled with `split_seed`; repeated texts are dropped
    first, so that the splits are disjoint). `max_length` is in tokens: longer texts are truncated; for
    `text-generation` it is the length of the blocks that texts are packed into. Labels are for `text-classification`,
    whose metrics are also computed for each value of the column `group_by`; summaries and `max_summary_length` are for
    `summarization`.
    """

    name: str
    config: str | None = None
    where: dict[str, str | int] = {}
    text_column: str = "text"
    label_column: str = "label"
    summary_column: str | None = None
    group_by: str | None = None
    train_split: str = "train"
    validation_split: str | None = None
    test_split: str | None = None
    validation_size: PositiveInt | None = None
    test_size: PositiveInt | None = None
    split_seed: NonNegativeInt = 0
    max_train_samples: PositiveInt | None = None
    max_length: PositiveInt = 128
    max_summary_length: PositiveInt = 64


class GenerationSection(_Section):
    """The texts that the dense and the pruned model generate for the card, and the options of generation.

    `prompts` are your own texts; `samples` is the number of texts of the test split to summarise. The other fields are
    those of `transformers.GenerationConfig`: they are saved with the model, and used in evaluations of `summarization`.
    """

    prompts: list[str] = []
    samples: NonNegativeInt = 3
    max_new_tokens: PositiveInt = 48
    num_beams: PositiveInt = 1
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    @property
    def options(self) -> dict[str, Any]:
        """The fields of a `GenerationConfig`."""
        options = self.model_dump(exclude={"prompts", "samples"})
        return options if self.do_sample else {**options, "temperature": None, "top_p": None}


class ExplainSection(_Section):
    """How the pruned model is explained beside the dense one, see `hf-prune explain`: on the test split.

    `slices` are columns whose values are compared, `expressions` names of regular expressions that texts of a slice
    have somewhere. `show_texts` allows texts of the data in the files that are written. At most `samples` of the test
    split are used, drawn with `seed`, and `training_samples` of the training split for the gap between both.
    `resamples` is how many times the bootstrap draws, `batch_size` how many samples pass through a model together.
    Without `perturbations`, a classifier is not asked about changed texts, which saves most of the time. Without
    `costs`, neither time nor energy is measured.
    """

    samples: PositiveInt | None = None
    slices: list[str] = []
    expressions: dict[str, str] = {}
    show_texts: bool = False
    training_samples: NonNegativeInt = 1000
    batch_size: PositiveInt = 32
    resamples: Annotated[int, Field(ge=100)] = 1000
    seed: NonNegativeInt = 0
    perturbations: bool = True
    costs: bool = True


class Recipe(_Section):
    """A whole run: fine-tune dense, then prune from there.

    `training` holds the `TrainingArguments` of both runs; `dense` those that differ in the dense run, or null to prune
    from the start without a dense baseline. `pruning` is one `PruningConfig` or a list. `distillation`, if present,
    holds the fields of a `DistillationConfig`, and in `teacher` the model to distil from, named like `model.name`; the
    default is the model of the dense run. The first of `metrics` is the main one, which recovery is computed from.

    `calibration`, if present, holds the fields of a `CalibrationConfig`: the model is then pruned at once, from samples
    of the training split, and trained on with its zeros kept, unless `training` has `max_steps: 0` or
    `num_train_epochs: 0`. Without a dense run, the default teacher is then the model before it was pruned. With
    `target_quality` there, the highest sparsity up to that of `pruning` is searched at which the pruned model keeps
    that share of the main metric on the validation split.

    With `explain`, the pruned model is explained at the end, which may be `{}`.
    """

    task: Literal["text-classification", "text-generation", "summarization"]
    output_dir: str
    model: ModelSection
    dataset: DatasetSection
    generation: GenerationSection = GenerationSection()
    metrics: list[str] = Field(min_length=1)
    training: dict[str, Any]
    dense: dict[str, Any] | None = {}
    pruning: dict[str, Any] | Annotated[list[dict[str, Any]], Field(min_length=1)]
    calibration: dict[str, Any] | None = None
    distillation: dict[str, Any] | None = None
    explain: ExplainSection | None = None
    _places: Places | None = PrivateAttr(default=None)

    def place(self, error: RecipeError) -> RecipeError:
        """The same error, each problem with the line of its key in the file."""
        if self._places is None:
            return error
        return self._places.error((as_key(key), message) for key, message in error.problems)

    @property
    def pruning_configs(self) -> list[PruningConfig]:
        """The pruning configurations as objects."""
        sections = self.pruning if isinstance(self.pruning, list) else [self.pruning]
        return [PruningConfig.from_dict(section) for section in sections]

    @property
    def calibration_config(self) -> CalibrationConfig | None:
        """The calibration configuration as an object; None for a recipe that prunes while it trains."""
        if self.calibration is None:
            return None
        return CalibrationConfig.from_dict(
            {name: value for name, value in self.calibration.items() if name != "target_quality"}
        )

    @property
    def target_quality(self) -> float | None:
        """The share of the main metric that pruning at once is to keep; None for the sparsity of `pruning`."""
        return (self.calibration or {}).get("target_quality")

    @property
    def training_configs(self) -> list[PruningConfig]:
        """The configurations of the pruned run: where the model is pruned at once, its zeros and values are kept."""
        configs = self.pruning_configs
        if self.calibration is None:
            return configs
        return [
            PruningConfig(method="keep", targets=one.targets, exclude=one.exclude, shared_values=one.shared_values)
            for one in configs
        ]

    @property
    def trains_on(self) -> bool:
        """Whether the pruned run trains."""
        return not trains_not(self.training)

    @property
    def distillation_config(self) -> DistillationConfig | None:
        """The distillation configuration as an object, or None."""
        if self.distillation is None:
            return None
        return DistillationConfig.from_dict(
            {name: value for name, value in self.distillation.items() if name != "teacher"}
        )

    @property
    def teacher(self) -> str | None:
        """The name on the Hub or the path of the teacher; None for the model of the dense run."""
        name = (self.distillation or {}).get("teacher")
        return resolve_name("distillation.teacher", name) if name is not None else None

    def training_arguments(self, dense: bool = False, **changes: Any) -> TrainingArguments:
        """The arguments of the pruned run, or of the dense run, whose checkpoints and logs go into `dense/`.

        If several processes were launched, each sample has the weight that it would have in one process that trains on
        all their batches, unless the recipe says otherwise. Raises LaunchError if the processes do not train together
        as requested.
        """
        check_launch()
        own = {"output_dir": str(Path(self.output_dir, "dense"))} | (self.dense or {}) if dense else {}
        if dense:
            own |= {"push_to_hub": False, "hub_token": None}  # one repository holds one model, the pruned one
        first: dict[str, Any] = {"output_dir": self.output_dir}
        if launched_processes() > 1:
            # With True, the Trainer multiplies the loss by the number of processes, as if the model had divided it by
            # the items of all of them; models that classify sequences take that number and ignore it.
            first["average_tokens_across_devices"] = False
        first |= _DEFAULTS.get(self.task, {})
        precision = deepspeed_precision()
        if precision is not None and not {"bf16", "fp16"} & {*self.training, *own}:
            first[precision] = True
        values = first | self.training | own | changes
        if dense and trains_not(self.training) and "max_steps" not in own:
            values["max_steps"] = -1  # the dense run has epochs of its own
        if (launched_processes() > 1 or values.get("bf16")) and not torch.accelerator.is_available():
            values["use_cpu"] = True  # or processes would train each alone, and bf16 would be refused
        args = arguments_of(self.task)(**values)
        check_processes(args)
        return args

    def argument_error(self, dense: bool, error: Exception) -> RecipeError:
        """The error for what TrainingArguments or a Trainer refused; the argument is found in the text of `error`."""
        section = "dense" if dense else "training"
        message = one_line(error)
        values = self.training | (self.dense or {} if dense else {})
        named = [name for name in values if name in message]
        name = max(named, key=len) if named else None
        if dense and name not in (self.dense or {}):
            section = "training"
        return RecipeError(f"{section}.{name}" if name else section, message)


def trains_not(arguments: Mapping[str, Any]) -> bool:
    """Whether training arguments say that nothing is trained: `max_steps: 0`, or no epochs and no steps."""
    steps, epochs = arguments.get("max_steps", -1), arguments.get("num_train_epochs")
    return steps == 0 or (epochs == 0 and not (is_number(steps) and steps > 0))


def as_key(name: str) -> tuple:
    """A dotted name as a path of keys and list positions."""
    return tuple(int(part) if part.isdecimal() and len(part) < 10 else part for part in name.split("."))


def arguments_of(task: Any) -> type[TrainingArguments]:
    """The class of a task's training arguments."""
    return _ARGUMENTS.get(task, TrainingArguments) if isinstance(task, str) else TrainingArguments
