"""Sums over calibration tokens, in float32 and of inputs that are rounded to bfloat16."""

import pytest
import torch

from hf_prune.oneshot.grams import moments_of


def micro_batches(rounded):
    """Inputs, those of the dense model and what the stream lacks; the first two as bfloat16 has them."""
    torch.manual_seed(0)
    found = [(torch.randn(50, 24), torch.randn(50, 24), torch.randn(50, 6)) for _ in range(3)]
    return [
        (x.bfloat16().float(), dense.bfloat16().float(), lack) if rounded else (x, dense, lack)
        for x, dense, lack in found
    ]


@pytest.mark.parametrize("rounded", [False, True])
def test_means_of_products_are_exact_to_float32(rounded):
    """Also where products are computed in bfloat16: what is rounded already is not changed, and sums are float32."""
    before = torch.backends.mkldnn.matmul.fp32_precision
    inputs = micro_batches(rounded)
    moments = moments_of(inputs, 24, products=True, rounded=rounded)
    x, dense, lack = (torch.cat(parts).double() for parts in zip(*inputs, strict=True))
    for found, expected in ((moments.gram, x.T @ x), (moments.cross, dense.T @ x), (moments.lack, lack.T @ x)):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected / 150, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moments.squares, moments.gram.diagonal())
    assert moments.tokens == 150
    assert torch.backends.mkldnn.matmul.fp32_precision == before
