"""Kernels of ``quantize`` and ``adaln_quant``: one thread block per row, the row in registers, one pass over memory."""

from __future__ import annotations

import triton
import triton.language as tl

from .epilogue import activate
from .rounding import half_range, to_codes
from .rows import clamped, inside, load_chunk, load_index, store_codes, table_row


@triton.jit(do_not_specialize=["length"])
def quantize_kernel(
    x,
    table,
    positions,
    codes,
    sums,
    period,
    length,
    ACTIVATION: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """``q = Q(act(x))`` of one row."""
    lane = tl.arange(0, CHUNK)
    row = tl.program_id(0).to(tl.int64)
    chunks = ()
    for i in tl.static_range(CHUNKS):  # all loads before the first use
        chunks += (load_chunk(x + row * WIDTH, i, lane, WIDTH, CHUNK),)
    recip, zq, bits = table_row(table, positions, tl.program_id(0), period, length)
    total = tl.zeros((CHUNK,), tl.int32)
    for i in tl.static_range(CHUNKS):
        q = to_codes(activate(chunks[i].to(tl.float32), ACTIVATION), recip, zq, half_range(bits))
        store_codes(codes + row * WIDTH, q, i, lane, WIDTH, CHUNK)
        total += inside(q, i, lane, WIDTH, CHUNK)
    tl.store(sums + row, tl.sum(total, 0))


@triton.jit(do_not_specialize=["length", "mod_count"])
def adaln_quant_kernel(
    x,
    weight,
    bias,
    mod_scale,
    mod_shift,
    mod_rows,
    table,
    positions,
    codes,
    sums,
    scale_stride,
    shift_stride,
    mod_count,
    period,
    length,
    eps,
    scale_offset,
    CENTRE: tl.constexpr,
    OFFSET: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """``y = norm(x) * weight + bias; y = y * (scale_offset + mod_scale[r]) + mod_shift[r]; q = Q(y)`` of one row.

    The statistics take two passes over the registers, as in the reference: ``c = x - mean(x)``, then ``mean(c^2)``.
    """
    lane = tl.arange(0, CHUNK)
    row = tl.program_id(0).to(tl.int64)
    chunks = ()
    for i in tl.static_range(CHUNKS):  # all loads before the first reduction of the row waits
        chunks += (load_chunk(x + row * WIDTH, i, lane, WIDTH, CHUNK),)
    if mod_rows is not None:
        modulation = clamped(load_index(mod_rows + row), mod_count)
    else:
        modulation = row
    scales = ()
    shifts = ()
    if mod_scale is not None:
        for i in tl.static_range(CHUNKS):
            scales += (load_chunk(mod_scale + modulation * scale_stride, i, lane, WIDTH, CHUNK),)
            shifts += (load_chunk(mod_shift + modulation * shift_stride, i, lane, WIDTH, CHUNK),)
    recip, zq, bits = table_row(table, positions, tl.program_id(0), period, length)

    if CENTRE:
        total = tl.zeros((CHUNK,), tl.float32)
        for i in tl.static_range(CHUNKS):
            total += chunks[i].to(tl.float32)
        mean = tl.math.div_rn(tl.sum(total, 0), WIDTH * 1.0)
    centred = ()
    squares = tl.zeros((CHUNK,), tl.float32)
    for i in tl.static_range(CHUNKS):
        c = chunks[i].to(tl.float32)
        if CENTRE:
            c = inside(c - mean, i, lane, WIDTH, CHUNK)
        centred += (c,)
        squares += c * c
    mean_square = tl.math.div_rn(tl.sum(squares, 0), WIDTH * 1.0)
    rstd = tl.math.div_rn(1.0, tl.math.sqrt_rn(mean_square + eps))

    code_sum = tl.zeros((CHUNK,), tl.int32)
    for i in tl.static_range(CHUNKS):
        y = centred[i] * rstd
        if weight is not None:
            y = y * load_chunk(weight, i, lane, WIDTH, CHUNK).to(tl.float32)
        if bias is not None:
            y = y + load_chunk(bias, i, lane, WIDTH, CHUNK).to(tl.float32)
        if mod_scale is not None:
            factor = scales[i].to(tl.float32)
            if OFFSET:
                factor = scale_offset + factor
            y = y * factor + shifts[i].to(tl.float32)
        q = to_codes(y, recip, zq, half_range(bits))
        store_codes(codes + row * WIDTH, q, i, lane, WIDTH, CHUNK)
        code_sum += inside(q, i, lane, WIDTH, CHUNK)
    tl.store(sums + row, tl.sum(code_sum, 0))
