"""Kernel of ``qkv_append``."""

from __future__ import annotations

import triton
import triton.language as tl

from .heads import transform
from .rounding import to_codes
from .rows import pick

KV_HALF = tl.constexpr(128.0)  # 2^(bits - 1) of ptq4arvg_kernels.tables.KV_BITS


@triton.jit
def load_rows(first, second, which, lanes, HEAD_DIM: tl.constexpr, OTHER: tl.constexpr):
    """float32 ``[4, LANES]``: ``first [HEAD_DIM]`` in row 0, ``second`` in row 1, OTHER elsewhere; None of None, None.

    A ``[1, LANES]`` tensor every warp would load for itself; of four rows, it loads different ones.
    """
    rows = None
    if first is not None:
        rows = tl.load(first + lanes, mask=(lanes < HEAD_DIM) & (which == 0), other=OTHER).to(tl.float32)
    if second is not None:
        of_second = tl.load(second + lanes, mask=(lanes < HEAD_DIM) & (which == 1), other=OTHER).to(tl.float32)
        rows = of_second if rows is None else tl.where(which == 1, of_second, rows)
    return rows


@triton.jit
def load_vector(vector, lanes, HEAD_DIM: tl.constexpr):
    """float32 ``[1, LANES]`` of a vector ``[HEAD_DIM]``, zeros behind it; None of None."""
    values = None
    if vector is not None:
        values = tl.load(vector + lanes, mask=lanes < HEAD_DIM, other=0.0).to(tl.float32)
    return values


@triton.jit
def quantize_heads(x, table, group, head, heads, mask, HEAD_DIM: tl.constexpr, lanes):
    """int32 codes of float32 ``[ROWS, LANES]`` on the grids of heads ``head [ROWS]`` in a group; 0 behind HEAD_DIM."""
    row = table + (group * heads + head) * 4
    recip = tl.load(row + 1, mask=mask, other=1.0)[:, None]
    zq = tl.load(row + 2, mask=mask, other=0.0)[:, None]
    return tl.where(lanes < HEAD_DIM, to_codes(x, recip, zq, KV_HALF), 0)


@triton.jit(do_not_specialize=["heads", "slots", "groups"])
def qkv_append_kernel(
    qkv,
    q,
    k_cache,
    v_cache,
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
    k_batch,
    k_head,
    v_batch,
    v_head,
    period,
    heads,
    slots,
    groups,
    eps,
    KIND: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One token row, ROWS heads. ``slots`` is the number of positions that have a slot, a group and a rotation."""
    token = tl.program_id(0)
    batch, i = (token // period).to(tl.int64), token % period
    head = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    lanes = tl.arange(0, LANES)[None, :]
    exists = head < heads
    real = exists[:, None] & (lanes < HEAD_DIM)
    position = tl.load(positions + i).to(tl.int64)
    slot = tl.minimum(tl.maximum(position, 0), slots - 1)
    group = pick(kv_group, slot, groups)

    offsets = head[:, None] * HEAD_DIM + lanes
    row = qkv + token.to(tl.int64) * (3 * heads * HEAD_DIM)
    q_in = tl.load(row + offsets, mask=real, other=0.0)
    k_in = tl.load(row + heads * HEAD_DIM + offsets, mask=real, other=0.0)
    v_in = tl.load(row + 2 * heads * HEAD_DIM + offsets, mask=real, other=0.0)
    angles = None
    if KIND == "rope":
        angles = load_vector(rope + slot * HEAD_DIM, lanes, HEAD_DIM)
    factor = None
    if KIND == "l2":
        factor = tl.load(q_scale + head, mask=exists, other=0.0).to(tl.float32)[:, None]
    q_w, q_b = load_vector(q_weight, lanes, HEAD_DIM), load_vector(q_bias, lanes, HEAD_DIM)
    k_w, k_b = load_vector(k_weight, lanes, HEAD_DIM), load_vector(k_bias, lanes, HEAD_DIM)
    q_out = transform(q_in.to(tl.float32), lanes, q_w, q_b, factor, angles, eps, KIND, HEAD_DIM, ROWS, LANES)
    k_out = transform(k_in.to(tl.float32), lanes, k_w, k_b, None, angles, eps, KIND, HEAD_DIM, ROWS, LANES)

    q_rows = q + ((batch * heads + head) * period + i) * HEAD_DIM
    tl.store(q_rows[:, None] + lanes, q_out.to(q.dtype.element_ty), mask=real)
    # A position without a slot writes nothing.
    # A layout for 16-byte stores of codes would split the loads of wider values into half sectors.
    spread = tl.max_contiguous(lanes, (1, VECTOR))
    write = exists[:, None] & (lanes < tl.where(position == slot, PADDED, 0))
    k_codes = quantize_heads(k_out, k_table, group, head, heads, exists, HEAD_DIM, lanes)
    k_rows = k_cache + batch * k_batch + head.to(tl.int64) * k_head + slot * PADDED
    tl.store(k_rows[:, None] + spread, k_codes.to(tl.int8), mask=write)
    v_codes = quantize_heads(v_in.to(tl.float32), v_table, group, head, heads, exists, HEAD_DIM, lanes)
    v_rows = v_cache + batch * v_batch + head.to(tl.int64) * v_head + slot * PADDED
    tl.store(v_rows[:, None] + spread, v_codes.to(tl.int8), mask=write)
