"""Undocumented names of other libraries: each that is gone or has changed is refused, and none is used elsewhere."""

import ast
import functools
import importlib
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModel, Trainer

import hf_prune
from hf_prune import PruningConfig, PruningMixin
from hf_prune.errors import IncompatibleVersionError
from hf_prune.foreign import accelerate, huggingface_hub, peft, transformers
from hf_prune.foreign import torch as foreign_torch
from hf_prune.foreign.entry import KNOWN_VERSIONS
from hf_prune.masking.pruner import Pruner

PACKAGE = Path(hf_prune.__file__).parent
TRAINER = transformers.OVERRIDDEN | transformers.CALLED
MODULES = (transformers, accelerate, peft, huggingface_hub, foreign_torch)
NAMES = [(module, name) for module in MODULES for name in module.NAMES]

# Documented, though not at the top of their library.
DOCUMENTED = {
    "accelerate.optimizer",
    "accelerate.state",
    "accelerate.utils",
    "deepspeed.utils",
    "huggingface_hub.errors",
    "huggingface_hub.hf_api",
    "huggingface_hub.utils",
    "transformers.exporters",
    "transformers.pytorch_utils",
}


def refused(entry, during):
    """Assert that a call is refused in one line, with the name that is missing and the versions that have it."""
    with pytest.raises(IncompatibleVersionError) as caught:
        during()
    library = entry.path.partition(".")[0].partition(":")[0]
    oldest, newest = KNOWN_VERSIONS[library]
    message = str(caught.value)
    assert message.startswith(f"{library} ")
    assert f"needs {entry.name}" in message
    assert f"to {entry.why}" in message
    assert f"{library}>={oldest},<={newest}" in message
    assert "\n" not in message


def take_away(monkeypatch, entry):
    """Take what an entry names away from its module, or from the class that has it."""
    module, _, name = entry.path.partition(":")
    owner = importlib.import_module(module)
    *classes, last = name.split(".")
    for one in classes:
        owner = getattr(owner, one)
    for one in owner.__mro__ if inspect.isclass(owner) else [owner]:
        if last in vars(one):
            monkeypatch.delattr(one, last)


# ---- Names ----


@pytest.mark.parametrize(("module", "name"), NAMES, ids=[name for _, name in NAMES])
def test_a_name_that_is_gone_is_refused(module, name, monkeypatch):
    entry = module.NAMES[name]
    assert getattr(module, name) is not None
    take_away(monkeypatch, entry)
    refused(entry, lambda: getattr(module, name))


def test_a_module_that_is_gone_is_refused(monkeypatch):
    monkeypatch.setitem(importlib.sys.modules, "transformers.trainer_jit_checkpoint", None)
    refused(transformers.NAMES["JITCheckpointCallback"], lambda: transformers.JITCheckpointCallback)


def test_operations_that_do_not_say_what_they_change_are_refused():
    assert not foreign_torch.changes_arguments(torch.ops.aten.add.Tensor)
    assert foreign_torch.changes_arguments(torch.ops.aten.add_.Tensor)
    assert foreign_torch.changes_arguments(torch.ops.aten.add.out)
    refused(foreign_torch.SCHEMA, lambda: foreign_torch.changes_arguments(object()))


def test_other_names_are_not_there():
    with pytest.raises(AttributeError, match=r"hf_prune\.foreign\.peft.*Nothing"):
        _ = peft.Nothing


def test_mappings_of_tasks_that_are_gone_are_refused(monkeypatch):
    assert len(list(transformers.task_mappings())) > 20
    monkeypatch.delattr(AutoModel, "_model_mapping")
    with pytest.raises(IncompatibleVersionError, match=r"needs AutoModel\._model_mapping to find"):
        list(transformers.task_mappings())


@pytest.mark.parametrize("name", transformers.ATTRIBUTES)
def test_what_saves_on_sigterm_is_refused_where_it_is_gone(name):
    stock = transformers.JITCheckpointCallback()
    assert transformers.jit_parts(stock) == (None, None)
    manager = SimpleNamespace(is_checkpoint_requested=False)
    callback = SimpleNamespace(trainer=None, jit_manager=manager)
    assert transformers.jit_parts(callback) == (None, manager)
    delattr(manager if name == "is_checkpoint_requested" else callback, name)
    refused(transformers.ATTRIBUTES[name], lambda: transformers.jit_parts(callback))


def test_forward_passes_without_mixed_precision_are_found():
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        model = nn.Linear(4, 4)
        forward = model.forward
        prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
        inputs = torch.full((1, 4), 1 + 2**-12)
        assert accelerate.forward_of(prepared) == forward
        assert not torch.equal(prepared(inputs), forward(inputs))
        assert torch.equal(accelerate.forward_of(prepared)(inputs), forward(inputs))
        with accelerate.without_mixed_precision(prepared):
            assert torch.equal(prepared(inputs), forward(inputs))
        assert not torch.equal(prepared(inputs), forward(inputs))
        with accelerate.without_mixed_precision(model):
            assert torch.equal(model(inputs), forward(inputs))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


# ---- The Trainer ----


def extend(stock=Trainer):
    class Extended(PruningMixin, stock):
        pass

    return Extended


@pytest.mark.parametrize("name", TRAINER)
def test_a_method_of_the_trainer_that_is_gone_is_refused_when_the_class_is_made(name, monkeypatch):
    extend()
    monkeypatch.delattr(Trainer, name)
    refused(TRAINER[name], extend)


CALLED_WITH_ARGUMENTS = [name for name, entry in TRAINER.items() if entry.call.strip(". ")]


@pytest.mark.parametrize("name", CALLED_WITH_ARGUMENTS)
def test_a_method_with_another_signature_is_refused_when_the_class_is_made(name):
    def changed(self, *, something_new):
        raise AssertionError

    stock = type("Stock", (Trainer,), {name: changed})
    refused(TRAINER[name], lambda: extend(stock))


BY_POSITION = [name for name in CALLED_WITH_ARGUMENTS if not TRAINER[name].call.split(",")[0].endswith("=")]


@pytest.mark.parametrize("name", BY_POSITION)
def test_arguments_in_another_order_are_refused(name, monkeypatch):
    def changed(self, new_argument=None, *args, **kwargs):
        raise AssertionError

    changed.__module__ = "transformers.trainer"
    monkeypatch.setattr(Trainer, name, changed)
    refused(TRAINER[name], extend)


TAKES_NO_MORE = [
    *("save_model", "compute_loss", "_push_from_checkpoint", "_load_from_checkpoint"),
    "_load_optimizer_and_scheduler",
]


@pytest.mark.parametrize("name", TAKES_NO_MORE)
def test_an_argument_that_ours_does_not_take_is_refused(name, monkeypatch):
    parameters = list(inspect.signature(getattr(Trainer, name)).parameters)
    more = ", ".join([parameters[0], *(f"{one}=None" for one in parameters[1:]), "new_argument=None"])
    scope = {"__name__": "transformers.trainer"}
    exec(f"def changed({more}): ...", scope)
    monkeypatch.setattr(Trainer, name, scope["changed"])
    with pytest.raises(IncompatibleVersionError, match=rf"found Trainer\.{name}\(.*new_argument"):
        extend()


def test_classes_of_others_may_name_arguments_as_they_like():
    class Other(Trainer):
        def _load_from_checkpoint(self, checkpoint_path):
            raise AssertionError

        def create_model_card(self, language, *, own=None):
            raise AssertionError

    assert issubclass(extend(Other), Other)


def test_a_mixin_of_ones_own_is_checked_with_the_trainer_that_it_is_mixed_into(monkeypatch):
    class Further(PruningMixin):
        pass

    monkeypatch.delattr(Trainer, "_run_epoch")
    with pytest.raises(IncompatibleVersionError, match="_run_epoch"):
        type("Extended", (Further, Trainer), {})


# ---- PEFT ----


def with_lora():
    model = nn.Sequential(nn.Linear(8, 8))
    return get_peft_model(model, LoraConfig(target_modules=["0"]))


def prune_under_adapters(model):
    Pruner(model, PruningConfig(sparsity=0.5, targets=[".*weight"], adapters="sparse_merge"))


@pytest.mark.parametrize("entry", [*peft.OVERRIDDEN, *peft.OF_LAYERS], ids=lambda entry: entry.path)
def test_what_layers_of_peft_no_longer_have_is_refused_before_anything_is_masked(entry, monkeypatch):
    model = with_lora()
    peft.check_layers([model.base_model.model[0]])
    take_away(monkeypatch, entry)
    refused(entry, lambda: peft.check_layers([model.base_model.model[0]]))


@pytest.mark.parametrize("entry", peft.OF_LORA, ids=lambda entry: entry.path)
def test_what_a_layer_of_lora_no_longer_has_is_refused(entry):
    model = with_lora()
    delattr(model.base_model.model[0], entry.name.rpartition(".")[2])
    refused(entry, lambda: prune_under_adapters(model))


@pytest.mark.parametrize("entry", peft.OVERRIDDEN, ids=lambda entry: entry.path)
def test_methods_of_peft_with_another_signature_are_refused(entry, monkeypatch):
    module, _, name = entry.path.partition(":")
    owner, method = name.split(".")
    monkeypatch.setattr(getattr(importlib.import_module(module), owner), method, lambda self: None)
    refused(entry, lambda: prune_under_adapters(with_lora()))


# ---- All that there is ----


def test_the_versions_that_are_known_to_work_are_those_that_the_tests_run_with():
    for library, versions in KNOWN_VERSIONS.items():
        for version, file in zip(versions, ("constraints-oldest.txt", "constraints.txt"), strict=True):
            pinned = dict(re.findall(r"^([\w.-]+)==(\S+)", (PACKAGE.parent / file).read_text(), flags=re.MULTILINE))
            if library in pinned:
                assert pinned[library] == version, f"{library} in {file}"


@functools.cache
def sources():
    """Every module outside of `foreign/`: its path in the package and what it parses to."""
    files = (path.relative_to(PACKAGE) for path in sorted(PACKAGE.rglob("*.py")))
    return {
        path.as_posix(): ast.parse((PACKAGE / path).read_text(encoding="utf-8"))
        for path in files
        if path.parts[0] != "foreign"
    }


def is_private(name):
    return isinstance(name, str) and name.startswith("_") and not name.startswith("__")


def is_super(node):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


def of_super(node):
    """Whether a node is `super().NAME`, of a name that is not Python's."""
    return isinstance(node, ast.Attribute) and is_super(node.value) and not node.attr.startswith("__")


def test_every_method_that_the_mixins_override_is_in_the_table():
    called = {
        node.attr
        for path, tree in sources().items()
        if path.startswith("trainer/")
        for node in ast.walk(tree)
        if of_super(node)
    }
    assert called == set(transformers.OVERRIDDEN)


@functools.cache
def own_names():
    """Names of functions and attributes that the package itself gives."""
    found = set()
    for tree in sources().values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
    return found


@pytest.mark.parametrize("path", sources())
def test_names_that_are_not_documented_are_used_through_the_tables_alone(path):
    ours, python = own_names(), {"_exit", "_run_exitfuncs", "_version"}  # of os and atexit; how often a tensor changed
    # Our folder, the end of the names of losses, modules by which torch wraps others, a file of passwords, and what is
    # left out when a model with sparse products is copied.
    ours_in_text = {"_unfinished", "_loss", "_orig_mod", "_checkpoint_wrapped_module", "_netrc", "_csr", "_stamp"}
    nodes = list(ast.walk(sources()[path]))
    in_f_strings = [part for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values]
    for node in nodes:
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            assert node.attr in ours | python | set(transformers.OVERRIDDEN), f"{ast.unparse(node)} in {path}"
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            names = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            assert not [name for name in names if is_private(name)], f"{ast.unparse(node)} in {path}"
        elif isinstance(node, ast.Constant) and re.fullmatch("_[a-z][a-z_]*[a-z]", str(node.value)):
            if node in in_f_strings:
                continue
            assert node.value in ours_in_text, f"{node.value} in {path}"
        elif isinstance(node, ast.ImportFrom) and not node.level:
            library, _, rest = (node.module or "").partition(".")
            checked = KNOWN_VERSIONS.keys() - {"torch"}  # whose modules are documented one by one
            assert not rest or library not in checked or node.module in DOCUMENTED, f"{node.module} in {path}"
            assert not any(is_private(alias.name) for alias in node.names), f"{ast.unparse(node)} in {path}"


def test_every_entry_says_why_it_is_needed_and_when_it_can_go():
    peft_entries = [*peft.OVERRIDDEN, *peft.OF_LAYERS, *peft.OF_LORA]
    named = [module.NAMES[name] for module, name in NAMES]
    named.append(foreign_torch.SCHEMA)
    for entry in [*named, *TRAINER.values(), *transformers.ATTRIBUTES.values(), *peft_entries]:
        assert len(entry.why.split()) > 1
        assert entry.until.startswith(("when", "never", "with"))
