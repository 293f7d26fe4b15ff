"""Scores of units on disk: read as they were written, or refused by name."""

import pytest
import torch
from safetensors.torch import save_file

from hf_prune.errors import PruningStateError
from hf_prune.saved.unit_scores import UNIT_SCORES_NAME, read_unit_scores, write_unit_scores

SCORES = {"neurons of a": torch.tensor([0.1, 1e-300, 3.0], dtype=torch.float64), "layers of b": torch.zeros(1).double()}
UNITS = {"neurons of a": 3, "layers of b": 1, "neurons of c": 4}


def test_scores_are_read_as_they_were_written(tmp_path):
    write_unit_scores(tmp_path, SCORES)
    found = read_unit_scores(tmp_path, UNITS)
    assert found.keys() == SCORES.keys()
    assert all(torch.equal(found[name], SCORES[name]) for name in SCORES)


def test_without_scores_there_is_no_file_and_that_of_an_earlier_run_is_deleted(tmp_path):
    write_unit_scores(tmp_path, {})
    assert read_unit_scores(tmp_path, UNITS) == {}
    write_unit_scores(tmp_path, SCORES)
    write_unit_scores(tmp_path, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "scores",
    [
        {"neurons of a": torch.zeros(4).double()},
        {"neurons of a": torch.zeros(3)},
        {"neurons of a": torch.zeros(3, 1).double()},
        {"neurons of a": torch.tensor([1.0, float("nan"), 1.0]).double()},
        {"neurons of a": torch.tensor([1.0, float("inf"), 1.0]).double()},
        {"neurons of other": torch.zeros(3).double()},
    ],
)
def test_scores_of_other_units_are_refused(tmp_path, scores):
    save_file(scores, tmp_path / UNIT_SCORES_NAME)
    with pytest.raises(PruningStateError, match="expected finite scores of the model's units") as caught:
        read_unit_scores(tmp_path, UNITS)
    assert str(caught.value).startswith(str(tmp_path / UNIT_SCORES_NAME))


@pytest.mark.parametrize("content", [b"", b"no scores", b"\xff" * 40])
def test_a_file_that_cannot_be_read_is_refused(tmp_path, content):
    (tmp_path / UNIT_SCORES_NAME).write_bytes(content)
    with pytest.raises(PruningStateError, match="got a file that cannot be read"):
        read_unit_scores(tmp_path, UNITS)
