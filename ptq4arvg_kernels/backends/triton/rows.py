"""Rows of operands in kernels: the quantization parameters of a row's position, rows picked by an index, and rows held
in registers.

A row is a run of equal chunks, all but the last of them full: power-of-two blocks cover 1280 or 1408 columns without
the idle lanes of one block of 2048, and a sum over the row is elementwise first, then one reduction.

An index that lies outside what it selects from is clamped to it: a wrong index gives wrong codes, never an access
outside an operand (see :mod:`ptq4arvg_kernels.backends.triton`, "Data").
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pick(index, i, count):
    """``index[i]`` clamped to ``[0, count)``, int64."""
    return tl.minimum(tl.maximum(tl.load(index + i).to(tl.int64), 0), count - 1)


@triton.jit
def table_row(table, positions, row, period, length):
    """``(recip, zq, bits)`` at ``positions[row % P]`` of a table of ``length`` rows, float32; ``row`` is an int32."""
    at = table + 4 * pick(positions, row % period, length)
    return tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def load_chunk(row, i, lane, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Chunk ``i`` of a row of ``WIDTH`` columns; zeros behind its end."""
    if (i + 1) * CHUNK <= WIDTH:
        chunk = tl.load(row + i * CHUNK + lane)
    else:
        chunk = tl.load(row + i * CHUNK + lane, mask=i * CHUNK + lane < WIDTH, other=0.0)
    return chunk


@triton.jit
def inside(values, i, lane, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """``values`` of chunk ``i``, with zeros behind the end of the row."""
    if (i + 1) * CHUNK > WIDTH:
        values = tl.where(i * CHUNK + lane < WIDTH, values, 0)
    return values


@triton.jit
def store_codes(row, codes, i, lane, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Store chunk ``i`` of a row of int8 codes."""
    if (i + 1) * CHUNK <= WIDTH:
        tl.store(row + i * CHUNK + lane, codes.to(tl.int8))
    else:
        tl.store(row + i * CHUNK + lane, codes.to(tl.int8), mask=i * CHUNK + lane < WIDTH)
