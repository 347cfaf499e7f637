"""The integer GEMM of all linear operators: int8 tensor cores, int32 sums, one epilogue of three.

A thread block computes a tile ``[BM, BN]`` of ``x [M, K] . w [N, K]^T`` over a part of K. What happens to the sums is
chosen by constexprs (:mod:`.epilogue`); weights come in the order of :mod:`.weights`, where a tile is a run of bytes.

Split-K. The partial sums of a tile are int32, so their order does not matter. Every block stores its partial sums; the
last one to arrive (:mod:`.handover`) adds those of the others to its own and goes on with the epilogue, in the same
launch.

Rows of the operands are addressed with 64 bits, and rows behind M are masked, not wrapped: they are never read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .epilogue import activate, add_residual, dequantize, gated, swiglu
from .handover import arrived_last
from .int6 import unpack
from .rounding import half_range, to_codes
from .rows import clamped

# Elements of the smallest tile that the epilogue takes in two halves.
HALVED = tl.constexpr(8192)
# Elements of the largest residual tile that is loaded before the main loop: 16 per thread and less.
EARLY = tl.constexpr(2048)


@triton.jit
def tile_of(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Tile (pm, pn) of a block. GROUP_M row tiles form a group, which is walked row tile by row tile and then column by
    column: blocks that run at the same time share a few weight tiles and a few row tiles. 0: there is one row tile."""
    if GROUP_M == 0:
        pm, pn = pid - pid, pid
    else:
        group = pid // (GROUP_M * tiles_n)
        first = group * GROUP_M
        height = tl.minimum(tiles_m - first, GROUP_M)
        inside = pid - group * (GROUP_M * tiles_n)
        pm, pn = first + inside % height, inside // height
    return pm, pn


@triton.jit
def load_x(ptrs, rows, k, left, EVEN_M: tl.constexpr, EVEN_K: tl.constexpr):
    """A piece ``[BM, width]`` of x; ``k [1, width]`` counts from its first column, behind which ``left`` are inside K.

    Without ragged edges there is no mask at all: each costs an instruction per address in the main loop.
    """
    if EVEN_K:
        if EVEN_M:
            x = tl.load(ptrs)
        else:
            x = tl.load(ptrs, mask=rows, other=0)
    else:
        x = tl.load(ptrs, mask=rows & (k < left), other=0)
    return x


@triton.jit
def main_loop(
    x,
    w,
    pm,
    pn,
    M,
    K,
    n_padded,
    first,
    last,
    BITS: tl.constexpr,
    ASM: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """int32 ``[BM, BN]``: the sums over the K tiles ``first`` to ``last - 1``."""
    acc = tl.zeros((BM, BN), dtype=tl.int32)
    # Offsets inside a tile are small numbers behind a 64-bit address that all threads share. The compiler can then put
    # their constant parts into the instructions and keeps few addresses per thread.
    row = tl.arange(0, BM)[:, None]
    column = tl.arange(0, BN).to(tl.int64)[:, None]
    rows = row < M - pm * BM
    x_tile = x + pm.to(tl.int64) * BM * K + first * BK
    w_tile = w + first.to(tl.int64) * n_padded * (BK * BITS // 8)
    # Weights are addressed as [BN, BK] and transposed: as [BK, BN], Triton takes the tile apart byte by byte on sm_8x.
    if BITS == 8:
        k = tl.arange(0, BK)[None, :]
        x_inside = row * K + k
        w_inside = pn.to(tl.int64) * (BN * BK) + (column * BK + k)
        if BM == 16 and BN >= 64:
            # Four warps copy one piece of x per thread: advancing the address of the tile, which the threads share,
            # takes fewer instructions (57 a step, 60 otherwise). With several pieces, advancing theirs does (142, 156).
            for step in range(first, last):
                a = load_x(x_tile + x_inside, rows, k, K - step * BK, EVEN_M, EVEN_K)
                acc = tl.dot(a, tl.trans(tl.load(w_tile + w_inside)), acc)
                x_tile += BK
                w_tile += n_padded * BK
        else:
            x_ptrs = x_tile + x_inside
            w_ptrs = w_tile + w_inside
            for step in range(first, last):
                a = load_x(x_ptrs, rows, k, K - step * BK, EVEN_M, EVEN_K)
                acc = tl.dot(a, tl.trans(tl.load(w_ptrs)), acc)
                x_ptrs += BK
                w_ptrs += n_padded * BK
    else:
        Q: tl.constexpr = BK // 4
        k = tl.arange(0, Q)[None, :]
        x_ptrs = x_tile + (row * K + k)
        w_ptrs = w_tile + pn.to(tl.int64) * (BN * Q) + (column * Q + k)
        for step in range(first, last):
            left = K - step * BK
            x0 = load_x(x_ptrs, rows, k, left, EVEN_M, EVEN_K)
            x1 = load_x(x_ptrs + Q, rows, k, left - Q, EVEN_M, EVEN_K)
            x2 = load_x(x_ptrs + 2 * Q, rows, k, left - 2 * Q, EVEN_M, EVEN_K)
            x3 = load_x(x_ptrs + 3 * Q, rows, k, left - 3 * Q, EVEN_M, EVEN_K)
            a = tl.load(w_ptrs)
            b = tl.load(w_ptrs + n_padded * Q)
            c = tl.load(w_ptrs + n_padded * (2 * Q))
            w0, w1, w2, w3 = unpack(a, b, c, ASM)
            acc = tl.dot(x0, tl.trans(w0), acc)
            acc = tl.dot(x1, tl.trans(w1), acc)
            acc = tl.dot(x2, tl.trans(w2), acc)
            acc = tl.dot(x3, tl.trans(w3), acc)
            x_ptrs += BK
            w_ptrs += n_padded * (3 * Q)
        acc = acc >> 2  # the codes are left-justified: every sum is a multiple of 4
    return acc


@triton.jit
def load_channels(scale, col_sums, bias, channel, mask):
    """int32 ``[BN, 4]``: the bits of (s_j, C_j, b_j, nothing) of a tile's channels.

    One tensor larger than the block, so that Triton loads every number once and moves it to the lanes that need it
    after the main loop. Three vectors it would load in the layout of the accumulators, eight times over.
    """
    which = tl.arange(0, 4)[None, :]
    base = tl.where(which == 0, scale.to(tl.int64), col_sums.to(tl.int64))
    wanted = which < 2
    if bias is not None:
        base = tl.where(which == 2, bias.to(tl.int64), base)
        wanted = which < 3
    address = (base + 4 * channel.to(tl.int64)[:, None]).to(tl.pointer_type(tl.int32))
    return tl.load(address, mask=mask[:, None] & wanted, other=0)


@triton.jit
def load_pieces(scale, col_sums, bias, pn, N, PAIRED: tl.constexpr, PIECES: tl.constexpr, WIDTH: tl.constexpr):
    """:func:`load_channels` of PIECES runs of WIDTH columns, the first of which is ``pn * PIECES``. PAIRED: columns
    alternate between the halves of the channels."""
    pieces_of = ()
    for i in tl.static_range(PIECES):
        rn = (pn * PIECES + i) * WIDTH + tl.arange(0, WIDTH)
        channel = rn
        if PAIRED:
            channel = (rn % 2) * (N // 2) + rn // 2
        pieces_of += (load_channels(scale, col_sums, bias, channel, rn < N),)
    return pieces_of


@triton.jit
def load_indices(indices, rm, period, M, BM: tl.constexpr):
    """``[BM, lanes]``: ``indices[row % P]`` in the first column, zeros in the others.

    As wide as a block, so that one lane asks for each index (see :func:`load_channels`); the sum of the columns is
    taken after the main loop.
    """
    lane = tl.arange(0, max(2, 128 // BM))[None, :]
    return tl.load(indices + (rm % period)[:, None] + 0 * lane, mask=(lane == 0) & (rm < M)[:, None], other=0)


@triton.jit
def load_row(table, position, length, rows, BM: tl.constexpr):
    """``(delta, recip, zq, bits)`` at ``position [BM]``, float32; outside the table those of its nearest end."""
    inside = tl.minimum(tl.maximum(position, 0), length - 1).to(tl.int64)
    row = tl.load(table + 4 * inside[:, None] + tl.arange(0, 4)[None, :], mask=rows[:, None], other=0.0)
    delta_zq, recip_bits = tl.split(tl.reshape(row, (BM, 2, 2)))
    delta, zq = tl.split(delta_zq)
    recip, bits = tl.split(recip_bits)
    return delta, recip, zq, bits


@triton.jit
def pieces(COUNT: tl.constexpr, BN: tl.constexpr):
    """``[1, COUNT, BN / COUNT]``: the columns of a tile, in COUNT runs. See :func:`load_tile`."""
    return tl.arange(0, COUNT)[None, :, None] * (BN // COUNT) + tl.arange(0, BN // COUNT)[None, None, :]


@triton.jit
def load_tile(matrix, row, stride, rm, pn, M, N, BM: tl.constexpr, BN: tl.constexpr):
    """``[BM, BN]``: column tile ``pn`` of the rows ``row`` (int64 ``[BM]``) of a matrix; zeros outside M and N.

    Triton gives tensors of one shape that depend on each other one layout, wide enough for the narrowest type: a
    ``[64, 128]`` tile of half-precision numbers beside int8 codes would be loaded in pieces of 16, half a sector per
    request. As a tensor of another shape it gets a layout of its own.
    """
    columns = pn * BN + pieces(2, BN)
    mask = (rm < M)[:, None, None] & (columns < N)
    tile = tl.load(matrix + row[:, None, None] * stride + columns, mask=mask, other=0.0)
    return tl.reshape(tile, (BM, BN))


@triton.jit
def halves(acc, BM: tl.constexpr, BN: tl.constexpr):
    """The left and the right half of the columns; nothing moves between threads."""
    return tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def finish(
    acc,
    channels,
    grid,
    out_grid,
    early,
    rm,
    pm,
    pn,
    out,
    sums,
    bias,
    gate,
    gate_index,
    residual,
    M,
    N,
    gate_count,
    gate_stride,
    EPILOGUE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """From exact sums to what the operator returns, see :func:`gemm`.

    ``grid``, ``out_grid``: :func:`load_row` of the rows' positions in ``table`` and, where there are codes, in
    ``out_table``; ``early``: the residual if it is loaded already.

    The barriers between large operands keep the compiler from loading all of them at once, which would spill registers.
    """
    scale_bias, col_sums_ = tl.split(tl.reshape(channels, (BN, 2, 2)))
    scale, bias_bits = tl.split(scale_bias)
    col_sums, _ = tl.split(col_sums_)
    b = None
    if bias is not None:
        b = bias_bits.to(tl.float32, bitcast=True)
    rows = rm < M
    delta, _, zq, _ = grid
    y = dequantize(acc, delta, zq.to(tl.int32), scale.to(tl.float32, bitcast=True), col_sums, b)
    if EPILOGUE == "swiglu_quant":
        y = swiglu(y, BM, BN)
        columns = pn * (BN // 2) + tl.arange(0, BN // 2)
        width = N // 2
    else:
        columns = pn * BN + tl.arange(0, BN)
        width = N
    mask = rows[:, None] & (columns < width)[None, :]
    # 64 bits for the tile, 32 inside it: BM * N < 2^31.
    tile_out = out + pm.to(tl.int64) * BM * width
    local = tl.arange(0, BM)
    offsets = local[:, None] * width + columns[None, :]
    if EPILOGUE == "store":
        tl.store(tile_out + offsets, activate(y, ACTIVATION).to(out.dtype.element_ty), mask=mask)
    elif EPILOGUE == "gate_residual":
        if gate is not None:
            if gate_index is not None:
                r = clamped(tl.sum(gate_index, 1), gate_count)
            else:
                r = rm.to(tl.int64)
            tl.debug_barrier()
            y = gated(y, load_tile(gate, r, gate_stride, rm, pn, M, N, BM, BN))
            tl.debug_barrier()
        if early is None:
            early = load_tile(residual + pm.to(tl.int64) * BM * N, local, N, rm, pn, M, N, BM, BN)
        tl.store(tile_out + offsets, add_residual(y, early).to(out.dtype.element_ty), mask=mask)
    else:
        if EPILOGUE == "quant":
            y = activate(y, ACTIVATION)
        _, recip, out_zq, bits = out_grid
        codes = to_codes(y, recip[:, None], out_zq[:, None], half_range(bits)[:, None])
        tl.store(tile_out + offsets, codes.to(tl.int8), mask=mask)
        if sums is not None:  # integers: column tiles add up in any order
            tl.atomic_add(sums + rm, tl.sum(tl.where(mask, codes, 0), 1), mask=rows, sem="relaxed")


@triton.jit(
    do_not_specialize=["M", "period", "length", "out_length", "gate_count", "tiles_m", "tiles_n", "steps"],
)
def gemm(
    x,
    w,
    out,
    sums,
    scale,
    col_sums,
    bias,
    table,
    positions,
    out_table,
    gate,
    gate_rows,
    residual,
    partial,
    counters,
    M,
    N,
    K,
    n_padded,
    period,
    length,
    out_length,
    gate_count,
    gate_stride,
    tiles_m,
    tiles_n,
    steps,
    BITS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ASM: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One tile; grid ``(tiles_m * tiles_n, parts of K)``.

    Args:
        x: int8 ``[M, K]``.
        w: packed weights of N channels padded to n_padded.
        out: floats ``[M, N]`` (``store``, ``gate_residual``), int8 ``[M, N]`` (``quant``) or ``[M, N / 2]``
            (``swiglu_quant``).
        sums: int32 ``[M]``, zero at the start; the row sums of the codes are added. None if nobody wants them.
        scale, col_sums, bias: float32, int32, float32 or None, ``[N]``; ``[w1; w3]`` stacked for ``swiglu_quant``.
        table, positions: float32 ``[length, 4]`` and integers ``[period]``.
        out_table: float32 ``[out_length, 4]``, or None without codes.
        gate, gate_rows: floats ``[gate_count, N]``, rows gate_stride apart, and int32 ``[M]``; each may be None.
        residual: floats ``[M, N]`` for ``gate_residual``.
        partial, counters: int32 ``[parts, tiles, BM, BN]`` and ``[tiles]``, counters all 0; None without SPLIT.
        steps: K tiles per part.
        EPILOGUE: ``store``, ``quant``, ``swiglu_quant`` or ``gate_residual``.
        SPLIT: whether there is more than one part of K.
        EVEN_M, EVEN_K: M is a multiple of BM, K one of BK.
    """
    tile = tl.program_id(0)
    pm, pn = tile_of(tile, tiles_m, tiles_n, GROUP_M)
    rm = pm * BM + tl.arange(0, BM)
    # Large tiles are finished one half of their columns after the other, each a tile (pm, 2 pn + i) of BN / 2 columns:
    # scales, sums and bias of all columns of a thread would fill its registers (on sm_90 it has a quarter of them).
    HALVES: tl.constexpr = 2 if BM * BN >= HALVED else 1
    WIDTH: tl.constexpr = BN // HALVES
    # What the epilogue needs and can be addressed by now is loaded before the main loop, which hides the latency; what
    # depends on a loaded value comes after it, since waiting here would delay the first tile.
    position = load_indices(positions, rm, period, M, BM)
    gate_index = None
    if gate_rows is not None:
        gate_index = load_indices(gate_rows, rm, M, M, BM)
    channels = ()
    if not SPLIT:
        channels = load_pieces(scale, col_sums, bias, pn, N, EPILOGUE == "swiglu_quant", HALVES, WIDTH)
    early = None
    if EPILOGUE == "gate_residual" and not SPLIT and BM * BN <= EARLY:
        early = load_tile(residual + pm.to(tl.int64) * BM * N, tl.arange(0, BM), N, rm, pn, M, N, BM, BN)
    part = tl.program_id(1)
    tiles_k = tl.cdiv(K, BK)
    first = part
    last = tiles_k
    if SPLIT:
        first = part * steps
        last = tl.minimum(first + steps, tiles_k)
    acc = main_loop(x, w, pm, pn, M, K, n_padded, first, last, BITS, ASM, EVEN_M, EVEN_K, BM, BN, BK)
    sums_of = (acc,)
    if HALVES == 2:
        sums_of = halves(acc, BM, BN)
    tiles, parts = tl.num_programs(0), tl.num_programs(1)
    inside = tl.arange(0, BM)[:, None, None] * BN + pieces(4, WIDTH)
    rows = (rm < M)[:, None, None]
    if SPLIT:
        mine = partial + (part * tiles + tile).to(tl.int64) * (BM * BN)
        for i in tl.static_range(HALVES):
            tl.store(mine + i * WIDTH + inside, tl.reshape(sums_of[i], (BM, 4, WIDTH // 4)), mask=rows)  # see load_tile
        if not arrived_last(counters + tile, parts):
            return
        # Only the last block needs them, and they would be in the registers of all during the main loop.
        channels = load_pieces(scale, col_sums, bias, pn, N, EPILOGUE == "swiglu_quant", HALVES, WIDTH)
    position = tl.sum(position, 1)
    grid = load_row(table, position, length, rm < M, BM)
    out_grid = grid
    if out_table is not None:
        out_grid = load_row(out_table, position, out_length, rm < M, BM)
    for i in tl.static_range(HALVES):
        total = sums_of[i]
        if SPLIT:
            total = tl.reshape(total, (BM, 4, WIDTH // 4))
            for other in tl.range(1, parts, num_stages=1):
                theirs = partial + ((part + other) % parts * tiles + tile).to(tl.int64) * (BM * BN)
                total += tl.load(theirs + i * WIDTH + inside, mask=rows, other=0, cache_modifier=".cg")
            total = tl.reshape(total, (BM, WIDTH))
        finish(
            total, channels[i], grid, out_grid, early, rm, pm, pn * HALVES + i, out, sums, bias, gate, gate_index,
            residual, M, N, gate_count, gate_stride, EPILOGUE, ACTIVATION, BM, WIDTH,
        )  # fmt: skip
        if i + 1 < HALVES:
            tl.debug_barrier()
