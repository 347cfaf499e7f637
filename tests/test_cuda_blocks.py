"""Decode steps of whole blocks on the CUDA backend through the production path, in Python and in C++; only the last
step, the start of a kernel, is the emulator's."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import tests.test_blocks as blocks
from ptq4arvg.blocks import QuantBlock, QuantHead
from ptq4arvg.nn import Window
from ptq4arvg.protocol import HeadSpec, Modulation
from ptq4arvg_kernels import use_backend
from ptq4arvg_kernels.backends.cuda.plans import BlockPlan, LayerPlan, PackedLayer
from tests.kernels.cuda_cases import device, recorded
from tests.operations import Operations

FEW = ["gemm_norm store", "decode", "gemm gate_residual", "gemm_norm quant", "gemm gate_residual"]
MANY = [
    "adaln_quant",
    "gemm store",
    "decode",
    "gemm gate_residual",
    "adaln_quant",
    "gemm quant",
    "gemm gate_residual",
]
SEVERAL = [*MANY[:2], "qkv_append", "block_attention", *MANY[3:]]


@pytest.fixture(autouse=True)
def aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of widths that are multiples of 16, as all published ones are: others have no plan."""
    for name, value in {"HEAD_DIM": 32, "WIDTH": 64, "HIDDEN": 96}.items():
        monkeypatch.setattr(blocks, name, value)


def _kinds(names: list[str]) -> list[str]:
    """Names of kernels without what a plan chooses by size: bits, tile, head dimension."""
    return [re.sub(r"(_w\d_\d+x\d+_)|(_d\d+$)|(_\d$)", lambda found: " " if found.group(1) else "", n) for n in names]


def _steps(block: QuantBlock, dtype: torch.dtype, batch: int, parts: list[Window]) -> tuple[list[Tensor], Any]:
    """The outputs of windows one after the other, and the cache."""
    x, cache = blocks.stream(batch).to(dtype), block.new_cache(batch, blocks.LENGTH)
    outputs = []
    for part in parts:
        given = blocks.condition(batch, part.positions) if block.adaln is not None else None
        outputs.append(block(x[:, part.positions], given, part, cache))
    return outputs, cache


def _scale(start: int, stop: int) -> Window:
    """Positions that all see each other, and what was before, as a scale of VAR."""
    positions = torch.arange(start, stop)
    return Window(positions, torch.full((stop - start,), stop, dtype=torch.int32), stop)


def _check(block: QuantBlock, dtype: torch.dtype, batch: int, parts: list[Window]) -> list[str]:
    """Outputs and caches are the reference's; returns the kernels of the last window."""
    with use_backend("reference", strict=True):
        want, kept = _steps(block, dtype, batch, parts)
    with device() as emulated, use_backend("cuda", strict=True):
        assert block.prepare()
        assert isinstance(block.plan, BlockPlan)
        _steps(block, dtype, batch, parts[:-1])
        before = len(emulated.records)
        got, cache = _steps(block, dtype, batch, parts)
        names = [record.name for record in emulated.records[before:]]
    assert torch.equal(cache.k, kept.k)
    assert torch.equal(cache.v, kept.v)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    return names[before:]


@blocks.KINDS
@pytest.mark.parametrize(
    ("w_bits", "act_bits", "dtype"), [(8, 8, torch.float16), (6, 8, torch.float32), (6, 6, torch.bfloat16)]
)
def test_steps_equal_the_reference(
    modulated: bool, activation: str, w_bits: int, act_bits: int, dtype: torch.dtype
) -> None:
    block = blocks.make_block(modulated, activation, w_bits, act_bits)
    launched = _check(block, dtype, 3, [blocks.window(0, 3), blocks.window(3, 1), blocks.window(4, 1)])
    modulation = 2 if modulated else 0
    assert _kinds(launched)[modulation:] == FEW


@pytest.mark.parametrize(("w_bits", "activation", "modulated"), [(8, "swiglu", False), (6, "gelu_tanh", True)])
def test_a_large_scale_equals_the_reference(w_bits: int, activation: str, modulated: bool) -> None:
    """140 rows."""
    block = blocks.make_block(modulated, activation, w_bits, 6)
    launched = _check(block, torch.float16, 20, [_scale(0, 1), _scale(1, 8)])
    assert _kinds(launched)[2 if modulated else 0 :] == SEVERAL


@pytest.mark.parametrize("w_bits", [6, 8])
@pytest.mark.parametrize(("batch", "launches"), [(16, FEW), (17, MANY)])
@blocks.KINDS
def test_a_decode_step_is_launches_and_nothing_else(
    modulated: bool, activation: str, batch: int, launches: list[str], w_bits: int
) -> None:
    """No copy, no memset, and nothing that reads a tensor on the host: beside launches, only memory is allocated."""
    block = blocks.make_block(modulated, activation, w_bits)
    part, x = blocks.window(3, 1), blocks.stream(batch)[:, 3].half()
    modulation = torch.randn(2, 6 * blocks.WIDTH).half() if modulated else None
    rows = torch.arange(batch, dtype=torch.int32) % 2 if modulated else None
    cache = block.new_cache(batch, blocks.LENGTH)
    with recorded() as started, use_backend("cuda", strict=True):
        assert block.prepare()
        assert block.plan is not None
        operands = (x, part.positions, part.visible_end, part.span, modulation, rows, cache.k, cache.v)
        block.plan(*operands)  # the first call makes counters
        started.clear()
        with Operations() as operations:
            block.plan(*operands)
    assert _kinds([launch.name for launch in started]) == launches
    # slice: what the emulator is told of the workspace
    assert operations.seen <= {"empty", "empty_like", "slice"}


def test_rows_that_are_not_aligned_go_through_codes() -> None:
    """A product that normalises reads vectors: a modulation at an odd address makes it two launches."""
    block = blocks.make_block()
    part, x = blocks.window(3, 1), blocks.stream(3)[:, 3].half()
    modulation = torch.randn(2, 6 * blocks.WIDTH + 1).half()
    shifted, straight = modulation[:, 1:], modulation[:, 1:].contiguous()
    rows = torch.tensor([0, 1, 0], dtype=torch.int32)
    results = []
    with device() as emulated, use_backend("cuda", strict=True):
        assert block.prepare()
        assert block.plan is not None
        for given in (shifted, straight):
            cache = block.new_cache(3, blocks.LENGTH)
            emulated.records.clear()
            out = block.plan(x, part.positions, part.visible_end, part.span, given, rows, cache.k, cache.v)
            results.append((out, cache.k, _kinds([record.name for record in emulated.records])))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert (results[0][2], results[1][2]) == (MANY, FEW)


@pytest.mark.parametrize("batch", [2, 20])
def test_a_head_equals_the_reference(batch: int) -> None:
    linear = blocks.quant_linear(blocks.WIDTH, 48, 3, 6, 8)
    adaln = blocks.quant_linear(blocks.WIDTH, 2 * blocks.WIDTH, 5, 8, 8, "silu")
    spec = HeadSpec("h", "h.n", Modulation("h.ada", 2, 0, 1, None), "h.l")
    head = QuantHead(spec, blocks.norm(blocks.WIDTH, 10), adaln, linear)
    part = blocks.window(3, 1)
    x, given = blocks.stream(batch)[:, 3:4], blocks.condition(batch, part.positions)
    with use_backend("reference", strict=True):
        want = head(x, given, part.positions)
    with device() as emulated, use_backend("cuda", strict=True):
        assert head.prepare()
        assert isinstance(head.plan, LayerPlan)
        got = head(x, given, part.positions)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    own = ["gemm_norm store"] if batch == 2 else ["adaln_quant", "gemm store"]
    assert _kinds([record.name for record in emulated.records]) == ["quantize", "gemm store", *own]


def test_widths_without_a_plan_are_served_by_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HEAD_DIM": 20, "WIDTH": 40, "HIDDEN": 52}.items():
        monkeypatch.setattr(blocks, name, value)
    block, part = blocks.make_block(), blocks.window(0, 2)
    x, given = blocks.stream(2)[:, :2], blocks.condition(2, part.positions)
    with use_backend("reference", strict=True):
        want = block(x, given, part)
    with device(), use_backend("cuda", strict=True):
        assert not block.prepare()
        torch.testing.assert_close(block(x, given, part), want, rtol=1e-6, atol=1e-6)


def test_a_plan_leaves_its_calls_to_the_operators_under_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    block = blocks.make_block()
    part = blocks.window(0, 1)
    x = blocks.stream(2)[:, :1]
    x[1, 0, 5] = float("nan")
    monkeypatch.setenv("PTQ4ARVG_DEBUG", "1")
    with device(), use_backend("cuda", strict=True):
        assert block.prepare()
        with pytest.raises(ValueError, match="adaln_quant: cannot quantize nan"):
            block(x, blocks.condition(2, part.positions), part)


def test_wrong_metadata_is_an_error() -> None:
    """Nothing is started."""
    block, part = blocks.make_block(), blocks.window(3, 1)
    x, cache = blocks.stream(4)[:, 3].half(), block.new_cache(4, blocks.LENGTH)
    modulation, rows = torch.randn(2, 6 * blocks.WIDTH).half(), torch.tensor([0, 1, 0, 1], dtype=torch.int32)
    good: dict[str, Any] = {
        "x": x,
        "positions": part.positions,
        "visible_end": part.visible_end,
        "span": part.span,
        "modulation": modulation,
        "modulation_rows": rows,
        "k_cache": cache.k,
        "v_cache": cache.v,
    }
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"x": x[:, :-1]}, "x has size 63"),
        ({"x": x.t().contiguous().t()}, "x is not contiguous"),
        ({"positions": torch.arange(3)}, "M = 4 rows is not a multiple of P = 3"),
        ({"visible_end": torch.tensor([4])}, "visible_end has dtype int64"),
        ({"span": blocks.LENGTH + 1}, "span is 10, expected 1 to 9"),
        ({"modulation": None}, "modulation is missing"),
        ({"modulation": modulation[:, :-1]}, "expected one or more rows of 6 chunks of 64"),
        ({"modulation_rows": None}, "modulation has 2 rows for M = 4"),
        ({"modulation_rows": rows.long()}, "modulation rows has dtype int64"),
        ({"k_cache": cache.k[:3]}, "k_cache has size 3"),
        ({"v_cache": cache.v[:, :, 1:]}, "k_cache has 9 slots, v_cache 8"),
        ({"k_cache": cache.k.transpose(2, 3).contiguous().transpose(2, 3)}, "slots of k_cache are not contiguous"),
    ]
    with recorded() as started, use_backend("cuda", strict=True):
        assert block.prepare()
        assert block.plan is not None
        for change, words in wrong:
            with pytest.raises((ValueError, TypeError), match=re.escape(words)):
                block.plan(**(good | change))
    assert not started


@pytest.mark.parametrize("w_bits", [6, 8])
@pytest.mark.parametrize("paired", [False, True])
def test_stored_weights_come_back(w_bits: int, paired: bool) -> None:
    layer = blocks.quant_linear(70, 54, 3, w_bits)
    operands = (layer.w_scale, layer.col_sums, layer.bias, layer.table, paired)
    packed = PackedLayer(layer.qweight, w_bits, 70, *operands)
    assert torch.equal(packed.qweight(), layer.qweight)
