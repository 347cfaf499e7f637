"""``quantize`` and ``adaln_quant`` of the Triton backend: compiled for sm_80 and emulated, or interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ptq4arvg_kernels as kernels
from tests.kernels.kernel_cases import random_table

pytest.importorskip("triton")

from ptq4arvg_kernels.backends.triton import quantize, rows, support
from tests.kernels.row_cases import MODEL_WIDTHS, adaln_case, adaln_reference, same_codes
from tests.kernels.triton_cases import (
    barriers,
    compiled_ptx,
    device,
    distinct_bytes,
    edited,
    recorded,
    sector_efficiency,
    without_barrier,
)
from tests.ptxsim import HazardError, MemFault

compiled = pytest.mark.skipif(support.interpreted(), reason="looks at the compiled kernel")


def _run(args: tuple[Any, ...], **options: Any) -> tuple[Tensor, Tensor]:
    with device(**options), kernels.use_backend("triton", strict=True):
        return kernels.adaln_quant(*args)


@pytest.mark.parametrize("width", [*MODEL_WIDTHS, 1, 127, 128, 513, 2049, 4097, 8704])
def test_widths(width: int) -> None:
    dtype = (torch.float16, torch.bfloat16, torch.float32)[width % 3]
    args = adaln_case(width, dtype)
    same_codes(_run(args), adaln_reference(args))


@compiled
@pytest.mark.parametrize("width", MODEL_WIDTHS)
def test_one_pass_over_memory(width: int) -> None:
    """x, scale, shift and the codes move once; what a row needs besides is 1 % of it."""
    args = adaln_case(width, torch.float16, count=2)
    with device() as emulated:
        quantize.adaln_quant(*args)
    assert emulated is not None
    result = emulated.records[0].result
    least = 2 * (width * (2 + 2 + 2 + 1) + 4)
    assert least <= distinct_bytes(result) <= 1.02 * least
    assert sector_efficiency(result) >= 0.95
    assert result.metrics()["bank_conflict_factor"] == 1.0


def test_lanes_are_not_wasted() -> None:
    for width in MODEL_WIDTHS:
        warps, chunk, chunks = quantize.row_blocks(width)
        assert chunk == 128 * warps
        assert width <= chunk * chunks <= 1.13 * width


def test_extreme_codes_and_sums() -> None:
    table = random_table(3, [8, 6], 0)
    x = torch.tensor([[3e38], [-3e38]]).repeat(1, 8704)
    with device(), kernels.use_backend("triton", strict=True):
        for position, (low, high) in enumerate([(-128, 127), (-32, 31)]):
            codes, sums = kernels.quantize(x, table, torch.tensor([position]))
            assert codes[0].unique().tolist() == [high]
            assert codes[1].unique().tolist() == [low]
            assert sums.tolist() == [8704 * high, 8704 * low]


def test_nan_becomes_the_lowest_code() -> None:
    x = torch.full((1, 40), float("nan"))
    with device(), kernels.use_backend("triton", strict=True):
        codes, _ = kernels.quantize(x, random_table(2, [6], 0), torch.tensor([1]))
    assert codes.unique().tolist() == [-32]


def test_wrong_indices_stay_inside() -> None:
    """The emulator stops at an access outside an operand; the results are those of the nearest index."""
    args = list(adaln_case(331, torch.float32))
    for position, nearest in ((9, 8), (-1, 0), (2**40, 8)):
        wrong, right = ([*args[:10], torch.tensor([p])] for p in (position, nearest))
        assert torch.equal(_run(tuple(wrong))[0], _run(tuple(right))[0])
    wrong, right = list(args), list(args)
    wrong[7] = torch.tensor([3, -1, 1, 2**30], dtype=torch.int32)
    right[7] = torch.tensor([2, 0, 1, 2], dtype=torch.int32)
    assert torch.equal(_run(tuple(wrong))[0], _run(tuple(right))[0])


def test_an_empty_table_is_refused() -> None:
    """There is no row that an index could be clamped to."""
    args = adaln_case(40, torch.float32)
    with device(), kernels.use_backend("triton", strict=True):
        with pytest.raises(IndexError, match="quantize: table has no rows"):
            kernels.quantize(args[0], torch.empty(0, 4), args[10])
        with pytest.raises(IndexError, match="adaln_quant: mod_scale has no rows"):
            kernels.adaln_quant(*args[:5], torch.empty(0, 40), torch.empty(0, 40), *args[7:])


def test_too_wide_rows_are_declined() -> None:
    with (
        device(),
        kernels.use_backend("triton", strict=True),
        pytest.raises(kernels.BackendError, match="8704 columns"),
    ):
        kernels.quantize(torch.zeros(1, 8705), random_table(1, [8], 0), torch.tensor([0]))


@compiled
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_compiles(capability: int) -> None:
    args = adaln_case(1280, torch.bfloat16)
    with recorded() as launches:
        quantize.adaln_quant(*args)
        quantize.quantize(args[0], args[9], args[10], "gelu_erf")
    for launched in launches:
        assert f".target sm_{capability}" in compiled_ptx(launched, capability)


# --- planted bugs -----------------------------------------------------------------------------------------------------

LOAD_MASK = ", mask=i * CHUNK + lane < WIDTH, other=0.0"
STORE_MASK = ", mask=i * CHUNK + lane < WIDTH"


@compiled
@pytest.mark.parametrize(("helper", "mask"), [("load_chunk", LOAD_MASK), ("store_codes", STORE_MASK)])
def test_a_dropped_mask_is_found(monkeypatch: pytest.MonkeyPatch, helper: str, mask: str) -> None:
    args = adaln_case(331, torch.float32)
    _run(args)
    broken = edited(getattr(rows, helper), mask, "")
    kernel = edited(quantize.adaln_quant_kernel, "CENTRE", "CENTRE", **{helper: broken})
    monkeypatch.setattr(quantize, "adaln_quant_kernel", kernel)
    with pytest.raises(MemFault, match="out-of-bounds"):
        _run(args)


@compiled
def test_statistics_over_idle_lanes_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    args = adaln_case(331, torch.float32)
    kernel = edited(quantize.adaln_quant_kernel, "inside(c - mean, i, lane, WIDTH, CHUNK)", "c - mean")
    monkeypatch.setattr(quantize, "adaln_quant_kernel", kernel)
    with pytest.raises(AssertionError):
        same_codes(_run(args), adaln_reference(args))


@compiled
def test_a_deleted_barrier_is_found() -> None:
    """Every one of them."""
    args = adaln_case(1280, torch.float16)
    with device() as emulated:
        quantize.adaln_quant(*args)
    assert emulated is not None
    count = barriers(emulated.records[0].compiled.ptx)
    assert count >= 3
    for which in range(count):
        with pytest.raises(HazardError, match="race"):
            _run(args, transform=without_barrier(which))
