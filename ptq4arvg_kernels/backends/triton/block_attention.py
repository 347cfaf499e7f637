"""Attention of many queries per sequence and head over the INT8 cache: prefixes, VAR's scales, PAR's groups."""

from __future__ import annotations

import triton
import triton.language as tl

from .decode import LOG2_E
from .heads import VALUES, grid_pair, head_grids, restore_half, slot_grid
from .softmax import HIDDEN, emit, merge_splits


@triton.jit
def in_pieces(x, DTYPE: tl.constexpr, PIECES: tl.constexpr):
    """float32 ``x`` as a sum of PIECES values of DTYPE, largest first: three of bfloat16 hold
    all 24 bits, over the whole range of float32."""
    pieces = ()
    for _ in tl.static_range(PIECES):
        piece = x.to(DTYPE)
        pieces += (piece,)
        x = x - piece.to(tl.float32)
    return pieces


@triton.jit
def dot_of_pieces(a, b, acc, COMPILED: tl.constexpr):
    """``a . b + acc`` of exact half-precision factors in float32. The interpreter reads bfloat16 as integers."""
    if COMPILED:
        acc = tl.dot(a, b, acc)
    else:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return acc


@triton.jit(do_not_specialize=["heads", "tiles", "span", "period", "groups", "edge", "out_length"])
def block_attention_kernel(
    q,
    k_cache,
    v_cache,
    out,
    sums,
    visible_end,
    positions,
    k_table,
    v_table,
    kv_group,
    out_table,
    workspace,
    counters,
    k_batch,
    k_head,
    v_batch,
    v_head,
    heads,
    tiles,
    span,
    period,
    groups,
    edge,
    out_length,
    softmax_scale,
    QUANTIZE: tl.constexpr,
    GROUPING: tl.constexpr,
    SPLITS: tl.constexpr,
    DTYPE: tl.constexpr,
    PIECES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    LANES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    ASM: tl.constexpr,
):
    """BM queries of one (sequence, head) and one of SPLITS equal runs of the slots that any of them sees.

    On tensor cores without loss: ``code - zq`` is an integer of at most 255, exact in either half-precision format, so
    that products are exact and sums float32. Half-precision queries are taken as they are, in DTYPE; float32 ones and
    the probabilities go in pieces of bfloat16. The steps delta join the logits and the probabilities. A probability
    rounded to one half-precision value would be within the tolerance for floats, but the codes made from the output
    would differ.
    """
    pair = tl.program_id(0)
    split = tl.program_id(2)
    batch, head = (pair // heads).to(tl.int64), pair % heads
    lanes = tl.arange(0, LANES)[None, :]
    queries = tl.program_id(1) * BM + tl.arange(0, BM)
    exists = queries < period
    ends = tl.load(visible_end + queries, mask=exists, other=1)
    ends = tl.minimum(tl.maximum(ends, 1), span)
    end = tl.max(ends, 0)
    run = tl.cdiv(tl.cdiv(end, BN), SPLITS) * BN
    first = split * run
    last = tl.minimum(first + run, end)
    k_rows = k_cache + batch * k_batch + head.to(tl.int64) * k_head
    v_rows = v_cache + batch * v_batch + head.to(tl.int64) * v_head

    real = exists[:, None] & (lanes < HEAD_DIM)
    q_rows = q + (pair.to(tl.int64) * period + queries) * HEAD_DIM
    asked = tl.load(q_rows[:, None] + lanes, mask=real, other=0.0)
    q_pieces = in_pieces(asked.to(tl.float32), DTYPE, PIECES)

    top = tl.full((BM,), HIDDEN, tl.float32)
    weight = tl.zeros((BM,), tl.float32)
    total = tl.zeros((BM, LANES), tl.float32)
    row = tl.arange(0, BN)
    grids = head_grids(k_table, v_table, 0, head, heads, 2 if GROUPING == "step" else 1)
    k_pair = grid_pair(grids, 0, GROUPING)
    v_pair = grid_pair(grids, VALUES, GROUPING)
    for start in range(first, last, BN):
        slot_of = start + row
        inside = slot_of < last
        mask = inside[:, None] & (lanes < PADDED)
        k_codes = tl.load(k_rows + slot_of[:, None] * PADDED + lanes, mask=mask, other=0)
        v_codes = tl.load(v_rows + slot_of[:, None] * PADDED + lanes, mask=mask, other=0)
        k_delta, k_zq = slot_grid(k_pair, k_table, kv_group, slot_of, inside, head, heads, groups, edge, GROUPING)
        v_delta, v_zq = slot_grid(v_pair, v_table, kv_group, slot_of, inside, head, heads, groups, edge, GROUPING)
        keys = tl.trans(restore_half(k_codes, k_zq[:, None], DTYPE, ASM))
        dot = tl.zeros((BM, BN), tl.float32)
        for i in tl.static_range(PIECES):
            dot = dot_of_pieces(q_pieces[PIECES - 1 - i], keys, dot, ASM)  # the smallest first
        visible = slot_of[None, :] < tl.minimum(ends, last)[:, None]
        logits = tl.where(visible, dot * (k_delta * (softmax_scale * LOG2_E))[None, :], HIDDEN)
        higher = tl.maximum(top, tl.max(logits, 1))
        fade = tl.exp2(top - higher)
        share = tl.where(visible, tl.exp2(logits - higher[:, None]), 0.0)
        weight = weight * fade + tl.sum(share, 1)
        values = restore_half(v_codes, v_zq[:, None], tl.bfloat16, ASM)
        shares = in_pieces(share * v_delta[None, :], tl.bfloat16, 3)
        total = total * fade[:, None]
        for i in tl.static_range(3):
            total = dot_of_pieces(shares[2 - i], values, total, ASM)
        top = higher

    done = True
    if SPLITS > 1:
        tile = pair * tl.num_programs(1) + tl.program_id(1)
        done, weight, total = merge_splits(
            top, weight, total, workspace, counters, tile, split, tiles, SPLITS, BM, LANES
        )
    if done:
        grid = (1.0, 0.0, 8.0)
        if QUANTIZE:
            position = tl.load(positions + queries, mask=exists, other=0).to(tl.int64)
            of_query = out_table + 4 * tl.minimum(tl.maximum(position, 0), out_length - 1)
            grid = (
                tl.load(of_query + 1, mask=exists, other=1.0)[:, None],
                tl.load(of_query + 2, mask=exists, other=0.0)[:, None],
                tl.load(of_query + 3, mask=exists, other=8.0)[:, None],
            )
        out_rows = batch * period + queries
        emit(
            weight,
            total,
            out,
            None if sums is None else sums + out_rows,
            out_rows * (heads * HEAD_DIM),
            head * HEAD_DIM + lanes,
            real,
            grid,
            exists,
            q.dtype.element_ty,
            QUANTIZE,
        )
