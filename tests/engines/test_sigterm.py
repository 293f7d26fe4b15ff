import torch
from test_replicated import run_on_two_processes

from hf_prune.trainer.checkpoints import is_complete


def test_processes_save_and_stop_together_when_one_gets_sigterm_and_go_on_bit_for_bit(tmp_path):
    run_on_two_processes("train_sigterm.py", tmp_path)

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
