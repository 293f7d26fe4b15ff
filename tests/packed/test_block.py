"""One tensor as a block: bit for bit, near the entropy, and refused when it was changed."""

import contextlib
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_prune.errors import PackedError
from hf_prune.packed.block import DTYPES, LARGEST_RATIO, pack_rows, pack_tensor, read_head, unpack_tensor
from hf_prune.packed.bound import tensor_entropy
from hf_prune.packed.files import round_to_bfloat16
from hf_prune.packed.values import to_rows

quick = settings(deadline=None, derandomize=True, max_examples=60)


def patterns_of(tensor):
    views = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}
    return tensor.reshape(-1).view(views[tensor.dtype.itemsize]).numpy()


def sparse(count, sparsity, dtype=torch.float32, seed=0):
    weights = torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 0.05
    kept = weights.abs().argsort(descending=True)[: round(count * (1 - sparsity))]
    return torch.zeros(count).index_copy(0, kept, weights[kept]).to(dtype)


def check_round_trip(patterns, dtype, shape):
    block = pack_tensor(patterns, dtype, shape)
    found, head = unpack_tensor(block)
    assert (head.dtype, head.shape) == (dtype, shape)
    assert found.dtype == patterns.dtype
    assert np.array_equal(found, patterns)
    return block


@pytest.mark.parametrize("dtype", DTYPES)
@quick
@given(data=st.data())
def test_any_bits_come_back(dtype, data):
    """All patterns: NaN with any payload, infinities, -0.0, subnormals; any share of zeros, and few or many values."""
    unsigned = DTYPES[dtype][1]
    last = 2 ** (8 * unsigned.itemsize) - 1
    values = data.draw(st.lists(st.integers(0, last), min_size=1, max_size=300))
    count = data.draw(st.integers(0, 2000))
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    patterns = generator.choice(np.array(values, unsigned), count)
    patterns[generator.random(count) < data.draw(st.sampled_from([0.0, 0.5, 0.9, 0.999]))] = 0
    check_round_trip(patterns, dtype, (count,))


def test_special_values_of_float32_come_back():
    special = np.array([0, 0x80000000, 1, 0x80000001, 0x7F800000, 0xFF800000, 0x7FC00001, 0xFFFFFFFF], "<u4")
    check_round_trip(np.tile(special, 500), "F32", (4, 1000))
    assert unpack_tensor(pack_tensor(np.empty(0, "<u4"), "F32", (0, 7)))[1].shape == (0, 7)
    check_round_trip(np.array([0x3F800000], "<u4"), "F32", ())


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.7, 0.8, 0.9, 0.95])
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "16 values", "float32"])
def test_blocks_are_within_3_percent_of_the_entropy(sparsity, kind):
    weights = sparse(400_000, sparsity, getattr(torch, kind, torch.float32))
    if kind == "16 values":
        levels = torch.linspace(-0.15, 0.15, 16)
        weights = torch.where(weights == 0, 0.0, levels[torch.bucketize(weights, levels).clamp(max=15)])
    patterns = patterns_of(weights)
    dtype = {"bfloat16": "BF16", "float16": "F16"}.get(kind, "F32")
    block = check_round_trip(patterns, dtype, tuple(weights.shape))
    assert 8 * len(block) <= 1.03 * tensor_entropy(patterns)


def test_masks_of_blocks_and_of_n_of_m_take_less_than_independent_ones():
    weights = torch.randn(256, 512).bfloat16()
    by_blocks = weights * (torch.rand(64, 16) < 0.2).repeat_interleave(4, 0).repeat_interleave(32, 1)
    pairs = torch.rand(256, 128, 4).argsort(dim=2) < 2
    for pruned in (by_blocks, weights * pairs.reshape(256, 512)):
        pruned = pruned + 0.0  # -0.0 becomes 0.0
        kept = patterns_of(pruned)[patterns_of(pruned) != 0]
        block = check_round_trip(patterns_of(pruned), "BF16", (256, 512))
        assert 8 * len(block) < tensor_entropy(patterns_of(pruned)) * 0.97
        assert len(block) > kept.size  # values are not lost


def test_negative_zeros_cost_a_bit_each_and_not_a_value():
    weights = sparse(100_000, 0.9, torch.bfloat16)
    signed = torch.where(weights == 0, torch.randn(100_000).sign().bfloat16() * 0, weights)
    assert 0.4 < torch.signbit(signed).float().mean() < 0.6
    plain, block = (check_round_trip(patterns_of(one), "BF16", (100_000,)) for one in (weights, signed))
    assert len(block) - len(plain) <= 90_000 / 8 + 16


def test_a_block_never_has_the_shape_of_its_tensor():
    for count in range(1024, 1400):
        block = pack_tensor(np.zeros(count, "u1"), "U8", (count,))
        assert len(block) != count
    values = np.random.default_rng(0).integers(0, 256, 5000).astype("u1")
    size = len(pack_tensor(values, "U8", (5000,)))
    padded = pack_tensor(values, "U8", (size,) if size == 5000 else (5000,))
    assert len(padded) != 5000


def test_bfloat16_is_rounded_as_torch_does():
    floats = torch.randn(10_000) * torch.logspace(-40, 38, 10_000)
    floats = torch.cat([floats, torch.tensor([float("inf"), -float("inf"), 0.0, -0.0, 3.4e38, 1e-45])])
    ties = torch.arange(0x3F80_0000, 0x3F84_0000, 0x8000, dtype=torch.int32).view(torch.float32)
    for numbers in (floats, ties):
        assert np.array_equal(round_to_bfloat16(patterns_of(numbers)), patterns_of(numbers.bfloat16()))
    nan = round_to_bfloat16(np.array([0x7F800001, 0xFFFFFFFF], "<u4"))
    assert torch.from_numpy(nan).view(torch.bfloat16).isnan().all()


# ---- Hostile blocks ----


def with_checksum(block):
    block = bytearray(block)
    struct.pack_into("<I", block, 12, zlib.crc32(block[16:], zlib.crc32(block[:12])))
    return bytes(block)


BLOCKS = {
    "gaps": pack_tensor(patterns_of(sparse(3000, 0.9)), "F32", (30, 100)),
    "bits": pack_tensor(patterns_of(sparse(3000, 0.5, torch.bfloat16)), "BF16", (3000,)),
    "codes": pack_tensor(patterns_of(torch.round(sparse(3000, 0.8) * 40)), "F32", (3000, 1)),
    "dense": pack_tensor(patterns_of(torch.randn(1500)), "F32", (1500,)),
    "signs": pack_tensor(patterns_of(torch.randn(2000) * (torch.rand(2000) < 0.3)), "F32", (2000,)),
    "rows": pack_rows(*to_rows(torch.randn(20, 90).numpy(), 127), "F32"),
    "rows of bfloat16": pack_rows(*to_rows(torch.randn(90, 20).numpy(), 7), "BF16"),
}


@pytest.mark.parametrize("name", BLOCKS)
@quick
@given(data=st.data())
def test_any_change_of_a_block_is_refused(name, data):
    block = bytearray(BLOCKS[name])
    if data.draw(st.booleans()):
        block[data.draw(st.integers(0, len(block) - 1))] ^= data.draw(st.integers(1, 255))
    else:
        block = block[: data.draw(st.integers(0, len(block) - 1))]
    with pytest.raises(PackedError):
        unpack_tensor(bytes(block))


@pytest.mark.parametrize("name", BLOCKS)
@settings(deadline=None, derandomize=True, max_examples=300)
@given(data=st.data())
def test_a_block_with_lies_and_a_right_checksum_is_refused_or_read_within_its_bounds(name, data):
    block = bytearray(BLOCKS[name])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.one_of(st.integers(4, 70), st.integers(0, len(block) - 1)))
        block[at] = data.draw(st.sampled_from([0, 1, 2, 7, 8, 9, 31, 127, 128, 255]))
    tracemalloc.start()
    with contextlib.suppress(PackedError):
        patterns, head = unpack_tensor(with_checksum(block))
        assert patterns.size == head.weights
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most <= 64 * LARGEST_RATIO * len(block)


def test_a_small_block_does_not_stand_for_a_large_tensor():
    honest = pack_tensor(np.zeros(10_000_000, "<u4"), "F32", (10_000_000,))
    assert 40_000_000 <= LARGEST_RATIO * len(honest) <= 41_000_000
    assert not unpack_tensor(honest)[0].any()
    lying = bytearray(honest)
    struct.pack_into("<Q", lying, 40, 10**15)
    with pytest.raises(PackedError, match=r"expected a packed tensor, got one of shape .* more than 1024 times"):
        read_head(memoryview(with_checksum(lying)))


@pytest.mark.parametrize("rows", [1, 10**12, 2**62, 2**64 - 1])
def test_rows_without_columns_stand_for_no_scales(rows):
    lying = bytearray(BLOCKS["rows"])
    struct.pack_into("<Q", lying, 16, 0)  # no weights
    struct.pack_into("<QQ", lying, 40, rows, 0)
    with pytest.raises(PackedError, match="rows that have no columns"):
        unpack_tensor(with_checksum(lying))


@pytest.mark.parametrize("scale", [float("inf"), float("-inf"), float("nan")])
def test_scales_that_are_no_numbers_are_refused_and_large_ones_give_infinity(scale):
    honest = BLOCKS["rows"]
    at = read_head(memoryview(honest)).size + 9
    lying = bytearray(honest)
    struct.pack_into("<f", lying, at, scale)
    with pytest.raises(PackedError, match="expected scales of rows that are finite"):
        unpack_tensor(with_checksum(lying))
    struct.pack_into("<f", lying, at, 3e38)
    found = torch.from_numpy(unpack_tensor(with_checksum(lying))[0].view("<f4"))
    assert found[:90].isinf().any()
    assert found[90:].isfinite().all()


def test_a_stream_that_decompresses_to_more_is_cut_off():
    bomb = zlib.compressobj(9, zlib.DEFLATED, -15)
    stream = bomb.compress(bytes(200_000_000)) + bomb.flush()
    honest = BLOCKS["dense"]
    at = read_head(memoryview(honest)).size
    after = at + 9 + struct.unpack_from("<BQ", honest, at)[1]
    lying = with_checksum(bytes(honest[:at]) + struct.pack("<BQ", 1, len(stream)) + stream + bytes(honest[after:]))
    tracemalloc.start()
    with pytest.raises(PackedError, match="expected 1500 bytes of values, got more"):
        unpack_tensor(lying)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_another_version_says_to_update():
    block = bytearray(BLOCKS["gaps"])
    block[4] = 2
    with pytest.raises(PackedError, match="version 1, got 2; update hf-prune"):
        unpack_tensor(bytes(block))
