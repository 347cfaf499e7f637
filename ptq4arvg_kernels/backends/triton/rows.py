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
def load_words(pointers, mask):
    """int32 ``[32]``: the 32-bit words at ``pointers [32]`` (to any 32-bit type), 0 where ``mask`` is not set.

    All lanes of a warp ask for what a scalar load reads; here each asks for a word of its own, and :func:`word` hands
    words to all of them.
    """
    return tl.load(pointers.to(tl.pointer_type(tl.int32), bitcast=True), mask=mask, other=0)


@triton.jit
def word(words, which):
    """int32: element ``which`` of int32 ``[32]``. A sum of integers over the lanes of a warp is one instruction."""
    return tl.sum(tl.where(tl.arange(0, 32) == which, words, 0), 0)


@triton.jit
def float_word(words, which):
    """The float32 with the bits of :func:`word`."""
    return word(words, which).to(tl.float32, bitcast=True)


@triton.jit
def load_index(pointer):
    """int32: the int32 or int64 at ``pointer``, asked for by one lane of a warp. What an int32 cannot hold becomes its
    nearest end, and negative numbers -1: both lie outside of whatever they index, as before."""
    lane = tl.arange(0, 32)
    index = tl.load(pointer + 0 * lane, mask=lane == 0, other=0)
    return tl.sum(tl.minimum(tl.maximum(index, -1), 2147483647).to(tl.int32), 0)


@triton.jit
def load_float(pointer):
    """The number at ``pointer`` in float32, asked for by one lane of a warp."""
    lane = tl.arange(0, 32)
    value = tl.load(pointer + 0 * lane, mask=lane == 0, other=0.0).to(tl.float32)
    return tl.sum(value.to(tl.int32, bitcast=True), 0).to(tl.float32, bitcast=True)


@triton.jit
def clamped(index, count):
    """``index`` clamped to ``[0, count)``, int64."""
    return tl.minimum(tl.maximum(index, 0), count - 1).to(tl.int64)


@triton.jit
def output_grid(table, position, length):
    """``(recip, zq, bits)`` float32 of the row at ``position`` (an int32) of a table of ``length`` rows."""
    lane = tl.arange(0, 32)
    row = load_words(table + 4 * clamped(position, length) + lane, lane < 4)
    return float_word(row, 1), float_word(row, 2), float_word(row, 3)


@triton.jit
def table_row(table, positions, row, period, length):
    """:func:`output_grid` at ``positions[row % P]``; ``row`` is an int32."""
    return output_grid(table, load_index(positions + row % period), length)


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
