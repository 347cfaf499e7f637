"""The CPU backend's weights: their order in memory, the cache of it, the longest sums, every number of rows."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch

import ptq4arvg_kernels as kernels
from ptq4arvg_kernels.backends.cpu import native, weights
from ptq4arvg_kernels.packing import MAX_IN_FEATURES, column_sums, pack
from ptq4arvg_kernels.tables import make_table
from tests.kernels.cpu_cases import running, threads
from tests.kernels.kernel_cases import LinearCase, generator, instruction_sets, linear_case

pytestmark = pytest.mark.skipif(not instruction_sets(), reason=f"no CPU backend: {native.WHY_NOT}")


def _weights(out_features: int, in_features: int, bits: int, seed: int = 0) -> torch.Tensor:
    top = 2 ** (bits - 1) - 1
    return torch.randint(-top, top + 1, (out_features, in_features), generator=generator(seed)).to(torch.int8)


def _integers(case: LinearCase) -> np.ndarray:
    return kernels.linear(*case.operands, "none", torch.float32).numpy()


@pytest.mark.sanitize
@pytest.mark.parametrize("bits", [6, 8])
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("out_features", [2, 16, 30, 34, 130])
@pytest.mark.parametrize("in_features", [1, 31, 32, 33, 515])
def test_panels_round_trip(bits: int, paired: bool, out_features: int, in_features: int) -> None:
    qweight = pack(_weights(out_features - (not paired), in_features, bits), bits)
    one = weights.pack_panels(qweight, bits, in_features, paired)
    with threads(3):
        panels = weights.pack_panels(qweight, bits, in_features, paired)
        assert one is not None
        assert panels is not None
        assert torch.equal(panels, one)
        assert panels.numel() == native.module().packed_bytes(len(qweight), in_features, bits, paired)
        assert torch.equal(weights.unpack_panels(panels, len(qweight), bits, in_features, paired), qweight)


def test_no_channels() -> None:
    panels = weights.pack_panels(torch.empty(0, 32, dtype=torch.uint8), 8, 32)
    assert panels is not None
    assert panels.numel() == 0
    assert weights.unpack_panels(panels, 0, 8, 32).shape == (0, 32)


def test_panels_follow_writes_to_the_weight(backend: str) -> None:
    if not backend.startswith("cpu"):
        pytest.skip("has no panels")
    case = linear_case(5, 18, 70, 8, [8], bias=False, unit=True)
    assert np.array_equal(_integers(case), case.corrected().astype(np.float32))
    qweight = case.operands[2]
    first = weights.panels_of(qweight, 8, 70)
    assert weights.panels_of(qweight, 8, 70) is first
    other = LinearCase(case.codes, -case.weight, 8, case.w_scale, None, case.table, case.positions)
    qweight.copy_(pack(other.weight, 8))
    operands = (*case.operands[:6], column_sums(other.weight), *case.operands[7:])
    got = kernels.linear(*operands, "none", torch.float32).numpy()
    assert np.array_equal(got, other.corrected().astype(np.float32))
    assert weights.panels_of(qweight, 8, 70) is not first


def test_panels_die_with_their_weight() -> None:
    qweight = pack(_weights(20, 40, 6), 6)
    panels = weights.panels_of(qweight, 6, 40)
    assert panels is not None
    assert weights.panels_of(qweight, 6, 40, paired=True) is not panels
    alive = weakref.ref(panels)
    gc.collect()  # weights of other tests
    entries = len(weights._CACHE)
    del panels
    gc.collect()
    assert alive() is not None
    del qweight
    gc.collect()
    assert alive() is None
    assert len(weights._CACHE) == entries - 1


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        qweight = pack(_weights(20, 40, 6), 6)
        assert weights.panels_of(qweight, 6, 40) is weights.panels_of(qweight, 6, 40)


@pytest.mark.parametrize("bits", [6, 8])
@pytest.mark.parametrize("where", ["code", "padding"])
def test_corrupt_bytes(backend: str, bits: int, where: str) -> None:
    case = linear_case(3, 18, 33, bits, [8])
    qweight = case.operands[2]
    qweight[17, {6: 3, 8: 5}[bits] if where == "code" else -1] = {
        ("code", 6): 0,
        ("code", 8): 0x80,
        ("padding", 6): 0xFF,
        ("padding", 8): 1,
    }[where, bits]
    with pytest.raises(ValueError, match=r"row 17.*corrupt"):
        kernels.linear(*case.operands, "none", torch.float32)
    assert weights.pack_panels(qweight, bits, 33) is None


@pytest.mark.parametrize("width", [8703, MAX_IN_FEATURES])
@pytest.mark.parametrize(("w_bits", "act_bits"), [(8, [8]), (8, [6]), (6, [8]), (6, [6]), (6, [8, 6]), (6, [6, 6, 8])])
@pytest.mark.parametrize("rows", [2, 13])
def test_longest_sums(backend: str, width: int, w_bits: int, act_bits: list[int], rows: int) -> None:
    """All codes at their ends, of one sign: no 16-bit sum on the way may overflow, also where a row has more bits
    than its neighbours."""
    period = len(act_bits)
    half = torch.tensor([2 ** (b - 1) for b in act_bits])[torch.arange(rows) % period]
    low = torch.arange(rows) % 2 == 0
    codes = torch.where(low, -half, half - 1)[:, None].expand(rows, width).to(torch.int8).contiguous()
    top = 2 ** (w_bits - 1) - 1
    weight = torch.full((17, width), top, dtype=torch.int8)
    weight[::3] = -top
    table = make_table(torch.ones(period), [2**b - 1 for b in act_bits], act_bits, torch.arange(period))
    if rows % period:
        positions = torch.arange(rows) % period
    else:
        positions = torch.arange(period)
    case = LinearCase(codes, weight, w_bits, torch.ones(17), None, table, positions)
    assert np.array_equal(_integers(case), case.corrected().astype(np.float32))


@pytest.mark.parametrize(("w_bits", "act_bits"), [(8, [8]), (6, [8]), (6, [6])], ids=["W8A8", "W6A8", "W6A6"])
def test_rows_across_tiles(backend: str, w_bits: int, act_bits: list[int]) -> None:
    for rows in [*range(1, 31), 100, 257, 1000]:
        case = linear_case(rows, 35, 70, w_bits, act_bits, seed=rows, bias=False, unit=True)
        assert np.array_equal(_integers(case), case.corrected().astype(np.float32)), rows


@pytest.mark.parametrize("w_bits", [6, 8])
def test_rows_across_chunks(backend: str, w_bits: int) -> None:
    """More activations than fit into the second-level cache, the last tile of each kind ragged."""
    case = linear_case(723, 83, 3001, w_bits, [8], bias=False, unit=True)
    assert np.array_equal(_integers(case), case.corrected().astype(np.float32))


@pytest.mark.parametrize("instruction_set", instruction_sets())
@pytest.mark.parametrize("bits", [6, 8])
def test_many_rows_of_a_small_layer(instruction_set: str, bits: int) -> None:
    case = linear_case(20000, 5, 33, bits, [6], period=4, bias=False, unit=True)
    want = case.corrected().astype(np.float32)
    out_table = make_table(1.0, 128, 8, torch.zeros(7, dtype=torch.int64))
    with running(instruction_set):
        for count in (1, 2):
            with threads(count):
                assert np.array_equal(_integers(case), want)
                codes, sums = kernels.linear_quant(*case.operands, "none", out_table)
                assert np.array_equal(codes.numpy(), want.clip(-128, 127))
                assert torch.equal(sums, codes.sum(1, dtype=torch.int32))
