"""Vectors of attention heads in kernels: norms and rotations of q and k, and the grids of cached keys and values."""

from __future__ import annotations

import triton
import triton.language as tl

from .rounding import SHIFT, SHIFT_BITS
from .rows import float_word, load_words

L2_EPS = tl.constexpr(1e-12)  # as torch.nn.functional.normalize


@triton.jit
def transform(
    x,
    lanes,
    weight,
    bias,
    factor,
    angles,
    eps,
    KIND: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """What a ``qk_kind`` does to vectors float32 ``[ROWS, LANES]``, zero behind ``HEAD_DIM``; the result is too.

    ``none``; ``layer_norm``: ``(x - mean) * rsqrt(var + eps) * weight + bias``; ``l2``: ``x / max(|x|, 1e-12) *
    factor``; ``rope``: the pairs (2j, 2j + 1) rotated, ``(a, b) -> (a cos - b sin, b cos + a sin)``.

    Args:
        x: the vectors.
        lanes: column numbers ``[1, LANES]``.
        weight, bias, factor: float32 that broadcast against x, or None.
        angles: float32 ``[1 or ROWS, LANES]``, the position's ``[d/2, 2]`` (cos, sin).
    """
    real = lanes < HEAD_DIM
    if KIND == "layer_norm":
        mean = tl.math.div_rn(tl.sum(x, 1), HEAD_DIM * 1.0)
        centred = tl.where(real, x - mean[:, None], 0.0)
        variance = tl.math.div_rn(tl.sum(centred * centred, 1), HEAD_DIM * 1.0)
        x = centred * tl.math.div_rn(1.0, tl.math.sqrt_rn(variance + eps))[:, None]
        if weight is not None:
            x = x * weight
        if bias is not None:
            x = x + bias
    elif KIND == "l2":
        length = tl.maximum(tl.math.sqrt_rn(tl.sum(x * x, 1)), L2_EPS)
        x = tl.math.div_rn(x, tl.broadcast_to(length[:, None], (ROWS, LANES)))
        if factor is not None:
            x = x * factor
    elif KIND == "rope":
        a, b = tl.split(tl.reshape(x, (ROWS, LANES // 2, 2)))
        cos, sin = tl.split(tl.reshape(angles, (angles.shape[0], LANES // 2, 2)))
        x = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (ROWS, LANES))
    else:
        tl.static_assert(KIND == "none", "unknown qk_kind")
    return x


@triton.jit
def group_of(kv_group, slots, mask, groups):
    """Group of every slot, clamped to the groups there are."""
    return tl.minimum(tl.maximum(tl.load(kv_group + slots, mask=mask, other=0), 0), groups - 1)


# Words of head_grids.
DELTA = tl.constexpr(0)
RECIP = tl.constexpr(1)
ZQ = tl.constexpr(2)
SECOND = tl.constexpr(4)  # the same of the second group
VALUES = tl.constexpr(8)  # the same of the values


@triton.jit
def head_grids(k_table, v_table, first, head, heads, GROUPS: tl.constexpr):
    """int32 ``[32]``: the table rows of a head in the groups ``first`` and, with GROUPS 2, ``first + 1``.

    ============ ============ ============ =============
    words 0-3    4-7          8-11         12-15
    ============ ============ ============ =============
    keys, first  keys, second values, first values, second
    ============ ============ ============ =============

    each (delta, recip, zq, bits), float32 bits; see :func:`.rows.load_words`.
    """
    lane = tl.arange(0, 32)
    at = ((first + lane // 4 % 2) * heads + head) * 4 + lane % 4
    wanted = lane // 4 % 2 < GROUPS
    keys = load_words(k_table + at, wanted & (lane < 8))
    return keys + load_words(v_table + at, wanted & (lane >= 8) & (lane < 16))


@triton.jit
def grid_pair(grids, WHERE: tl.constexpr, GROUPING: tl.constexpr):
    """``(delta, zq, delta, zq)`` of the groups 0 and 1 (or 0 again) in :func:`head_grids`, WHERE 0 of keys, VALUES of
    values; nothing for the grouping ``table``."""
    pair = (0.0, 0.0, 0.0, 0.0)
    if GROUPING != "table":
        OTHER: tl.constexpr = SECOND if GROUPING == "step" else 0
        pair = (
            float_word(grids, WHERE + DELTA),
            float_word(grids, WHERE + ZQ),
            float_word(grids, WHERE + OTHER + DELTA),
            float_word(grids, WHERE + OTHER + ZQ),
        )
    return pair


@triton.jit
def slot_grid(pair, table, kv_group, slots, visible, head, heads, groups, edge, GROUPING: tl.constexpr):
    """``(delta, zq)`` float32 of every slot, from a ``[G, H, 4]`` table or from :func:`grid_pair`.

    ``GROUPING`` ``one``: all slots are in group 0. ``step``: slots below ``edge`` are in group 0, the others in group
    1; nothing is loaded per slot. ``table``: ``kv_group`` says.
    """
    if GROUPING == "table":
        row = table + (group_of(kv_group, slots, visible, groups) * heads + head) * 4
        delta = tl.load(row, mask=visible, other=0.0)
        zq = tl.load(row + 2, mask=visible, other=0.0)
    elif GROUPING == "step":
        delta = tl.where(slots < edge, pair[0], pair[2])
        zq = tl.where(slots < edge, pair[1], pair[3])
    else:
        delta = pair[0] + tl.zeros_like(slots).to(tl.float32)
        zq = pair[1] + tl.zeros_like(slots).to(tl.float32)
    return delta, zq


# Four bytes to four floats 2^23 + 128 + code: exponent bytes of 2^23 around a byte whose sign bit is flipped.
WIDEN = tl.constexpr("""
{
.reg .b32 t;
xor.b32 t, $4, 0x80808080;
prmt.b32 $0, t, 0x4B000000, 0x7540;
prmt.b32 $1, t, 0x4B000000, 0x7541;
prmt.b32 $2, t, 0x4B000000, 0x7542;
prmt.b32 $3, t, 0x4B000000, 0x7543;
}
""")
WIDEN_SHIFT = tl.constexpr(8388736.0)  # 2^23 + 128


@triton.jit
def restore(codes, zq, ASM: tl.constexpr):
    """``code - zq`` of int8 codes in float32, exact: the code enters the low bits of a power of two, and one
    subtraction removes both. Conversion instructions run at a fraction of that rate.

    ASM takes four bytes at a time; the plain twin is for the interpreter, and for single vectors.
    """
    if ASM:
        wide = tl.inline_asm_elementwise(WIDEN, "=&r,=&r,=&r,=&r,r", [codes], dtype=tl.int32, is_pure=True, pack=4)
        return wide.to(tl.float32, bitcast=True) - (WIDEN_SHIFT + zq)
    else:
        return (codes.to(tl.int32) + SHIFT_BITS).to(tl.float32, bitcast=True) - (SHIFT + zq)


@triton.jit
def restore_half(codes, zq, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """``code - zq`` in half precision, exact: an integer of at most 255."""
    return restore(codes, zq, ASM).to(DTYPE)
