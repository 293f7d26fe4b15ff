import pytest
import torch

from hf_prune.methods.damping import Damping
from hf_prune.quantise.codebooks import nearest, share
from hf_prune.quantise.feeding import share_with_feedback
from hf_prune.quantise.kmeans import kmeans

DAMPING = Damping(0.01, "mean")


def problem(rows=24, columns=40, share_kept=0.4):
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(rows, columns, generator=generator)
    mixed = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    inputs = torch.randn(500, columns, generator=generator) @ mixed
    kept = torch.rand(rows, columns, generator=generator) < share_kept
    return wanted, inputs.T @ inputs / 500, kept


def error(weight, wanted, gram):
    return float(((weight - wanted) @ gram * (weight - wanted)).sum())


@pytest.mark.parametrize("number", [2, 4, 16])
def test_later_columns_make_up_for_what_earlier_ones_lose(number):
    wanted, gram, kept = problem(share_kept=0.8)
    fed = share_with_feedback(wanted * kept, gram, kept, number, DAMPING)
    assert len(fed[kept].unique()) <= number
    assert not fed[~kept].any()
    codebook = kmeans(wanted[kept], number, importance=gram.diagonal().expand_as(wanted)[kept])
    assert set(fed[kept].tolist()) <= set(codebook.tolist())
    assert error(fed, wanted * kept, gram) < 0.9 * error(share(wanted, kept, codebook), wanted * kept, gram)


def test_each_column_is_rounded_after_the_losses_before_it_as_in_the_paper():
    """Column by column, with the inverse of the matrix of the columns that are left, as GPTQ is derived."""
    wanted, gram, kept = problem(rows=5, columns=12)
    fed = share_with_feedback(wanted * kept, gram, kept, 4, DAMPING)
    codebook = kmeans((wanted * kept)[kept], 4, importance=gram.diagonal().expand_as(wanted)[kept])
    damped = (gram + 0.01 * gram.diagonal().mean() * torch.eye(12)).double()
    now = (wanted * kept).double()
    for column in range(12):
        inverse = damped[column:, column:].inverse()
        rounded = codebook.double()[nearest(now[:, column], codebook)] * kept[:, column]
        lost = now[:, column] - rounded
        now[:, column:] -= lost[:, None] * inverse[0] / inverse[0, 0]
        now[:, column] = rounded
    torch.testing.assert_close(fed.double(), now, rtol=1e-4, atol=1e-5)


def test_with_inputs_that_have_nothing_in_common_nothing_is_fed_on():
    wanted, _, kept = problem(columns=300)
    fed = share_with_feedback(wanted * kept, torch.eye(300), kept, 8, DAMPING)
    assert torch.equal(fed, share(wanted, kept, kmeans(wanted[kept], 8)))


def test_a_matrix_of_which_nothing_is_kept_is_zero():
    wanted, gram, kept = problem()
    assert not share_with_feedback(wanted * 0, gram, torch.zeros_like(kept), 4, DAMPING).any()
