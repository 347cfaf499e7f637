"""Attention of one query per sequence and head over the INT8 cache, with what surrounds it in a decode step."""

from __future__ import annotations

import triton
import triton.language as tl

from .heads import restore, slot_grid, transform
from .qkv_kernels import quantize_heads
from .rows import pick
from .softmax import HIDDEN, emit, merge_splits

LOG2_E = tl.constexpr(1.4426950408889634)


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
    end = tl.minimum(tl.maximum(tl.load(visible_end), 1), span)
    run = tl.cdiv(tl.cdiv(end, BN), SPLITS) * BN
    first = split * run
    last = tl.minimum(first + run, end)
    k_rows = k_cache + batch * k_batch + head.to(tl.int64) * k_head
    v_rows = v_cache + batch * v_batch + head.to(tl.int64) * v_head

    row = tl.arange(0, BN)
    top = tl.full((BN,), HIDDEN, tl.float32)
    weight = tl.zeros((BN,), tl.float32)
    total = tl.zeros((BN, LANES), tl.float32)
    if APPEND:
        position = tl.load(positions).to(tl.int64)
        slot = tl.minimum(tl.maximum(position, 0), slots - 1)
        token = q + batch * (3 * heads * HEAD_DIM) + head * HEAD_DIM
        angles = None
        if KIND == "rope":
            angles = rope + slot * HEAD_DIM
        factor = None
        if KIND == "l2":
            factor = tl.load(q_scale + head).to(tl.float32)
        q_in = tl.load(token + lanes, mask=real, other=0.0).to(tl.float32)
        q_out = transform(q_in, lanes, q_weight, q_bias, factor, angles, eps, KIND, HEAD_DIM, 1, LANES)
        query = q_out.to(q.dtype.element_ty).to(tl.float32)
        if split == tl.minimum(slot // run, SPLITS - 1):
            one = tl.zeros((1,), tl.int32)
            group = pick(kv_group, slot, groups)
            k_in = tl.load(token + heads * HEAD_DIM + lanes, mask=real, other=0.0).to(tl.float32)
            v_in = tl.load(token + 2 * heads * HEAD_DIM + lanes, mask=real, other=0.0).to(tl.float32)
            k_out = transform(k_in, lanes, k_weight, k_bias, None, angles, eps, KIND, HEAD_DIM, 1, LANES)
            k_codes = quantize_heads(k_out, k_table, group, head + one, heads, one == 0, HEAD_DIM, lanes)
            v_codes = quantize_heads(v_in, v_table, group, head + one, heads, one == 0, HEAD_DIM, lanes)
            write = lanes < tl.where(position == slot, PADDED, 0)
            tl.store(k_rows + slot * PADDED + lanes, k_codes.to(tl.int8), mask=write)
            tl.store(v_rows + slot * PADDED + lanes, v_codes.to(tl.int8), mask=write)
            at = (group * heads + head) * 4
            fresh_k = restore(k_codes, tl.load(k_table + at + 2), False)
            fresh_v = restore(v_codes, tl.load(v_table + at + 2), False) * tl.load(v_table + at)
            logit = tl.sum(query * fresh_k, 1) * (tl.load(k_table + at) * (softmax_scale * LOG2_E))
            mine = (row == 0) & (slot < end)
            top = tl.where(mine, logit, HIDDEN)
            weight = tl.where(mine, 1.0, 0.0)
            total = tl.where(mine[:, None], fresh_v, 0.0)
    else:
        query = tl.load(q + pair.to(tl.int64) * HEAD_DIM + lanes, mask=real, other=0.0).to(tl.float32)

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
            delta, zq = slot_grid(k_table, kv_group, slot_of, masks[i], head, heads, groups, edge, GROUPING)
            dot = tl.sum(query * restore(k_tiles[i], zq[:, None], ASM), 1)
            logits += (tl.where(masks[i], dot * (delta * (softmax_scale * LOG2_E)), HIDDEN),)
            higher = tl.maximum(higher, logits[i])
        fade = tl.exp2(top - higher)
        weight = weight * fade
        total = total * fade[:, None]
        top = higher
        for i in tl.static_range(TILES):
            slot_of = start + i * BN + row
            delta, zq = slot_grid(v_table, kv_group, slot_of, masks[i], head, heads, groups, edge, GROUPING)
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
            out_table,
            positions,
            tl.zeros((1,), tl.int32),
            exists,
            out_length,
            q.dtype.element_ty,
            QUANTIZE,
        )
