"""The four integer linear operators: plan, workspaces, one launch each with the epilogue of the operator.

Rows whose length is no multiple of 16 bytes cannot be copied 16 bytes at a time: such codes (no model here has them)
are copied into padded rows first.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..gpu_weights import padded
from ..scratch import counters
from ..views import ACTIVATIONS, SWIGLU, maybe, view
from . import native, support
from .weights import bricks_of

OUTPUTS = {"store": 0, "quant": 1, "gate_residual": 2}
ROW_ALIGN = 16


@functools.lru_cache(maxsize=4096)
def plan(rows: int, out_features: int, in_features: int, w_bits: int, output: str, device: tuple[int, int, int]) -> Any:
    """The plan of a product (``GemmPlan`` of the compiled module, csrc/cuda/gemm_plan.h).

    Args:
        rows, out_features, in_features: M, N (both halves of a paired weight), K.
        w_bits: 6 or 8.
        output: ``store``, ``quant`` (SwiGLU too) or ``gate_residual``.
        device: as :func:`.support.device_info`.

    Raises:
        ValueError: the sizes are not possible.
    """
    return native.module().plan_gemm(rows, out_features, in_features, w_bits, OUTPUTS[output], device)


def start_gemm(
    output: str,
    operands: tuple[Any, ...],
    out: Tensor,
    activation: int = ACTIVATIONS["none"],
    sums: Tensor | None = None,
    out_table: Tensor | None = None,
    gate: Tensor | None = None,
    gate_rows: Tensor | None = None,
    residual: Tensor | None = None,
    how: Any = None,
    w: Tensor | None = None,
    norm: tuple[Any, ...] | None = None,
) -> None:
    """One launch.

    Args:
        output: see :func:`plan`.
        operands: the leading arguments of the operators, from ``codes`` to ``positions``. With ``w`` (weights packed
            already) neither ``row_sums`` nor ``qweight`` is looked at.
        activation: a number of ``ACTIVATIONS``, or ``SWIGLU``.
        sums: int32 zeros ``[M]``, or None if nobody wants the row sums of the new codes.
        how: the plan; that of :func:`plan` if None.
        norm: with a plan that normalises, instead of codes: ``(x, kind, eps, weight, bias, scale, shift, mod_rows,
            offset)`` as in :func:`ptq4arvg_kernels.adaln_quant`, the kind as its number.
    """
    codes, _, qweight, w_bits, in_features, w_scale, col_sums, bias, table, positions = operands
    if w is None:
        w = bricks_of(qweight, w_bits, in_features, paired=activation == SWIGLU)
    first = norm[0] if codes is None and norm is not None else codes
    rows, out_features, device = first.shape[0], w_scale.shape[0], first.device
    if rows == 0 or out_features == 0:
        return
    if codes is not None and in_features % ROW_ALIGN:
        # Weights behind K are 0, so the sums stay.
        in_features = padded(in_features, ROW_ALIGN)
        codes = F.pad(codes, (0, in_features - codes.shape[1]))
    if codes is not None and codes.data_ptr() % ROW_ALIGN:
        codes = codes.clone()
    if how is None:
        how = plan(rows, out_features, in_features, w_bits, output, support.device_info(device))
    partial = counts = None
    if how.counters:
        partial = torch.empty(how.partial, dtype=torch.int32, device=device)
        counts = counters(device, how.counters)
    layer = (w, w_scale, col_sums, bias, table, positions)
    arguments = (*layer, activation, out, sums, out_table, gate, gate_rows, residual, partial, counts)
    named = None if norm is None else tuple(view(value) if isinstance(value, Tensor) else value for value in norm)
    given = [maybe(value) if isinstance(value, Tensor) else value for value in (codes, named, *arguments)]
    touched = (codes, *arguments, *(norm or ()))
    with native.launching(value for value in touched if isinstance(value, Tensor)):
        native.module().gemm(how, *given, *native.stream_of(device))


def linear(*args: Any) -> Tensor:
    """See :func:`ptq4arvg_kernels.ops.linear`."""
    *operands, activation, out_dtype = args
    codes, _, qweight, *_ = operands
    out = codes.new_empty((codes.shape[0], qweight.shape[0]), dtype=out_dtype)
    start_gemm("store", tuple(operands), out, ACTIVATIONS[activation])
    return out


def _quantizing(operands: tuple[Any, ...], activation: int, out_table: Tensor, width: int) -> tuple[Tensor, Tensor]:
    codes = operands[0]
    out = codes.new_empty((codes.shape[0], width))
    sums = torch.zeros(codes.shape[0], dtype=torch.int32, device=codes.device)
    start_gemm("quant", operands, out, activation, sums=sums, out_table=out_table)
    return out, sums


def linear_quant(*args: Any) -> tuple[Tensor, Tensor]:
    """See :func:`ptq4arvg_kernels.ops.linear_quant`."""
    *operands, activation, out_table = args
    return _quantizing(tuple(operands), ACTIVATIONS[activation], out_table, operands[2].shape[0])


def linear_swiglu_quant(*args: Any) -> tuple[Tensor, Tensor]:
    """See :func:`ptq4arvg_kernels.ops.linear_swiglu_quant`."""
    *operands, out_table = args
    return _quantizing(tuple(operands), SWIGLU, out_table, operands[2].shape[0] // 2)


def linear_gate_residual(*args: Any) -> Tensor:
    """See :func:`ptq4arvg_kernels.ops.linear_gate_residual`."""
    *operands, gate, gate_rows, residual = args
    out = torch.empty_like(residual)
    start_gemm("gate_residual", tuple(operands), out, gate=gate, gate_rows=gate_rows, residual=residual)
    return out
