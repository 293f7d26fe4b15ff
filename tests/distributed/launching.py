"""Cases of training that `train.py` runs on several processes, and what is asserted of what they came to."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from hf_prune.report import make_report

HERE = Path(__file__).parent
WINDOW = {"begin": 2, "end": 8, "frequency": 2}
GLOBAL = {"sparsity": 0.5, "scope": "global", **WINDOW}
SAVE = {"save_strategy": "steps", "save_steps": 5}


def launch(processes, directory, cases, succeeds=True):
    """Run cases one after another on so many processes; what each ended with."""
    for name in cases:
        (directory / name).mkdir(parents=True, exist_ok=True)
    (directory / "cases.json").write_text(json.dumps(cases))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent), "PYTHONWARNINGS": "default"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [*command, str(HERE / "train.py"), str(directory)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode == 0) == succeeds, done.stderr[-20000:]
    if not succeeds:
        return done.stderr
    return {name: torch.load(directory / name / "result.pt", weights_only=True) for name in cases}


def assert_alike(first, second):
    """Trained alike to rounding."""
    torch.testing.assert_close(torch.tensor(first["losses"]), torch.tensor(second["losses"]), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.tensor(first["norms"]), torch.tensor(second["norms"]), rtol=1e-2, atol=1e-3)
    for name, weight in first["weights"].items():
        different = (weight - second["weights"][name]).abs() > 1e-3 * (1 + weight.abs())
        assert different.float().mean() < 0.01, name  # a mask may differ where two weights are all but equal


def assert_saved_as_masked(directory, result):
    """The model that was saved has the zeros of the masks, and no others."""
    masked = 0
    for tensor, mask in result["masks"].items():
        assert not result["weights"][tensor][~mask].any()
        assert result["weights"][tensor][mask].all()
        masked += int((~mask).sum())
    assert result["sparsity"] == masked / sum(mask.numel() for mask in result["masks"].values())
    report = make_report(directory / "saved")
    assert sum(tensor.zeros for tensor in report.tensors if tensor.prunable) == masked
