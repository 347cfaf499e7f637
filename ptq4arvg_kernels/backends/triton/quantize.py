"""``quantize`` and ``adaln_quant``: arguments, blocks of a row, launch."""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import Launch, start
from .quantize_kernels import adaln_quant_kernel, quantize_kernel
from .support import require_rows

LANE = 4  # neighbouring columns of a thread: 8 bytes of a half-precision row, 16 of float32


def row_blocks(width: int) -> tuple[int, int, int]:
    """``(warps, CHUNK, CHUNKS)`` for rows of ``width`` columns, at most 36 columns per thread up to 8704.

    It depends on the width alone, so that a row has the same codes, to the last bit, in whatever batch it comes.
    """
    warps = next((count for limit, count in ((512, 1), (2048, 2), (4096, 4)) if width <= limit), 8)
    chunk = 32 * LANE * warps
    return warps, chunk, max(1, -(-width // chunk))


def new_codes(like: Tensor, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Memory for codes int8 ``[rows, width]`` and their sums int32 ``[rows]``."""
    return like.new_empty((rows, width), dtype=torch.int8), like.new_empty((rows,), dtype=torch.int32)


def quantize(x: Tensor, table: Tensor, positions: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """See :func:`ptq4arvg_kernels.ops.quantize`."""
    rows, width = x.shape
    codes, sums = new_codes(x, rows, width)
    if rows:
        require_rows("quantize", table=table)
    warps, chunk, chunks = row_blocks(width)
    start(
        Launch(
            quantize_kernel,
            (rows,),
            {
                "x": x,
                "table": table,
                "positions": positions,
                "codes": codes,
                "sums": sums,
                "period": len(positions),
                "length": len(table),
            },
            {"ACTIVATION": activation, "WIDTH": width, "CHUNK": chunk, "CHUNKS": chunks},
            num_warps=warps,
            num_stages=1,
        )
    )
    return codes, sums


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
    """See :func:`ptq4arvg_kernels.ops.adaln_quant`."""
    rows, width = x.shape
    codes, sums = new_codes(x, rows, width)
    if rows:
        require_rows("adaln_quant", table=table, mod_scale=mod_scale)
    warps, chunk, chunks = row_blocks(width)
    start(
        Launch(
            adaln_quant_kernel,
            (rows,),
            {
                "x": x,
                "weight": weight,
                "bias": bias,
                "mod_scale": mod_scale,
                "mod_shift": mod_shift,
                "mod_rows": mod_rows,
                "table": table,
                "positions": positions,
                "codes": codes,
                "sums": sums,
                "scale_stride": 0 if mod_scale is None else mod_scale.stride(0),
                "shift_stride": 0 if mod_shift is None else mod_shift.stride(0),
                "mod_count": 0 if mod_scale is None else len(mod_scale),
                "period": len(positions),
                "length": len(table),
                "eps": float(eps),
                "scale_offset": float(scale_offset),
            },
            {
                "CENTRE": norm_kind == "layer",
                "OFFSET": scale_offset != 0,
                "WIDTH": width,
                "CHUNK": chunk,
                "CHUNKS": chunks,
            },
            num_warps=warps,
            num_stages=1,
        )
    )
    return codes, sums
