"""The linear family: exact integers, the float law, every epilogue against float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ptq4arvg_kernels as kernels
from ptq4arvg_kernels.tables import make_table
from tests.kernels.kernel_cases import (
    LinearCase,
    activation64,
    activation_torch,
    assert_as_good_as,
    assert_codes,
    assert_row_sums,
    generator,
    linear_case,
    random_table,
)

WIDTHS = [(8, [8]), (6, [8]), (6, [6]), (6, [8, 6, 6, 6]), (8, [6, 8])]
WIDTH_NAMES = ["W8A8", "W6A8", "W6A6", "W6A6-sinks", "W8-mixed"]
ACTIVATIONS = ["none", "silu", "gelu_erf", "gelu_tanh"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _integers(case: LinearCase) -> np.ndarray:
    """With unit scales and no bias, a float32 output is the corrected integer, rounded once."""
    return kernels.linear(*case.operands, "none", torch.float32).numpy()


@pytest.mark.parametrize(("w_bits", "act_bits"), WIDTHS, ids=WIDTH_NAMES)
@pytest.mark.parametrize("extreme", [False, True], ids=["random", "extreme"])
@pytest.mark.parametrize(
    ("rows", "out_features", "in_features", "period"),
    [(1, 1, 1, 1), (3, 5, 33, 3), (4, 17, 496, 4), (12, 31, 1027, 4), (2, 8, 8704, 2), (129, 24, 64, 3)],
)
def test_integers_are_exact(
    backend: str,
    w_bits: int,
    act_bits: list[int],
    extreme: bool,
    rows: int,
    out_features: int,
    in_features: int,
    period: int,
) -> None:
    case = linear_case(
        rows, out_features, in_features, w_bits, act_bits, period=period, extreme=extreme, bias=False, unit=True
    )
    assert np.array_equal(_integers(case), case.corrected().astype(np.float32))


@given(
    st.sampled_from(WIDTHS),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 20),
    st.integers(1, 200),
    st.booleans(),
    st.integers(0, 2**20),
)
def test_integers_are_exact_for_any_shape(
    widths: tuple[int, list[int]], batch: int, period: int, out_features: int, in_features: int, ends: bool, seed: int
) -> None:
    w_bits, act_bits = widths
    case = linear_case(
        batch * period, out_features, in_features, w_bits, act_bits, seed, period, ends, bias=False, unit=True
    )
    assert np.array_equal(_integers(case), case.corrected().astype(np.float32))


def test_every_row_count(backend: str) -> None:
    """No edge between row counts: M from 1 to 129."""
    full = linear_case(129, 7, 40, 6, [6], bias=False, unit=True)
    expected = full.corrected().astype(np.float32)
    for rows in range(1, 130):
        part = dataclasses.replace(full, codes=full.codes[:rows])
        assert np.array_equal(_integers(part), expected[:rows])


def test_largest_zero_point_term(backend: str) -> None:
    """K = 8704 with all codes at their ends and the largest zero points: the correction must not wrap."""
    width = 8704
    table = make_table([1.0, 1.0], [0, 255], 8, [0, 1])
    codes = torch.tensor([127, -128], dtype=torch.int8)[:, None].expand(2, width).contiguous()
    weight = torch.full((2, width), 127, dtype=torch.int8)
    weight[1] = -127
    case = LinearCase(codes, weight, 8, torch.ones(2), None, table, torch.tensor([0, 1]))
    assert case.corrected().tolist() == [
        [255 * 127 * width, -255 * 127 * width],
        [-255 * 127 * width, 255 * 127 * width],
    ]
    assert np.array_equal(_integers(case), case.corrected().astype(np.float32))


@pytest.mark.parametrize("bias", [False, True])
def test_reference_float_law_bit_for_bit(bias: bool) -> None:
    """``(delta * s_j) * float(acc - zq C_j) + b_j``: float32, in this order, one rounding each."""
    case = linear_case(24, 50, 700, 8, [8, 6], period=8, bias=bias)
    delta = case.row_table(case.table)[:, 0].astype(np.float32)
    expected = (delta[:, None] * case.w_scale.numpy()[None, :]) * case.corrected().astype(np.float32)
    if case.bias is not None:
        expected = expected + case.bias.numpy()
    with kernels.use_backend("reference", strict=True):
        got = kernels.linear(*case.operands, "none", torch.float32)
    assert np.array_equal(got.numpy(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("w_bits", "act_bits"), WIDTHS[:4], ids=WIDTH_NAMES[:4])
def test_linear(backend: str, dtype: torch.dtype, activation: str, w_bits: int, act_bits: list[int]) -> None:
    case = linear_case(12, 45, 300, w_bits, act_bits, period=6)
    got = kernels.linear(*case.operands, activation, dtype)
    exact = activation64(case.exact(), activation)
    assert_as_good_as(got, exact, activation_torch(case.baseline(), activation).to(dtype))


@pytest.mark.parametrize("out_bits", [[8], [6], [8, 6]], ids=["A8", "A6", "mixed"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_linear_quant(backend: str, out_bits: list[int], activation: str, bias: bool) -> None:
    case = linear_case(12, 45, 300, 6, [6, 8], period=6, bias=bias)
    out_table = random_table(9, out_bits, seed=8, step=0.05)
    codes, sums = kernels.linear_quant(*case.operands, activation, out_table)
    assert codes.shape == (12, 45)
    assert_codes(codes, activation64(case.exact(), activation), case.row_table(out_table))
    assert_row_sums(codes, sums)


@pytest.mark.parametrize("bias", [False, True])
def test_linear_swiglu_quant(backend: str, bias: bool) -> None:
    case = linear_case(12, 62, 300, 8, [8, 6], period=6, bias=bias)
    out_table = random_table(9, [6, 8], seed=8, step=0.05)
    codes, sums = kernels.linear_swiglu_quant(*case.operands, out_table)
    assert codes.shape == (12, 31)
    y = case.exact()
    assert_codes(codes, activation64(y[:, :31], "silu") * y[:, 31:], case.row_table(out_table))
    assert_row_sums(codes, sums)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gating", ["none", "rows", "per_sample"])
def test_linear_gate_residual(backend: str, dtype: torch.dtype, gating: str, gen: torch.Generator) -> None:
    case = linear_case(12, 44, 300, 6, [8], period=6)
    residual = (5 * torch.randn(12, 44, generator=gen)).to(dtype)
    gate = index = None
    pick = np.arange(12)
    if gating == "rows":
        gate = torch.randn(12, 6 * 44, generator=gen).to(dtype)[:, 44:88]
    elif gating == "per_sample":
        gate = torch.randn(2, 6 * 44, generator=gen).to(dtype)[:, 88:132]
        pick = np.arange(12) // 6
        index = torch.from_numpy(pick).to(torch.int32)
    before = residual.clone()
    got = kernels.linear_gate_residual(*case.operands, gate, index, residual)
    assert torch.equal(residual, before)
    update, base = case.exact(), case.baseline()
    if gate is not None:
        update = gate.double().numpy()[pick] * update
        base = gate.float()[torch.from_numpy(pick)] * base
    assert_as_good_as(got, residual.double().numpy() + update, (residual.float() + base).to(dtype))


def test_rows_do_not_depend_on_their_batch(backend: str) -> None:
    """A token decoded alone gives the same bits as inside a block, also through an activation."""
    case = linear_case(30, 41, 200, 6, [8, 6], period=10)
    out_table = random_table(13, [8], seed=8)
    block = kernels.linear(*case.operands, "gelu_erf", torch.float32)
    block_codes, _ = kernels.linear_quant(*case.operands, "silu", out_table)
    for i in range(30):
        one = dataclasses.replace(case, codes=case.codes[i : i + 1], positions=case.positions[i % 10 : i % 10 + 1])
        assert torch.equal(kernels.linear(*one.operands, "gelu_erf", torch.float32), block[i : i + 1])
        assert torch.equal(kernels.linear_quant(*one.operands, "silu", out_table)[0], block_codes[i : i + 1])


def test_zero_rows(backend: str) -> None:
    case = linear_case(2, 6, 40, 6, [8], period=2)
    empty = dataclasses.replace(case, codes=case.codes[:0])
    table = random_table(9, [8], seed=8)
    assert kernels.linear(*empty.operands, "none", torch.float16).shape == (0, 6)
    assert kernels.linear_quant(*empty.operands, "none", table)[0].shape == (0, 6)
    assert kernels.linear_swiglu_quant(*empty.operands, table)[1].shape == (0,)
    gate, residual = torch.zeros(0, 6), torch.zeros(0, 6, dtype=torch.bfloat16)
    assert kernels.linear_gate_residual(*empty.operands, gate, None, residual).dtype == torch.bfloat16


def test_non_contiguous_operands(backend: str) -> None:
    case = linear_case(8, 21, 70, 6, [8], period=2)

    def spread(value: object) -> object:
        """The same values on every second element of a buffer twice as wide."""
        if not isinstance(value, torch.Tensor) or value.numel() < 2:
            return value
        buffer = torch.empty(*value.shape[:-1], 2 * value.shape[-1], dtype=value.dtype)
        view = buffer[..., ::2]
        view.copy_(value)
        assert not view.is_contiguous()
        return view

    got = kernels.linear(*map(spread, case.operands), "none", torch.float32)
    assert torch.equal(got, kernels.linear(*case.operands, "none", torch.float32))
    residual = torch.randn(21, 8, generator=generator(1)).t()
    gate = torch.randn(21, 8, generator=generator(2)).t()
    assert torch.equal(
        kernels.linear_gate_residual(*case.operands, gate, None, residual),
        kernels.linear_gate_residual(*case.operands, gate.contiguous(), None, residual.contiguous()),
    )


def test_reference_refuses_overflow_before_requantizing() -> None:
    case = linear_case(2, 6, 40, 8, [8], period=2)
    case.w_scale.fill_(3e38)
    table = random_table(9, [8], seed=8)
    with kernels.use_backend("reference", strict=True):
        with pytest.raises(ValueError, match=r"linear_quant: cannot quantize -?inf"):
            kernels.linear_quant(*case.operands, "none", table)
        with pytest.raises(ValueError, match="linear_swiglu_quant: cannot quantize"):
            kernels.linear_swiglu_quant(*case.operands, table)
