"""Attention of one query per sequence and head over the INT8 cache, with what surrounds it in a decode step."""

from __future__ import annotations

import triton
import triton.language as tl

from .heads import DELTA, RECIP, SECOND, VALUES, ZQ, grid_pair, head_grids, restore, slot_grid, transform
from .qkv_kernels import KV_HALF, load_rows
from .rounding import to_codes
from .rows import clamped, float_word, load_float, load_index, output_grid
from .softmax import HIDDEN, emit, merge_splits

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def take(tile, which, ROW: tl.constexpr):
    """``[1, LANES]``: row ROW of ``tile [4, LANES]``, exact; ``which [4, 1]`` numbers the rows."""
    return tl.sum(tl.where(which == ROW, tile, 0.0), 0)[None, :]


@triton.jit
def append_token(
    qkv,
    k_rows,
    v_rows,
    batch,
    head,
    heads,
    slot,
    mine,
    exists,
    grids,
    at,
    q_weight,
    q_bias,
    k_weight,
    k_bias,
    q_scale,
    rope,
    eps,
    KIND: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    LANES: tl.constexpr,
):
    """Transform the token of a (sequence, head) and, where ``mine`` and ``exists``, write its codes to ``slot``.

    q, k and v are three rows of one ``[4, LANES]`` tile. As vectors ``[1, LANES]``, every warp would load and transform
    all of them; of a tile, each warp has rows of its own, and q and k are normalized by the same instructions.

    Args:
        qkv: ``[M, 3 H d]``; k_rows, v_rows: the head's rows of the caches.
        mine: whether this block's run of slots has ``slot``; others load q only.
        grids, at: :func:`.heads.head_grids`, and where the new slot's group begins in it, 0 or SECOND.

    Returns:
        float32 ``[1, LANES]``: the query, rounded to qkv's dtype; ``code - zq`` of the key; the value as the cache has
        it. The latter two where ``mine``.
    """
    which = tl.arange(0, 4)[:, None]
    lanes = tl.arange(0, LANES)[None, :]
    real = lanes < HEAD_DIM
    token = qkv + batch * (3 * heads * HEAD_DIM) + head * HEAD_DIM + which * (heads * HEAD_DIM)
    x = tl.load(token + lanes, mask=real & (which < tl.where(mine, 3, 1)), other=0.0).to(tl.float32)
    angles = None
    if KIND == "rope":
        turn = rope + slot.to(tl.int64) * HEAD_DIM
        angles = load_rows(turn, turn, which, lanes, HEAD_DIM, 0.0)
    factor = None
    if KIND == "l2":
        factor = tl.where(which == 0, load_float(q_scale + head), 1.0)
    weight = load_rows(q_weight, k_weight, which, lanes, HEAD_DIM, 1.0)
    bias = load_rows(q_bias, k_bias, which, lanes, HEAD_DIM, 0.0)
    y = transform(x, lanes, weight, bias, factor, angles, eps, KIND, HEAD_DIM, 4, LANES)

    is_key = which == 1
    recip = tl.where(is_key, float_word(grids, at + RECIP), float_word(grids, at + VALUES + RECIP))
    zq = tl.where(is_key, float_word(grids, at + ZQ), float_word(grids, at + VALUES + ZQ))
    codes = tl.where(real, to_codes(tl.where(is_key, y, x), recip, zq, KV_HALF), 0)
    write = lanes < tl.where(mine & exists, PADDED, 0)
    place = slot.to(tl.int64) * PADDED + lanes
    tl.store(k_rows + place + 0 * which, codes.to(tl.int8), mask=write & is_key)
    tl.store(v_rows + place + 0 * which, codes.to(tl.int8), mask=write & (which == 2))
    fresh = restore(codes, zq, False) * tl.where(is_key, 1.0, float_word(grids, at + VALUES + DELTA))
    query = take(y.to(qkv.dtype.element_ty).to(tl.float32), which, 0)
    return query, take(fresh, which, 1), take(fresh, which, 2)


@triton.jit(do_not_specialize=["heads", "pairs", "span", "slots", "groups", "edge", "out_length"])
def decode_kernel(
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
    q_weight,
    q_bias,
    k_weight,
    k_bias,
    q_scale,
    rope,
    out_table,
    workspace,
    counters,
    k_batch,
    k_head,
    v_batch,
    v_head,
    heads,
    pairs,
    span,
    slots,
    groups,
    edge,
    out_length,
    softmax_scale,
    eps,
    APPEND: tl.constexpr,
    QUANTIZE: tl.constexpr,
    KIND: tl.constexpr,
    GROUPING: tl.constexpr,
    SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    LANES: tl.constexpr,
    BN: tl.constexpr,
    TILES: tl.constexpr,
    ASM: tl.constexpr,
):
    """One (sequence, head) and one of SPLITS equal runs of the slots it sees.

    Products are float32 on CUDA cores: one query has no use for a tensor core, the loop waits for memory. Every row of
    a tile of BN slots keeps a triple of its own (:mod:`.softmax`), so that no reduction crosses threads before the end.

    With APPEND, q is the ``[M, 3 H d]`` output of the qkv layer. The new key and value never travel through memory: the
    block in whose run their slot lies writes them to the cache and starts its triples with them, and all others read
    older slots only.
    """
    pair = tl.program_id(0)
    split = tl.program_id(1)
    batch, head = (pair // heads).to(tl.int64), pair % heads
    lanes = tl.arange(0, LANES)[None, :]
    real = lanes < HEAD_DIM
    end = tl.minimum(tl.maximum(load_index(visible_end), 1), span)
    run = tl.cdiv(tl.cdiv(end, BN), SPLITS) * BN
    first = split * run
    last = tl.minimum(first + run, end)
    k_rows = k_cache + batch * k_batch + head.to(tl.int64) * k_head
    v_rows = v_cache + batch * v_batch + head.to(tl.int64) * v_head

    if APPEND or QUANTIZE:
        position = load_index(positions)

    row = tl.arange(0, BN)
    top = tl.full((BN,), HIDDEN, tl.float32)
    weight = tl.zeros((BN,), tl.float32)
    total = tl.zeros((BN, LANES), tl.float32)
    if APPEND:
        slot = tl.minimum(tl.maximum(position, 0), slots - 1)
        mine = split == tl.minimum(slot // run, SPLITS - 1)
        group = 0
        if GROUPING == "table":
            group = clamped(load_index(kv_group + slot), groups).to(tl.int32)
        grids = head_grids(k_table, v_table, group, head, heads, 2 if GROUPING == "step" else 1)
        at = 0
        if GROUPING == "step":
            at = tl.where(slot < edge, 0, SECOND)
        query, fresh_k, fresh_v = append_token(
            q, k_rows, v_rows, batch, head, heads, slot, mine, position == slot, grids, at, q_weight, q_bias, k_weight,
            k_bias, q_scale, rope, eps, KIND, HEAD_DIM, PADDED, LANES,
        )  # fmt: skip
        logit = tl.sum(query * fresh_k, 1) * (float_word(grids, at + DELTA) * (softmax_scale * LOG2_E))
        seen = (row == 0) & mine & (slot < end)
        top = tl.where(seen, logit, HIDDEN)
        weight = tl.where(seen, 1.0, 0.0)
        total = tl.where(seen[:, None], fresh_v, 0.0)
        last = tl.where(slot == last - 1, slot, last)  # or there might be a step for the slot that is left out
    else:
        query = tl.load(q + pair.to(tl.int64) * HEAD_DIM + lanes, mask=real, other=0.0).to(tl.float32)
        grids = head_grids(k_table, v_table, 0, head, heads, 2 if GROUPING == "step" else 1)
    k_pair = grid_pair(grids, 0, GROUPING)
    v_pair = grid_pair(grids, VALUES, GROUPING)

    for start in range(first, last, BN * TILES):
        masks = ()
        k_tiles = ()
        v_tiles = ()
        for i in tl.static_range(TILES):  # all loads before the first use
            slot_of = start + i * BN + row
            visible = slot_of < last
            if APPEND:
                visible = visible & (slot_of != slot)
            masks += (visible,)
            mask = visible[:, None] & (lanes < PADDED)
            k_tiles += (tl.load(k_rows + slot_of[:, None] * PADDED + lanes, mask=mask, other=0),)
            v_tiles += (tl.load(v_rows + slot_of[:, None] * PADDED + lanes, mask=mask, other=0),)
        logits = ()
        higher = top
        for i in tl.static_range(TILES):
            slot_of = start + i * BN + row
            delta, zq = slot_grid(k_pair, k_table, kv_group, slot_of, masks[i], head, heads, groups, edge, GROUPING)
            dot = tl.sum(query * restore(k_tiles[i], zq[:, None], ASM), 1)
            logits += (tl.where(masks[i], dot * (delta * (softmax_scale * LOG2_E)), HIDDEN),)
            higher = tl.maximum(higher, logits[i])
        fade = tl.exp2(top - higher)
        weight = weight * fade
        total = total * fade[:, None]
        top = higher
        for i in tl.static_range(TILES):
            slot_of = start + i * BN + row
            delta, zq = slot_grid(v_pair, v_table, kv_group, slot_of, masks[i], head, heads, groups, edge, GROUPING)
            share = tl.where(masks[i], tl.exp2(logits[i] - top), 0.0)
            weight += share
            shares = tl.broadcast_to((share * delta)[:, None], (BN, LANES))
            total = tl.fma(restore(v_tiles[i], zq[:, None], ASM), shares, total)

    best = tl.max(top, 0)
    fade = tl.exp2(top - best)
    one_weight = tl.sum(weight * fade, 0) + tl.zeros((1,), tl.float32)
    one_total = tl.sum(total * fade[:, None], 0)[None, :]
    done = True
    if SPLITS > 1:
        one_top = best + tl.zeros((1,), tl.float32)
        done, one_weight, one_total = merge_splits(
            one_top, one_weight, one_total, workspace, counters, pair, split, pairs, SPLITS, 1, LANES
        )
    if done:
        grid = (1.0, 0.0, 8.0)
        if QUANTIZE:
            grid = output_grid(out_table, position, out_length)
        query_row = tl.zeros((1,), tl.int64) + batch
        exists = query_row >= 0
        columns = head * HEAD_DIM + lanes
        emit(
            one_weight,
            one_total,
            out,
            None if sums is None else sums + query_row,
            query_row * (heads * HEAD_DIM),
            columns,
            real,
            grid,
            exists,
            q.dtype.element_ty,
            QUANTIZE,
        )
