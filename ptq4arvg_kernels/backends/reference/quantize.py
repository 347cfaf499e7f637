"""The quantizer, and the two operators that quantize floating rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...tables import ACTIVATION_BITS, half_range, row_parameters
from ...value_checks import check_finite, check_index, check_positions, check_quant_rows
from .activations import activate


class Grid(NamedTuple):
    """Quantization parameters broadcast against the values they apply to (``[M, 1]`` for the rows of an operand)."""

    delta: Tensor  # float32
    recip: Tensor  # float32, fp32(1 / delta)
    zq: Tensor  # int32, z - 2^(bits - 1)
    low: Tensor  # int32, -2^(bits - 1)
    high: Tensor  # int32, 2^(bits - 1) - 1


def grid_of(rows: Tensor) -> Grid:
    """Split table rows ``[..., 4]`` into a :class:`Grid` of shape ``[..., 1]``."""
    delta, recip, zq, bits = rows.unsqueeze(-2).unbind(-1)
    half = half_range(bits)
    return Grid(delta, recip, zq.to(torch.int32), -half, half - 1)


def row_grid(op: str, table: Tensor, positions: Tensor, rows: int, name: str = "table") -> Grid:
    """The checked grid ``[M, 1]`` of every row; raises for positions outside the table and for lawless rows."""
    check_positions(op, positions, table.shape[0], name)
    check_quant_rows(op, table.index_select(0, positions), ACTIVATION_BITS, name)
    return grid_of(row_parameters(table, positions, rows))


def to_codes(op: str, values: Tensor, grid: Grid) -> Tensor:
    """Quantize float32 values, int8 in the shape of ``values``.

    ``q = clamp(rne(x * recip) + zq, low, high)``: one float32 multiply, round half to even, add and clamp in float.
    The addition is exact where it matters: a sum that float32 cannot hold is far outside the clamp.
    Raises ``ValueError`` for NaN and infinity.
    """
    check_finite(op, values)
    scaled = torch.round(values * grid.recip) + grid.zq.to(torch.float32)
    clamped = torch.minimum(torch.maximum(scaled, grid.low.to(torch.float32)), grid.high.to(torch.float32))
    return clamped.to(torch.int8)


def with_row_sums(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 ``[M, K]`` and ``R_i = sum_k q_ik`` int32 ``[M]``."""
    return codes, codes.sum(1, dtype=torch.int32)


def quantize(x: Tensor, table: Tensor, positions: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """``q = Q(act(x))``; see :func:`ptq4arvg_kernels.ops.quantize`."""
    grid = row_grid("quantize", table, positions, x.shape[0])
    return with_row_sums(to_codes("quantize", activate(x.to(torch.float32), activation), grid))


def normalize(x: Tensor, norm_kind: str, eps: float) -> Tensor:
    """Normalize float32 rows over the last dimension, without affine.

    layer: ``c = x - mean(x); c * rsqrt(mean(c^2) + eps)``.  rms: ``x * rsqrt(mean(x^2) + eps)``.
    """
    centred = x - x.mean(-1, keepdim=True) if norm_kind == "layer" else x
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)


def adaln_quant(
    x: Tensor,
    norm_kind: str,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    mod_scale: Tensor | None,
    mod_shift: Tensor | None,
    mod_rows: Tensor | None,
    scale_offset: float,
    table: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """``y = norm(x) * weight + bias; y = y * (scale_offset + mod_scale[r]) + mod_shift[r]; q = Q(y)``.

    Every operation rounds to float32 once, in the order written; see :func:`ptq4arvg_kernels.ops.adaln_quant`.
    """
    op = "adaln_quant"
    grid = row_grid(op, table, positions, x.shape[0])
    y = normalize(x.to(torch.float32), norm_kind, eps)
    if weight is not None:
        y = y * weight.to(torch.float32)
    if bias is not None:
        y = y + bias.to(torch.float32)
    if mod_scale is not None and mod_shift is not None:
        scale = pick_rows(op, "mod_rows", mod_scale, mod_rows)
        shift = pick_rows(op, "mod_rows", mod_shift, mod_rows)
        y = y * (scale_offset + scale) + shift
    return with_row_sums(to_codes(op, y, grid))


def pick_rows(op: str, name: str, values: Tensor, index: Tensor | None) -> Tensor:
    """``values[index]`` in float32, or ``values`` itself (row i for row i) without an index."""
    if index is None:
        return values.to(torch.float32)
    check_index(op, name, index, values.shape[0], "it selects a row of the conditioning tensor for every row of x")
    return values.index_select(0, index).to(torch.float32)
