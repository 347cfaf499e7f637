"""The four integer linear operators: one main loop, and an epilogue each (:mod:`.epilogue`)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...packing import unpack
from ...value_checks import check_code_range, check_row_sums
from .activations import activate
from .epilogue import dequantize, gate_residual, store, swiglu
from .matmul import int_matmul
from .quantize import pick_rows, row_grid, to_codes, with_row_sums


def _preactivation(
    op: str,
    codes: Tensor,
    row_sums: Tensor,
    qweight: Tensor,
    w_bits: int,
    in_features: int,
    w_scale: Tensor,
    col_sums: Tensor,
    bias: Tensor | None,
    table: Tensor,
    positions: Tensor,
) -> Tensor:
    """The main loop and the dequantization all four share: float32 y ``[M, N]`` before any activation.

    ``row_sums`` is not needed here (weights are signed); it is checked, because other backends rely on it.
    """
    grid = row_grid(op, table, positions, codes.shape[0])
    check_code_range(op, codes, grid.low, grid.high)
    check_row_sums(op, codes, row_sums)
    acc = int_matmul(codes, unpack(qweight, w_bits, in_features))
    return dequantize(acc, grid, w_scale, col_sums, bias)


def linear(
    codes: Tensor,
    row_sums: Tensor,
    qweight: Tensor,
    w_bits: int,
    in_features: int,
    w_scale: Tensor,
    col_sums: Tensor,
    bias: Tensor | None,
    table: Tensor,
    positions: Tensor,
    activation: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """``out = act(y)``; see :func:`ptq4arvg_kernels.ops.linear`."""
    y = _preactivation(
        "linear", codes, row_sums, qweight, w_bits, in_features, w_scale, col_sums, bias, table, positions
    )
    return store(y, activation, out_dtype)


def linear_quant(
    codes: Tensor,
    row_sums: Tensor,
    qweight: Tensor,
    w_bits: int,
    in_features: int,
    w_scale: Tensor,
    col_sums: Tensor,
    bias: Tensor | None,
    table: Tensor,
    positions: Tensor,
    activation: str,
    out_table: Tensor,
) -> tuple[Tensor, Tensor]:
    """``q = Q(act(y))``; see :func:`ptq4arvg_kernels.ops.linear_quant`."""
    op = "linear_quant"
    y = _preactivation(op, codes, row_sums, qweight, w_bits, in_features, w_scale, col_sums, bias, table, positions)
    out_grid = row_grid(op, out_table, positions, codes.shape[0], "out_table")
    return with_row_sums(to_codes(op, activate(y, activation), out_grid))


def linear_swiglu_quant(
    codes: Tensor,
    row_sums: Tensor,
    qweight: Tensor,
    w_bits: int,
    in_features: int,
    w_scale: Tensor,
    col_sums: Tensor,
    bias: Tensor | None,
    table: Tensor,
    positions: Tensor,
    out_table: Tensor,
) -> tuple[Tensor, Tensor]:
    """``q = Q(silu(y1) * y3)``; see :func:`ptq4arvg_kernels.ops.linear_swiglu_quant`."""
    op = "linear_swiglu_quant"
    y = _preactivation(op, codes, row_sums, qweight, w_bits, in_features, w_scale, col_sums, bias, table, positions)
    out_grid = row_grid(op, out_table, positions, codes.shape[0], "out_table")
    return with_row_sums(to_codes(op, swiglu(y), out_grid))


def linear_gate_residual(
    codes: Tensor,
    row_sums: Tensor,
    qweight: Tensor,
    w_bits: int,
    in_features: int,
    w_scale: Tensor,
    col_sums: Tensor,
    bias: Tensor | None,
    table: Tensor,
    positions: Tensor,
    gate: Tensor | None,
    gate_rows: Tensor | None,
    residual: Tensor,
) -> Tensor:
    """``out = residual + gate * y``; see :func:`ptq4arvg_kernels.ops.linear_gate_residual`."""
    op = "linear_gate_residual"
    y = _preactivation(op, codes, row_sums, qweight, w_bits, in_features, w_scale, col_sums, bias, table, positions)
    chosen = None if gate is None else pick_rows(op, "gate_rows", gate, gate_rows)
    return gate_residual(y, chosen, residual)
