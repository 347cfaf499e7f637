"""The four integer linear operators on the GEMM kernel: one launch each, with the epilogue of the operator.

Rows whose length is no multiple of 16 bytes cannot be copied 16 bytes at a time: such codes (no model here has them)
are copied into padded rows first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from .. import scratch
from ..gpu import describe
from ..gpu_weights import padded
from . import support, tiles
from .gemm import gemm
from .launch import Launch, start
from .quantize import new_codes
from .tiles import Plan, plan
from .weights import K_TILE, N_ALIGN, tiles_of


def start_gemm(
    op: str,
    epilogue: str,
    operands: tuple[Any, ...],
    out: Tensor,
    activation: str = "none",
    sums: Tensor | None = None,
    out_table: Tensor | None = None,
    gate: Tensor | None = None,
    gate_rows: Tensor | None = None,
    residual: Tensor | None = None,
    how: Plan | None = None,
    w: Tensor | None = None,
) -> None:
    """Launch the kernel with the operands of :func:`.gemm.gemm`.

    Args:
        op: name for error messages.
        operands: the leading arguments of the operators, from ``codes`` to ``positions``. With ``w`` (weights packed
            already) neither ``row_sums`` nor ``qweight`` is looked at.
        sums: int32 zeros ``[M]``, or None if nobody wants the row sums of the new codes.
        how: the plan; that of :func:`.tiles.plan` if None.

    Raises:
        IndexError: a table or the gate has no rows, so that there is nothing to clamp an index to.
    """
    codes, _, qweight, w_bits, in_features, w_scale, col_sums, bias, table, positions = operands
    rows, width = codes.shape[0], w_scale.shape[0]
    if w is None:
        w = tiles_of(qweight, w_bits, in_features, paired=epilogue == "swiglu_quant")
    if rows == 0 or width == 0:
        return
    for name, source in (("table", table), ("out_table", out_table), ("gate", gate)):
        if source is not None and len(source) == 0:
            raise IndexError(f"{op}: {name} has no rows; pass one per position (tables) or condition (gate)")
    if in_features % 16:
        # Weights behind K are 0, so the sums stay.
        in_features = padded(in_features, K_TILE)
        codes = F.pad(codes, (0, in_features - codes.shape[1]))
    if how is None:
        how = plan(rows, width, in_features, w_bits, describe(codes.device))
    tile = how.tile
    partial = counters = None
    if how.split > 1:
        partial = codes.new_empty((how.split, how.grid[0], tile.bm, tile.bn), dtype=torch.int32)
        counters = scratch.counters(codes.device, how.grid[0])
    start(
        Launch(
            gemm,
            how.grid,
            {
                "x": codes,
                "w": w,
                "out": out,
                "sums": sums,
                "scale": w_scale,
                "col_sums": col_sums,
                "bias": bias,
                "table": table,
                "positions": positions,
                "out_table": out_table,
                "gate": gate,
                "gate_rows": gate_rows,
                "residual": residual,
                "partial": partial,
                "counters": counters,
                "M": rows,
                "N": width,
                "K": in_features,
                "n_padded": padded(width, N_ALIGN),
                "period": len(positions),
                "length": len(table),
                "out_length": 0 if out_table is None else len(out_table),
                "gate_count": 0 if gate is None else len(gate),
                "gate_stride": 0 if gate is None else gate.stride(0),
                "tiles_m": how.tiles_m,
                "tiles_n": how.tiles_n,
                "steps": how.steps,
            },
            {
                "BITS": w_bits,
                "EPILOGUE": epilogue,
                "ACTIVATION": activation,
                "ASM": not support.interpreted(),
                "EVEN_M": rows % tile.bm == 0,
                "EVEN_K": in_features % tile.bk == 0,
                "GROUP_M": how.group_m,
                "SPLIT": how.split > 1,
                "BM": tile.bm,
                "BN": tile.bn,
                "BK": tile.bk,
            },
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    )


def linear(*args: Any) -> Tensor:
    """See :func:`ptq4arvg_kernels.ops.linear`."""
    *operands, activation, out_dtype = args
    codes, _, qweight, *_ = operands
    out = codes.new_empty((codes.shape[0], qweight.shape[0]), dtype=out_dtype)
    start_gemm("linear", "store", tuple(operands), out, activation)
    return out


def linear_quant(*args: Any) -> tuple[Tensor, Tensor]:
    """See :func:`ptq4arvg_kernels.ops.linear_quant`."""
    *operands, activation, out_table = args
    codes, _, qweight, *_ = operands
    out, sums = new_codes(codes, codes.shape[0], qweight.shape[0])
    start_gemm("linear_quant", "quant", tuple(operands), out, activation, sums=sums.zero_(), out_table=out_table)
    return out, sums


def linear_swiglu_quant(*args: Any) -> tuple[Tensor, Tensor]:
    """See :func:`ptq4arvg_kernels.ops.linear_swiglu_quant`."""
    *operands, out_table = args
    codes, _, qweight, *_ = operands
    out, sums = new_codes(codes, codes.shape[0], qweight.shape[0] // 2)
    start_gemm("linear_swiglu_quant", "swiglu_quant", tuple(operands), out, sums=sums.zero_(), out_table=out_table)
    return out, sums


def linear_gate_residual(*args: Any) -> Tensor:
    """See :func:`ptq4arvg_kernels.ops.linear_gate_residual`."""
    *operands, gate, gate_rows, residual = args
    out = torch.empty_like(residual)
    start_gemm(
        "linear_gate_residual",
        "gate_residual",
        tuple(operands),
        out,
        gate=gate,
        gate_rows=gate_rows,
        residual=residual,
    )
    return out


def tune(
    *operands: Any, rows: int | None = None, measure: Callable[[Callable[[], None]], float] | None = None
) -> dict[str, Any]:
    """Time all tiles and splits for a layer on its device and use the fastest from now on (:func:`.tiles.tune`).

    Args:
        operands: the leading arguments of the operators, from ``codes`` to ``positions``.
        rows: how many rows of ``codes`` to use; all of them if None.
        measure: milliseconds of a call; Triton's ``do_bench`` (cold L2, median) if None.

    Returns:
        The entry for ``measured`` in tiles.json: ``{"w8 4096x1024 16": {"tile": [...], "split": 1}}``.

    Raises:
        RuntimeError: the current stream is being captured, or there is no GPU to measure on and no ``measure``.
    """
    codes, row_sums, qweight, w_bits, in_features, *rest = operands
    if measure is None:
        if codes.device.type != "cuda":
            raise RuntimeError(f"tune: there is no GPU to measure on, the operands are on {codes.device}; pass measure")
        measure = triton.testing.do_bench
    timer = measure
    rows = len(codes) if rows is None else rows
    layer = (codes[:rows], row_sums[:rows], qweight, w_bits, in_features, *rest)
    out = codes.new_empty((rows, qweight.shape[0]), dtype=torch.float16)
    device = describe(codes.device)
    tiles.tune(
        rows,
        qweight.shape[0],
        in_features,
        w_bits,
        device,
        lambda how: timer(lambda: start_gemm("tune", "store", layer, out, how=how)),
    )
    return tiles.measurements()[device.name]
