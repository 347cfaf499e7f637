"""Epilogues of the integer linear layer, each with its formula. All arithmetic is float32, one rounding per operation
(no fused multiply-add), in the order written, and an activation is one operation; a backend may fuse within the
tolerance of the laws.

Symbols: i row (its position's delta_i, zq_i), j output channel, acc the exact int32 product, s_j the weight scale,
C_j the sum of the weight codes, b_j the bias.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .activations import activate
from .quantize import Grid


def dequantize(acc: Tensor, grid: Grid, w_scale: Tensor, col_sums: Tensor, bias: Tensor | None) -> Tensor:
    """``y_ij = (delta_i * s_j) * float(acc_ij - zq_i * C_j) + b_j``, float32 ``[M, N]``.

    The subtraction is int32 and exact (|acc| and |zq C| are both below 2^28 for K <= 8704); the conversion to float32
    rounds to nearest even; delta_i * s_j is formed first.
    """
    corrected = acc - grid.zq * col_sums
    y = (grid.delta * w_scale) * corrected.to(torch.float32)
    return y if bias is None else y + bias


def store(y: Tensor, activation: str, out_dtype: torch.dtype) -> Tensor:
    """``out_ij = act(y_ij)``, rounded once to ``out_dtype``."""
    return activate(y, activation).to(out_dtype)


def swiglu(y: Tensor) -> Tensor:
    """``h_ij = silu(y_ij) * y_i(j + N/2)``, float32 ``[M, N/2]``: the first half of the rows is w1, the second w3."""
    first, second = y.chunk(2, dim=1)
    return activate(first, "silu") * second


def gate_residual(y: Tensor, gate: Tensor | None, residual: Tensor) -> Tensor:
    """``out_ij = residual_ij + gate_rj * y_ij`` (or ``residual_ij + y_ij``), rounded once to residual's dtype."""
    update = y if gate is None else gate * y
    return (residual.to(torch.float32) + update).to(residual.dtype)
