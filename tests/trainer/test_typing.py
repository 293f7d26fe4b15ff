"""What editors and type checkers see of `PruningTrainer`: every argument, with its type."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import hf_prune
from hf_prune import PruningTrainer
from hf_prune.trainer import trainer

# Each line that is wrong says in its comment what mypy is to say.
SCRIPT = """
import torch
from torch import nn
from transformers import TrainingArguments

from hf_prune import DistillationConfig, PruningConfig, PruningTrainer

model = nn.Linear(2, 2)
config = PruningConfig(method="magnitude", sparsity=0.8)
soft = DistillationConfig(temperature=2.0)

PruningTrainer(model=model, args=TrainingArguments("out"), callbacks=[], pruning_config=config)
PruningTrainer(model, None, pruning_config=[config, config], teacher_model=model, distillation_config=soft)
PruningTrainer(model=model, pruning_config=None, teacher_model="teacher", optimizers=(None, None)).train()

PruningTrainer(model=model, pruning_confg=config)  # Unexpected keyword argument "pruning_confg"
PruningTrainer(model=model, training_args=None)  # Unexpected keyword argument "training_args"
PruningTrainer(model=model, pruning_config=0.8)  # Argument "pruning_config" to "PruningTrainer" has incompatible type
PruningTrainer(model=model, callbacks=3)  # Argument "callbacks" to "PruningTrainer" has incompatible type
PruningTrainer(model=model, teacher_model=3)  # Argument "teacher_model" to "PruningTrainer" has incompatible type
PruningTrainer(model=model, distillation_config={})  # Argument "distillation_config" to "PruningTrainer"
PruningTrainer(model, None, None, None, None, None, None, None, None, [], (None, None), None, None, None, 0)  # Too many
"""

# Only what the script's types need is read: the whole of torch and transformers takes a minute.
SETTINGS = """
[mypy]
follow_imports = skip
ignore_missing_imports = true
show_error_codes = false
[mypy-hf_prune.*,torch,torch.nn,torch.nn.modules,torch.nn.modules.module,torch.nn.modules.linear]
follow_imports = silent
"""


def test_a_type_checker_knows_right_from_wrong_arguments(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "settings.ini").write_text(SETTINGS)
    command = [sys.executable, "-m", "mypy", "--config-file", "settings.ini", "--no-error-summary", "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    said = dict(re.findall(r"^script\.py:(\d+): error: (.*)$", done.stdout, flags=re.MULTILINE))
    wrong = {
        str(number): line.partition("  # ")[2]
        for number, line in enumerate(SCRIPT.splitlines(), start=1)
        if "  # " in line
    }
    assert said.keys() == wrong.keys(), done.stdout + done.stderr
    for number, start in wrong.items():
        assert said[number].startswith(start)


def test_the_arguments_that_are_spelled_out_are_those_of_the_installed_trainer():
    (spelled,) = (
        node
        for node in ast.walk(ast.parse(inspect.getsource(trainer)))
        if isinstance(node, ast.FunctionDef) and node.name == "__init__" and len(node.args.args) > 2
    )
    arguments = spelled.args
    names = [one.arg for one in arguments.args[1:]]
    defaults = [ast.literal_eval(one) for one in arguments.defaults]
    ours = {
        one.arg: ast.literal_eval(default)
        for one, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    }
    stock = inspect.signature(PruningTrainer).parameters  # what is taken at run time
    assert dict(zip(names, defaults, strict=True)) | ours == {name: one.default for name, one in stock.items()}
    assert [*names, *ours] == list(stock)
    assert list(ours) == [name for name, one in stock.items() if one.kind is one.KEYWORD_ONLY]


def test_the_package_says_that_it_is_typed():
    assert Path(hf_prune.__file__).with_name("py.typed").is_file()
