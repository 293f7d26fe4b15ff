"""Sums over calibration tokens, in float32 and of inputs that are rounded to bfloat16."""

import pytest
import torch
from models import VOCABULARY, llama
from torch.utils._python_dispatch import TorchDispatchMode

from hf_prune import CalibrationConfig, PruningConfig, prune
from hf_prune.oneshot.grams import moments_of


def micro_batches(rounded):
    """Inputs, those of the dense model and what the stream lacks; or the same as bfloat16 has them."""
    torch.manual_seed(0)
    found = [(torch.randn(50, 24), torch.randn(50, 24), torch.randn(50, 6)) for _ in range(3)]
    return [tuple(one.bfloat16().float() if rounded else one for one in rows) for rows in found]


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


class _Precisions(TorchDispatchMode):
    """The precisions that products of float32 matrices are computed in."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        products = (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default)
        if func in products and args[0].dtype == torch.float32:
            self.seen.add(torch.backends.mkldnn.matmul.fp32_precision)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("autocast", [None, "bfloat16", "float16"])
def test_products_are_rounded_where_forward_passes_compute_in_bfloat16_and_solvers_never_are(autocast):
    config = PruningConfig(method="sparsegpt", sparsity=0.5)
    with _Precisions() as precisions:
        prune(llama(), config, torch.randint(5, VOCABULARY, (4, 16)), CalibrationConfig(autocast=autocast))
    assert ("bf16" in precisions.seen) == (autocast == "bfloat16")
    assert "ieee" in precisions.seen
