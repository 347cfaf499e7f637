"""``quantize`` and ``adaln_quant`` against float64, and the exact law of the quantizer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import ptq4arvg_kernels as kernels
from ptq4arvg_kernels.tables import make_table, row_parameters
from tests.kernels.kernel_cases import (
    activation64,
    assert_codes,
    assert_row_sums,
    generator,
    random_table,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@given(
    hnp.arrays("float32", st.tuples(st.integers(0, 3), st.integers(1, 9)), elements=st.floats(-1e4, 1e4, width=32)),
    st.sampled_from([6, 8]),
    st.floats(1e-3, 1e2),
    st.integers(0, 255),
)
def test_reference_is_the_law_bit_for_bit(values: np.ndarray, bits: int, delta: float, zero: int) -> None:
    table = make_table(delta, min(zero, 2**bits - 1), bits, [0])
    _, recip, zq, _ = table[0].numpy()
    with kernels.use_backend("reference", strict=True):
        codes, sums = kernels.quantize(torch.from_numpy(values), table, torch.tensor([0]))
    expected = np.clip(np.rint(values * recip) + zq, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert np.array_equal(codes.numpy(), expected)
    assert_row_sums(codes, sums)


def test_ties_round_to_even(backend: str) -> None:
    table = make_table(1.0, 128, 8, [0])
    x = torch.tensor([[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5]])
    codes, sums = kernels.quantize(x, table, torch.tensor([0]))
    assert codes.tolist() == [[-2, -2, 0, 0, 2, 2, 4]]
    assert sums.tolist() == [4]


def test_reference_multiplies_by_the_reciprocal() -> None:
    """Near ties ``x * recip`` and ``x / delta`` differ; the law is the product, one float32 multiply."""
    gen = generator(0)
    delta = 0.01 + torch.rand(500, generator=gen)
    table = make_table(delta, 128, 8, torch.arange(500))
    ties = (torch.arange(-100, 100) + 0.5) * delta[:, None]
    product, quotient = torch.round(ties * table[:, 1:2]), torch.round(ties / delta[:, None])
    assert (product != quotient).any()
    with kernels.use_backend("reference", strict=True):
        codes, _ = kernels.quantize(ties, table, torch.arange(500))
    assert torch.equal(codes.float(), product)


def test_saturation_is_not_an_error(backend: str) -> None:
    table = make_table([1e-30, 1e-30], [0, 63], [8, 6], [0, 1])
    x = torch.tensor([[3e38, -3e38, 1e9, -1e9]]).repeat(2, 1)  # x * recip overflows to infinity: still a clamp
    codes, _ = kernels.quantize(x, table, torch.tensor([0, 1], dtype=torch.int32))
    assert codes.tolist() == [[127, -128, 127, -128], [31, -32, 31, -32]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["none", "silu", "gelu_erf", "gelu_tanh"])
def test_quantize_against_float64(backend: str, dtype: torch.dtype, activation: str, gen: torch.Generator) -> None:
    table = random_table(9, [6, 8, 8], seed=3)
    positions = torch.tensor([7, 0, 2, 4], dtype=torch.int32)
    x = (2 * torch.randn(12, 333, generator=gen)).to(dtype)
    codes, sums = kernels.quantize(x, table, positions, activation)
    assert_codes(codes, activation64(x.double().numpy(), activation), row_parameters(table, positions, 12).numpy())
    assert_row_sums(codes, sums)


def _normalized(x: np.ndarray, kind: str, eps: float) -> np.ndarray:
    if kind == "layer":
        return (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + eps)
    return x / np.sqrt((x**2).mean(1, keepdims=True) + eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm_kind", ["layer", "rms"])
@pytest.mark.parametrize("affine", ["none", "weight", "both", "bias"])
@pytest.mark.parametrize("modulation", ["none", "rows", "per_sample"])
def test_adaln_against_float64(
    backend: str, dtype: torch.dtype, norm_kind: str, affine: str, modulation: str, gen: torch.Generator
) -> None:
    batch, period, width = 3, 5, 176
    rows = batch * period
    table = random_table(8, [8, 6], seed=5, step=0.05)
    positions = torch.tensor([6, 1, 0, 3, 7])
    x = (3 * torch.randn(rows, width, generator=gen) + 1).to(dtype)
    weight = torch.randn(width, generator=gen) if affine in ("weight", "both") else None
    bias = torch.randn(width, generator=gen) if affine in ("bias", "both") else None
    scale = shift = index = None
    offset = 1.0
    if modulation != "none":
        count = rows if modulation == "rows" else batch
        # Chunks of one wide conditioning tensor, as the models make them: rows are 6 * width apart.
        chunks = torch.randn(count, 6 * width, generator=gen).to(dtype).chunk(6, dim=1)
        scale, shift = chunks[1], chunks[4]
        assert not scale.is_contiguous()
        if modulation == "per_sample":
            index = (torch.arange(rows) // period).to(torch.int32)
            offset = 0.0
    codes, sums = kernels.adaln_quant(x, norm_kind, 1e-6, weight, bias, scale, shift, index, offset, table, positions)
    y = _normalized(x.double().numpy(), norm_kind, 1e-6)
    if weight is not None:
        y = y * weight.double().numpy()
    if bias is not None:
        y = y + bias.double().numpy()
    if scale is not None and shift is not None:
        pick = np.arange(rows) if index is None else np.arange(rows) // period
        y = y * (offset + scale.double().numpy()[pick]) + shift.double().numpy()[pick]
    assert_codes(codes, y, row_parameters(table, positions, rows).numpy())
    assert_row_sums(codes, sums)


def test_rows_do_not_depend_on_their_batch(backend: str, gen: torch.Generator) -> None:
    """A token decoded alone gets the codes it gets inside a block."""
    table = random_table(20, [8, 6, 8], seed=1)
    x = torch.randn(20, 331, generator=gen)
    scale, shift = torch.randn(2, 20, 331, generator=gen)
    positions = torch.arange(20)
    block, _ = kernels.adaln_quant(x, "layer", 1e-6, None, None, scale, shift, None, 1.0, table, positions)
    acted, _ = kernels.quantize(x, table, positions, "gelu_tanh")
    for i in range(20):
        one = slice(i, i + 1)
        alone, _ = kernels.adaln_quant(
            x[one], "layer", 1e-6, None, None, scale[one], shift[one], None, 1.0, table, positions[one]
        )
        assert torch.equal(alone, block[one])
        assert torch.equal(kernels.quantize(x[one], table, positions[one], "gelu_tanh")[0], acted[one])


def test_zero_rows(backend: str) -> None:
    table = random_table(4, [8], seed=0)
    for positions in (torch.tensor([1, 2]), torch.tensor([], dtype=torch.int64)):
        codes, sums = kernels.quantize(torch.empty(0, 7), table, positions)
        assert codes.shape == (0, 7)
        assert sums.shape == (0,)
        codes, sums = kernels.adaln_quant(
            torch.empty(0, 7), "rms", 1e-6, None, None, None, None, None, 1.0, table, positions
        )
        assert codes.shape == (0, 7)
        assert sums.shape == (0,)


def test_non_contiguous_inputs(backend: str, gen: torch.Generator) -> None:
    table = random_table(6, [8, 6], seed=2)
    strided_table = torch.stack([table, table], dim=1)[:, 1]
    positions = torch.arange(12)[::2].flip(0)[:6] // 2
    wide = torch.randn(9, 12, generator=gen)
    x = wide.t()[:, 2:7]
    assert not x.is_contiguous()
    assert not strided_table.is_contiguous()
    got = kernels.quantize(x, strided_table, positions)
    want = kernels.quantize(x.contiguous(), table, positions.contiguous())
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    # Modulation whose last stride is not 1 is copied, expanded modulation is not.
    scale, shift = torch.randn(2, 5, 12, generator=gen).transpose(1, 2).unbind(0)
    a = kernels.adaln_quant(x, "rms", 1e-6, None, None, scale, shift, None, 1.0, table, positions)
    b = kernels.adaln_quant(
        x, "rms", 1e-6, None, None, scale.contiguous(), shift.contiguous(), None, 1.0, table, positions
    )
    assert torch.equal(a[0], b[0])
    one = torch.randn(1, 5, generator=gen).expand(12, 5)
    c = kernels.adaln_quant(x, "rms", 1e-6, None, None, one, one, None, 1.0, table, positions)
    d = kernels.adaln_quant(x, "rms", 1e-6, None, None, one.clone(), one.clone(), None, 1.0, table, positions)
    assert torch.equal(c[0], d[0])


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_reference_refuses_non_finite_values(poison: float) -> None:
    table = random_table(4, [8], seed=0)
    x = torch.randn(4, 6, generator=generator(0))
    x[2, 5] = poison
    with kernels.use_backend("reference", strict=True):
        with pytest.raises(ValueError, match=rf"quantize: cannot quantize {poison}.*index \[2, 5\].*float16"):
            kernels.quantize(x, table, torch.arange(4))
        with pytest.raises(ValueError, match="adaln_quant: cannot quantize nan"):
            kernels.adaln_quant(x, "layer", 1e-6, None, None, None, None, None, 1.0, table, torch.arange(4))
