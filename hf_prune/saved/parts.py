"""Which files of a saved model's folder the model's own classes read, beside its weights.

The classes read files of fixed names; vocabularies under the names that the tokenizer's class gives them; the code that
`auto_map` names; and the same again in the folders of further tokenizers and of sentence-transformers' modules.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import transformers

from ..config.safe_json import read_json, read_object
from ..errors import ReportError, one_line
from ..foreign.transformers import get_relative_imports
from .files import INDEX_NAME, MODULES_NAME, TOKENIZER_NAMES, lies_inside

# Patterns of the names that classes read in a folder, and which classes.
_READ = (
    *("config.json", "generation_config.json"),  # models
    *(*TOKENIZER_NAMES, "special_tokens_map.json", "added_tokens.json"),  # tokenizers
    *("tokenizer.model", "tiktoken.model", "tekken.json"),  # tokenizers that have no tokenizer.json
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),  # processors
    *("audio_tokenizer_config.json", "spk_dict.pt"),  # models of speech
    *("decision.json", "decision_template.jinja"),  # decision models
    "custom_generate/requirements.txt",  # generation with code of its own
    *(MODULES_NAME, "config_sentence_transformers.json", "sentence_*_config.json"),  # sentence-transformers
    *("router_config.json", "wordembedding_config.json", "cnn_config.json", "lstm_config.json", "idf.json"),
    *("whitespacetokenizer_config.json", "phrasetokenizer_config.json"),
)

# The weights of a sentence-transformers module; those of the model itself are known.
_WEIGHTS_OF_MODULES = ("model*.safetensors", INDEX_NAME)


def files_of_classes(folder: Path) -> set[str]:
    """The names, relative to a folder, of the files in it that the model's own classes read, beside its weights.

    Raises ReportError for an invalid list of sentence-transformers' modules.
    """
    modules = _modules(folder)
    own_code = [one for one in modules.values() if not one.startswith("sentence_transformers.")]
    found = {*_read_in(folder), *_with_imports(folder, _files_of(own_code))}
    for tokenizer in folder.glob("*_tokenizer"):  # of processors with several
        if lies_inside(tokenizer, folder):
            found |= {f"{tokenizer.name}/{name}" for name in _read_in(tokenizer)}
    routes = read_object(folder / "router_config.json").get("types")
    names = [*modules, *(routes if isinstance(routes, dict) else {})]
    tops = [folder / name for name in names if _is_in(folder, name) and folder / name != folder]
    for inner in (*tops, *(path for top in tops for path in top.rglob("*"))):
        if inner.is_dir() and lies_inside(inner, folder):
            place = inner.relative_to(folder).as_posix()
            weights = _WEIGHTS_OF_MODULES if any(inner.glob("model*.safetensors")) else ("pytorch_model.bin",)
            found |= {f"{place}/{name}" for name in _read_in(inner, weights)}
    return found


def module_folders(folder: Path) -> list[str]:
    """The folders of a sentence-transformers model's modules, relative to it, without its own."""
    return [name for name in _modules(folder) if Path(name) != Path()]


def _modules(folder: Path) -> dict[str, str]:
    """The modules of a sentence-transformers model: folder, empty for the model's own -> class."""
    path = folder / MODULES_NAME
    try:
        modules = read_json(path) if path.exists() else []
        found = {os.fspath(module["path"]): str(module.get("type")) for module in modules}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        why = one_line(error)
        raise ReportError(f"{path}: expected a list of modules, got a file that cannot be used ({why})") from error
    for name in found:
        if not _is_in(folder, name):
            raise ReportError(f"{path}: expected modules in this folder, got {name!r}; copy it there")
    return found


def _is_in(folder: Path, name: str) -> bool:
    plain = "\0" not in name and not Path(name).is_absolute() and ".." not in Path(name).parts
    return plain and lies_inside(folder / name, folder)


def _read_in(folder: Path, more: Iterable[str] = ()) -> Iterator[str]:
    """The names of files that classes read in a folder, without those in folders further down."""
    for pattern in (*_READ, *_vocabularies(folder), *more):
        yield from (path.relative_to(folder).as_posix() for path in folder.glob(pattern) if path.is_file())
    yield from _with_imports(folder, _code(folder))
    yield from (f"custom_generate/{name}" for name in _with_imports(folder / "custom_generate", ["generate.py"]))


def _vocabularies(folder: Path) -> Iterator[str]:
    """The names that a tokenizer's class gives its files: of the class that is named, and of the model type's."""
    config, tokenizer = read_object(folder / "config.json"), read_object(folder / "tokenizer_config.json")
    named = [content.get("tokenizer_class") for content in (tokenizer, config)]
    classes = [getattr(transformers, name, None) for name in named if isinstance(name, str)]
    kind = str(config.get("model_type"))
    if kind in transformers.CONFIG_MAPPING:
        classes.append(transformers.TOKENIZER_MAPPING.get(transformers.CONFIG_MAPPING[kind], None))
    for one in classes:
        try:
            yield from getattr(one, "vocab_files_names", {}).values()
        except ImportError:  # the class stands for one that needs a package which is not installed
            continue


def _code(folder: Path) -> list[str]:
    """The files with code that `auto_map` names: `modeling_own.Model` is in modeling_own.py."""
    maps = [one for path in folder.glob("*config.json") for one in _auto_maps(read_object(path))]
    # A dict of names and of lists of names, or an older list of names.
    values = [one for each in maps for one in (each.values() if isinstance(each, dict) else [each])]
    references = [one for value in values for one in (value if isinstance(value, list) else [value])]
    # A name with -- is that of code in another repository.
    return _files_of(str(reference) for reference in references if "--" not in str(reference))


def _auto_maps(content: dict[str, Any]) -> Iterator[Any]:
    """What is called `auto_map` in a configuration, at any depth: parts of processors have one of their own."""
    for name, value in content.items():
        if name == "auto_map":
            yield value
        elif isinstance(value, dict):
            yield from _auto_maps(value)


def _files_of(classes: Iterable[str]) -> list[str]:
    return [f"{name.rpartition('.')[0]}.py" for name in classes]


def _with_imports(folder: Path, names: Iterable[str]) -> set[str]:
    """Those of the files that exist, and what they import from beside them."""
    found: set[str] = set()
    to_read = list(names)
    while to_read:
        name = to_read.pop()
        path = folder / name
        if name not in found and name == path.name and os.path.isfile(path):  # False for a name that is too long
            found.add(name)
            if lies_inside(path, folder):
                to_read += [f"{module}.py" for module in get_relative_imports(path)]
    return found
