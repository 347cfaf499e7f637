"""Decode steps of whole blocks on the Triton backend through the production path; only the last step, the start of a
kernel, is the emulator's (or the interpreter's)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tests.test_blocks as blocks
from ptq4arvg.blocks import QuantBlock
from ptq4arvg_kernels import use_backend

pytest.importorskip("triton")

from ptq4arvg_kernels.backends.triton import launch
from ptq4arvg_kernels.backends.triton.plans import BlockPlan, PackedLayer
from tests.kernels.triton_cases import device, recorded
from tests.operations import Operations

LAUNCHES = ["adaln_quant_kernel", "gemm", "decode_kernel", "gemm", "adaln_quant_kernel", "gemm", "gemm"]
MODULATION = ["quantize_kernel", "gemm"]


@pytest.fixture
def aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of widths that are multiples of 16, as all published ones are: others are copied before a product."""
    for name, value in {"HEAD_DIM": 32, "WIDTH": 64, "HIDDEN": 96}.items():
        monkeypatch.setattr(blocks, name, value)


def _names(launches: list[launch.Launch]) -> list[str]:
    return [started.kernel.fn.__name__ for started in launches]


def _steps(block: QuantBlock, dtype: torch.dtype, batch: int = 3) -> tuple[list[Tensor], Any]:
    """A prefix of three tokens, then two single ones; their outputs, and the cache."""
    x, cache = blocks.stream(batch).to(dtype), block.new_cache(batch, blocks.LENGTH)
    outputs = []
    for start, length in ((0, 3), (3, 1), (4, 1)):
        part = blocks.window(start, length)
        given = blocks.condition(batch, part.positions) if block.adaln is not None else None
        outputs.append(block(x[:, start : start + length], given, part, cache))
    return outputs, cache


@blocks.KINDS
@pytest.mark.parametrize(
    ("w_bits", "act_bits", "dtype"), [(8, 8, torch.float16), (6, 8, torch.float32), (6, 6, torch.bfloat16)]
)
def test_steps_equal_the_reference(
    modulated: bool, activation: str, w_bits: int, act_bits: int, dtype: torch.dtype
) -> None:
    block = blocks.make_block(modulated, activation, w_bits, act_bits)
    with use_backend("reference", strict=True):
        want, kept = _steps(block, dtype)
    with device(), use_backend("triton", strict=True):
        assert block.prepare()
        assert isinstance(block.plan, BlockPlan)
        got, cache = _steps(block, dtype)
    assert torch.equal(cache.k, kept.k)
    assert torch.equal(cache.v, kept.v)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.usefixtures("aligned")
@blocks.KINDS
@pytest.mark.parametrize("w_bits", [6, 8])
def test_a_decode_step_is_seven_launches_and_nothing_else(modulated: bool, activation: str, w_bits: int) -> None:
    """No copy, no memset, and nothing that reads a tensor on the host: beside launches, only memory is allocated."""
    block = blocks.make_block(modulated, activation, w_bits)
    part, x = blocks.window(3, 1), blocks.stream(3)[:, 3].half()
    modulation = torch.randn(2, 6 * blocks.WIDTH).half() if modulated else None
    rows = torch.tensor([0, 1, 0], dtype=torch.int32) if modulated else None
    cache = block.new_cache(3, blocks.LENGTH)
    with recorded() as launches, use_backend("triton", strict=True):
        assert block.prepare()
        assert block.plan is not None
        operands = (x, part.positions, part.visible_end, part.span, modulation, rows, cache.k, cache.v)
        block.plan(*operands)  # the first call makes counters
        launches.clear()
        with Operations() as operations:
            block.plan(*operands)
    assert _names(launches) == LAUNCHES
    assert operations.seen <= {"empty", "new_empty", "empty_like", "slice"}


@pytest.mark.usefixtures("aligned")
def test_modulation_is_two_launches_for_all_rows() -> None:
    block = blocks.make_block()
    part = blocks.window(3, 1)
    with recorded() as launches, use_backend("triton", strict=True):
        assert block.prepare()
        block(blocks.stream(4)[:, 3:4], blocks.condition(4, part.positions), part, block.new_cache(4, blocks.LENGTH))
    assert _names(launches) == MODULATION + LAUNCHES


def test_a_plan_leaves_its_calls_to_the_operators_under_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    block = blocks.make_block()
    part = blocks.window(0, 1)
    x = blocks.stream(2)[:, :1]
    x[1, 0, 5] = float("nan")
    monkeypatch.setenv("PTQ4ARVG_DEBUG", "1")
    with device(), use_backend("triton", strict=True):
        assert block.prepare()
        with pytest.raises(ValueError, match="adaln_quant: cannot quantize nan"):
            block(x, blocks.condition(2, part.positions), part)


@pytest.mark.parametrize("w_bits", [6, 8])
@pytest.mark.parametrize("paired", [False, True])
def test_stored_weights_come_back(w_bits: int, paired: bool) -> None:
    layer = blocks.quant_linear(70, 54, 3, w_bits)
    operands = (layer.w_scale, layer.col_sums, layer.bias, layer.table, paired)
    packed = PackedLayer(layer.qweight, w_bits, 70, *operands)
    assert torch.equal(packed.qweight(), layer.qweight)
