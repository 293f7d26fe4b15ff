"""A saved model's folder as one object: each fact in it is read once."""

import json
import os
from functools import cached_property
from pathlib import Path

import transformers
from transformers import PreTrainedModel

from ..config.pruning import CONFIG_NAME, PruningConfig, load_configs
from ..errors import ReportError, one_line
from . import files
from .skeleton import build_skeleton
from .zeros import TensorReport, count_tensors, prunable_names


class SavedModel(os.PathLike):
    """A folder with a saved model. Each fact is read when it is first asked for, and remembered.

    Whatever takes a folder takes one of these in its place, begins with `SavedModel.of`, and reads nothing again.

    All facts are of the files as they were when this was made: sizes and times of change of the folder's safetensors
    and JSON files are remembered. Where one of them has changed, `SavedModel.of` makes a new object; where one changes
    while zeros are counted or hashes taken, that raises ReportError. A change that leaves both size and time as they
    were is not seen. What is written from the facts (record, card, `sparsity.json`) is not one of those files.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self._stamps = self._look()

    @classmethod
    def of(cls, folder: str | os.PathLike) -> "SavedModel":
        """A folder's SavedModel: the one that was given, or a new one for a path or where a file has changed."""
        if isinstance(folder, SavedModel) and folder._stamps == folder._look():
            return folder
        return cls(folder)

    def __fspath__(self) -> str:
        return str(self.folder)

    def _look(self) -> dict[str, tuple[int, int]]:
        """Size and time of change, in nanoseconds, of the files that the facts are read from."""
        paths = [*self.folder.glob("*.safetensors"), *(self.folder / name for name in files.READ_NAMES)]
        stats = {path.name: path.stat() for path in paths if path.exists()}
        return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}

    def _check_unchanged(self) -> None:
        now = self._look()
        changed = sorted(name for name in {*now, *self._stamps} if now.get(name) != self._stamps.get(name))
        if changed:
            raise ReportError(
                f"{self.folder}: expected files that stay as they are while they are read, {changed[0]} was changed "
                "meanwhile; run the same again when the model is saved"
            )

    # ---- Weights ----

    @cached_property
    def weight_files(self) -> list[Path]:
        """The files of weights. Raises ReportError where there are none, or not all that the index names."""
        return files.weight_files(self.folder)

    @cached_property
    def file_bytes(self) -> int:
        """The sizes of the files of weights together."""
        return sum(file.stat().st_size for file in self.weight_files)

    @cached_property
    def hashes(self) -> dict[str, files.SavedFile]:
        """Size and SHA-256 of each file of weights, by its name. Reads all of them."""
        found = files.saved_files(self.weight_files)
        self._check_unchanged()
        return found

    @cached_property
    def tensors(self) -> list[TensorReport]:
        """The parameters with their zeros. Reads all files of weights.

        Raises ReportError for a file that is broken, and TargetError where a pruning configuration fits no parameter.
        """
        weights = self.weight_files
        prunable = set()
        if self.skeleton is not None:
            in_first_module = (self.folder / files.MODULES_NAME).exists()
            prunable = prunable_names(self.skeleton, self.pruning_configs, in_first_module)
        found = count_tensors(weights, self.skeleton, prunable)
        self._check_unchanged()
        return found

    # ---- What the weights belong to ----

    @cached_property
    def architecture(self) -> str | None:
        """The name of the model's class in its config.json, if it is one of transformers."""
        try:
            names = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))["architectures"]
        except (OSError, ValueError, LookupError, TypeError):
            return None
        name = names[0] if isinstance(names, list) and names else None
        return name if isinstance(name, str) and hasattr(transformers, name) else None

    @cached_property
    def _built(self) -> tuple[PreTrainedModel | None, str | None]:
        return build_skeleton(self.folder)

    @property
    def skeleton(self) -> PreTrainedModel | None:
        """The model without its weights, on the meta device; None where its class is not known."""
        return self._built[0]

    @property
    def note(self) -> str | None:
        """Why there is no skeleton, where there is none."""
        return self._built[1]

    @cached_property
    def pruning_configs(self) -> list[PruningConfig]:
        """The configurations that the model was pruned with; none where that is not known."""
        return load_configs(self.folder) if (self.folder / CONFIG_NAME).exists() else []

    # ---- What lies beside them ----

    @cached_property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer was saved with the model."""
        return any((self.folder / name).exists() for name in files.TOKENIZER_NAMES)

    @cached_property
    def vocabularies(self) -> set[str]:
        """The files that the tokenizer's class reads, by whatever names."""
        try:
            name = json.loads((self.folder / "tokenizer_config.json").read_text(encoding="utf-8"))["tokenizer_class"]
        except (OSError, ValueError, LookupError, TypeError):
            return set()
        tokenizer_class = getattr(transformers, name, None) if isinstance(name, str) else None
        return set(getattr(tokenizer_class, "vocab_files_names", {}).values())

    @cached_property
    def module_folders(self) -> list[str]:
        """The folders of a sentence-transformers model, whose modules.json lists the modules after the first.

        Raises ReportError for a list that cannot be used.
        """
        path = self.folder / files.MODULES_NAME
        try:
            modules = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
            return [module["path"] for module in modules if module["path"]]
        except (OSError, ValueError, LookupError, TypeError) as error:
            why = one_line(error)
            raise ReportError(f"{path}: expected a list of modules, got a file that cannot be used ({why})") from error
