"""The environment of llm-compressor for the rows of `oneshot.py`: its newest release, beside our version of torch."""

import subprocess
import venv
from pathlib import Path

from structure_rival import ROOT, python_of

PACKAGE = "llmcompressor==0.14.0.1"

VERSION = "import torch; print(torch.__version__)"


def make_rival_environment(folder: Path) -> None:
    """Make the environment in a folder, once. torch is installed first, and no other build of it may replace it.

    llm-compressor brings the newest transformers that it allows, which is older than ours. Raises RuntimeError if torch
    was replaced.
    """
    installed = folder / "installed"
    if installed.exists() and installed.read_text(encoding="utf-8") == PACKAGE:
        return
    print(f"installing {PACKAGE} into {folder}", flush=True)
    venv.create(folder, with_pip=True, clear=True)
    pip = [python_of(folder), "-m", "pip", "install", "--quiet", "--constraint"]
    subprocess.run([*pip, str(ROOT / "constraints.txt"), "torch"], check=True)
    before = torch_version(folder)
    only_torch = folder / "torch.txt"
    only_torch.write_text(f"torch=={before}\n", encoding="utf-8")
    subprocess.run([*pip, str(only_torch), PACKAGE], check=True)
    if torch_version(folder) != before:
        raise RuntimeError(f"expected torch {before} in {folder}, got {torch_version(folder)}; remove the folder")
    installed.write_text(PACKAGE, encoding="utf-8")


def torch_version(environment: Path) -> str:
    """The version of torch in an environment, with its build."""
    found = subprocess.run([python_of(environment), "-c", VERSION], check=True, capture_output=True, text=True)
    return found.stdout.strip()
