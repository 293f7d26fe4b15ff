import pytest
import torch
import train_sigterm
import transformers
from forks import run_group
from packaging.version import Version

from hf_prune.trainer.checkpoints import is_complete


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="transformers 5.10 loads optimizer states to cpu:0 on several CPU processes, which torch 2.13 refuses",
)
def test_processes_save_and_stop_together_when_one_gets_sigterm_and_go_on_bit_for_bit(tmp_path):
    ended = run_group(2, train_sigterm.main, tmp_path)
    assert [one.returncode for one in ended] == [0, 0], "".join(one.stderr for one in ended)[-4000:]

    ended = {
        name: [torch.load(tmp_path / f"{name}-rank{rank}.pt", weights_only=True) for rank in (0, 1)]
        for name in ("whole", "stopped", "resumed")
    }
    assert [one["steps"] for one in ended["stopped"]] == [7, 7]
    assert [path.name for path in (tmp_path / "stopped").iterdir()] == ["checkpoint-7"]
    assert is_complete(tmp_path / "stopped" / "checkpoint-7")
    for whole, resumed in zip(ended["whole"], ended["resumed"], strict=True):
        assert whole["steps"] == resumed["steps"] == 12
        for kind in ("weights", "masks"):
            assert whole[kind].keys() == resumed[kind].keys()
            assert all(torch.equal(value, resumed[kind][name]) for name, value in whole[kind].items())
