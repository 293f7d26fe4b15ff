"""A saved model's folder as one object, in which everything is read once."""

import os
import re
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import cast

import transformers
from transformers import PreTrainedModel

from ..config.pruning import CONFIG_NAME, PruningConfig, load_frozen, load_saved_configs, written_expressions
from ..config.safe_json import read_json, read_object
from ..errors import PackedError, ReportError, first_line
from ..methods.patterns import Pattern
from ..model.expressions import refuse_slow
from ..model.names import every_name
from ..model.targets import find_targets
from ..packed.config_text import rounded_embeddings, says_packed
from ..packed.files import PackedReader, is_packed, read_header
from . import files
from .removed import Removed, removed_from
from .skeleton import build_skeleton
from .zeros import (
    IN_FIRST_MODULE,
    LEAST_ZEROS,
    TensorReport,
    count_tensors,
    has_groups,
    prunable_names,
    tensors_with_groups,
    values_in_groups,
)

_TWO_OF_FOUR = Pattern("n:m", 2, 4)


class SavedModel(os.PathLike):
    """A folder with a saved model. Each property is read when it is first accessed, and cached.

    Functions that take a folder also take a SavedModel: they begin with `SavedModel.of`, and read nothing twice.

    The properties describe the files as they were when the object was created: it keeps the sizes and modification
    times of the folder's safetensors and JSON files. If one has changed, `SavedModel.of` makes a new object; if one
    changes while zeros are counted or hashes computed, ReportError is raised. A change that keeps both size and time
    is not noticed. Files that hf-prune derives (record, card, `sparsity.json`) are not watched.

    Raises ReportError if a file that is read is a link to outside the folder.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        files.check_inside(self.folder, files.READ_NAMES)
        self._stamps = self._look()

    @classmethod
    def of(cls, folder: str | os.PathLike) -> "SavedModel":
        """The SavedModel of a folder: the given one, or a new one for a path or if a file has changed."""
        if isinstance(folder, SavedModel) and folder._stamps == folder._look():
            return folder
        return cls(folder)

    def __fspath__(self) -> str:
        return str(self.folder)

    def _look(self) -> dict[str, tuple[int, int]]:
        """Size and modification time, in nanoseconds, of the files that are read."""
        paths = [*self.folder.glob("*.safetensors"), *(self.folder / name for name in files.READ_NAMES)]
        stats = {path.name: path.stat() for path in paths if path.exists()}
        return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}

    @property
    def has_its_weights(self) -> bool:
        """Whether the folder's safetensors are as they were when the object was created."""
        before, now = (
            {name: stamp for name, stamp in stamps.items() if name.endswith(".safetensors")}
            for stamps in (self._stamps, self._look())
        )
        return before == now

    def _check_unchanged(self) -> None:
        now = self._look()
        changed = sorted(name for name in {*now, *self._stamps} if now.get(name) != self._stamps.get(name))
        if changed:
            raise ReportError(
                f"{self.folder}: {changed[0]} was changed while the files were read; try again when nothing writes "
                "to the folder"
            )

    # ---- Weights ----

    @cached_property
    def weight_files(self) -> list[Path]:
        """The weight files. Raises ReportError if there are none, or the index lists a file that is not there."""
        return files.weight_files(self.folder)

    def check_whole(self, is_opened: bool = True) -> None:
        """Raise ReportError unless there are config.json and weight files of the size that their headers tell.

        In place of config.json may be that of adapters, or sentence-transformers' list of modules, not all of which
        have one; and if the model `is_opened` no further, that of pruning: a plain module of PyTorch has no other.
        """
        names = ["config.json", "adapter_config.json", files.MODULES_NAME, *([] if is_opened else [CONFIG_NAME])]
        if not any((self.folder / name).exists() for name in names):
            what_to_do = files.where_model_is(self.folder) or "give a folder that save_pretrained has written"
            raise ReportError(f"{self.folder}: expected a saved model with config.json, found none; {what_to_do}")
        for path in self.weight_files:
            try:
                read_header(path)
            except PackedError as error:
                raise ReportError(f"{first_line(error)}; copy or download the file again, it may be cut off") from error

    @cached_property
    def file_bytes(self) -> int:
        """The total size of the weight files."""
        return sum(file.stat().st_size for file in self.weight_files)

    @cached_property
    def dense_bytes(self) -> int | None:
        """The total size that the weight files have when they are unpacked; None if they are not packed."""
        if not any(is_packed(file) for file in self.weight_files):
            return None
        return sum(
            PackedReader(file).dense_bytes if is_packed(file) else file.stat().st_size for file in self.weight_files
        )

    @property
    def says_packed(self) -> bool:
        """Whether config.json says that the weights are packed."""
        return says_packed(read_object(self.folder / "config.json"))

    @cached_property
    def rounded_embeddings(self) -> str | None:
        """What embeddings were rounded to before they were packed: int8 or int4; None if they were not."""
        return rounded_embeddings(read_object(self.folder / "config.json"))

    @cached_property
    def hashes(self) -> dict[str, files.SavedFile]:
        """Size and SHA-256 of each weight file, by its name. Reads all weight files."""
        found = files.saved_files(self.weight_files)
        self._check_unchanged()
        return found

    @property
    def tensors(self) -> list[TensorReport]:
        """The parameters with their zeros; none if the files do not fit the class (`misfit`). Reads all weight files.

        Raises ReportError for a broken file, and TargetError if a pruning configuration matches no parameter.
        """
        return self._counted[0]

    @cached_property
    def _counted(self) -> tuple[list[TensorReport], str | None]:
        weights = self.weight_files
        prunable = set()
        if self.skeleton is not None:
            in_first_module = (self.folder / files.MODULES_NAME).exists()
            prunable = prunable_names(self.skeleton, self.pruning_configs, in_first_module, self.frozen)
        tensors, misfit = count_tensors(weights, self.skeleton, prunable)
        if misfit is None:
            tensors = self._with_groups(self._without_kept(tensors))
        self._check_unchanged()
        return tensors, misfit

    def _with_groups(self, tensors: list[TensorReport]) -> list[TensorReport]:
        """The tensors with their numbers of values in groups of weights, where configurations say that these have some.

        Those of a sentence-transformers model, whose names are others in its configurations, are left as they are.
        """
        in_first_module = (self.folder / files.MODULES_NAME).exists()
        for config in self.pruning_configs if self.skeleton is not None and not in_first_module else ():
            form = config.sharing
            if form is None:
                continue
            targets = find_targets(cast(PreTrainedModel, self.skeleton), config.targets, config.exclude)
            most: dict[str, int | None] = {target.name: None for target in targets}
            if form.rows is not None:
                most |= values_in_groups(self.weight_files, cast(PreTrainedModel, self.skeleton), targets, form)
            tensors = [
                replace(one, values_in_group=most[one.name], group=form.words) if one.name in most else one
                for one in tensors
            ]
        return tensors

    def _without_kept(self, tensors: list[TensorReport]) -> list[TensorReport]:
        """The tensors; where others are pruned, those without zeros whose zeros a configuration keeps are not prunable.

        Such are embeddings whose weights only share values.
        """
        others = [config for config in self.pruning_configs if config.method != "keep"]
        if self.skeleton is None or not others or len(others) == len(self.pruning_configs):
            return tensors
        in_first_module = (self.folder / files.MODULES_NAME).exists()
        pruned = prunable_names(self.skeleton, others, in_first_module, self.frozen)
        return [
            replace(one, prunable=False)
            if one.prunable and one.name not in pruned and one.sparsity < LEAST_ZEROS
            else one
            for one in tensors
        ]

    @cached_property
    def missed_patterns(self) -> list[str]:
        """The n:m patterns of the configurations that some group of weights in the files does not have."""
        if self.skeleton is None or self.misfit is not None or (self.folder / files.MODULES_NAME).exists():
            return []
        missed = []
        for config in self.pruning_configs:
            pattern = config.parsed_pattern
            if pattern.name == "n:m" and config.method != "keep":
                frozen = self.frozen if config.targets is None else []
                found = find_targets(self.skeleton, config.targets, config.exclude)
                targets = [target for target in found if target.name not in frozen]
                if not has_groups(self.weight_files, self.skeleton, targets, pattern):
                    missed.append(config.pattern)
        return missed

    @cached_property
    def two_of_four(self) -> list[str]:
        """The prunable matrices of linear layers that have the pattern 2:4, which GPUs multiply faster.

        Only tensors of which half of the weights are zero are read. Experts are not looked at.
        """
        half = {one.name for one in self.tensors if one.prunable and 2 * one.zeros >= one.weights > 0}
        if self.skeleton is None or not half:
            return []
        targets = [
            target
            for target in find_targets(self.skeleton, [re.escape(name) for name in sorted(half)])
            if len(target.shape) == 2 and target.matrices[2] % _TWO_OF_FOUR.columns == 0
        ]
        return sorted(tensors_with_groups(self.weight_files, self.skeleton, targets, _TWO_OF_FOUR))

    # ---- What the weights belong to ----

    @cached_property
    def architecture(self) -> str | None:
        """The name of the model class in config.json, if transformers has it."""
        try:
            names = read_json(self.folder / "config.json", finite=False)["architectures"]
        except (OSError, ValueError, LookupError, TypeError):
            return None
        name = names[0] if isinstance(names, list) and names else None
        return name if isinstance(name, str) and hasattr(transformers, name) else None

    @cached_property
    def _built(self) -> tuple[PreTrainedModel | None, str | None]:
        return build_skeleton(self.folder)

    @property
    def skeleton(self) -> PreTrainedModel | None:
        """The model without its weights, on the meta device; None if its class is unknown."""
        return self._built[0]

    @property
    def note(self) -> str | None:
        """The reason why there is no skeleton, or None."""
        return self._built[1]

    @property
    def misfit(self) -> str | None:
        """The reason why zeros cannot be counted in these files, or None. Reads all weight files."""
        return self._counted[1]

    @cached_property
    def pruning_configs(self) -> list[PruningConfig]:
        """The configurations that the model was pruned with; empty if they are unknown.

        Raises TargetError if one has an expression that takes too long to match; other people may have written it.
        """
        path = self.folder / CONFIG_NAME
        if not path.exists():
            return []
        names = every_name(self.skeleton) if self.skeleton is not None else []
        if (self.folder / files.MODULES_NAME).exists():
            names += [f"{IN_FIRST_MODULE}{name}" for name in names]
        refuse_slow(str(path), written_expressions(self.folder), names)
        return load_saved_configs(self.folder)

    @cached_property
    def frozen(self) -> list[str]:
        """The weights that the default targets left out because they were not trained; empty if they are unknown."""
        names = load_frozen(self.folder) if self.pruning_configs else []
        return [name.removeprefix(IN_FIRST_MODULE) for name in names]

    @cached_property
    def removed(self) -> Removed | None:
        """What was cut out of the model; None if nothing was. Raises PruningStateError for a file that is not its."""
        return removed_from(self.folder, self.skeleton.config if self.skeleton is not None else None)

    # ---- What lies beside them ----

    @cached_property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer was saved with the model."""
        return any((self.folder / name).exists() for name in files.TOKENIZER_NAMES)
