"""``attention`` over the INT8 cache, and the fused attention of a decode step: arguments, schedule, launch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu import describe
from ..heads import Grouping, Heads
from ..scratch import counters
from . import support
from .block_attention import block_attention_kernel
from .decode import decode_kernel
from .launch import Launch, start
from .qkv import cache_arguments, slots_of

TILES = 4  # tiles of slots per step of the decode kernel
SLOTS_PER_WARP = 8  # rows of such a tile per warp
BLOCK_SLOTS = 32  # slots per step of the block kernel: with 64, some head widths spill
MAX_SPLITS = 8


class Schedule(NamedTuple):
    """How attention is cut into thread blocks.

    Attributes:
        rows: queries per block; 1 for the decode kernel.
        slots: slots per tile.
        warps: per block.
        splits: blocks that share the slots of a tile of queries.
    """

    rows: int
    slots: int
    warps: int
    splits: int


def _splits(blocks: int, steps: int, multiprocessors: int) -> int:
    """Blocks per tile of queries: doubled while there is a multiprocessor for each and it saves at least two steps,
    since merging costs about as much as a step."""
    splits = 1
    while splits < MAX_SPLITS and 2 * splits * blocks <= multiprocessors and steps >= 4 * splits:
        splits *= 2
    return splits


def schedule(pairs: int, period: int, span: int, multiprocessors: int) -> Schedule:
    """A pure function of the shape and the device.

    One query: many pairs fill the device with two warps each, whose reduction at the end costs least; few pairs take
    four, one per scheduler of a multiprocessor. More queries: tiles of 16 to 64 on tensor cores.

    Args:
        pairs: sequences times heads.
        period: queries per pair, P.
        span: slots at most.
        multiprocessors: of the device.
    """
    if period == 1:
        wanted = 4 if pairs <= 4 * multiprocessors else 2
        warps = max(1, min(wanted, triton.next_power_of_2(span // (SLOTS_PER_WARP * TILES))))
        steps = triton.cdiv(span, warps * SLOTS_PER_WARP * TILES)
        return Schedule(1, warps * SLOTS_PER_WARP, warps, _splits(pairs, steps, multiprocessors))
    rows = min(64, max(16, triton.next_power_of_2(period)))
    blocks = pairs * triton.cdiv(period, rows)
    warps = 8 if rows == 64 else 4  # the accumulators of 64 queries would fill the registers of four warps
    return Schedule(rows, BLOCK_SLOTS, warps, _splits(blocks, triton.cdiv(span, BLOCK_SLOTS), multiprocessors))


class _Output(NamedTuple):
    """Where the result goes: floats, or codes with ``table`` at ``positions``, and their sums if wanted."""

    out: Tensor
    table: Tensor | None = None
    positions: Tensor | None = None
    sums: Tensor | None = None


def _lanes(k_cache: Tensor) -> int:
    return triton.next_power_of_2(k_cache.shape[3])


def _scratch(q: Tensor, tiles: int, plan: Schedule, lanes: int) -> dict[str, Tensor | None]:
    if plan.splits == 1:
        return {"workspace": None, "counters": None}
    size = tiles * plan.splits * plan.rows * (lanes + 2)
    workspace = torch.empty(size, dtype=torch.float32, device=q.device)
    return {"workspace": workspace, "counters": counters(q.device, tiles)}


def _shared(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, visible_end: Tensor, span: int, layer: Heads, output: _Output
) -> dict[str, Any]:
    """Run-time arguments that both kernels have."""
    return {
        "q": q,
        **cache_arguments(k_cache, v_cache),
        "out": output.out,
        "sums": output.sums,
        "visible_end": visible_end,
        "positions": output.positions,
        "k_table": layer.k_table,
        "v_table": layer.v_table,
        "kv_group": layer.kv_group,
        "out_table": output.table,
        "heads": layer.heads,
        "span": span,
        "groups": len(layer.k_table),
        "edge": layer.grouping.edge,
        "out_length": 0 if output.table is None else len(output.table),
        "softmax_scale": float(layer.softmax_scale),
    }


def _start_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    visible_end: Tensor,
    span: int,
    layer: Heads,
    output: _Output,
    append: bool = False,
) -> None:
    """One query per sequence and head; with ``append``, ``q`` is the output of the qkv layer."""
    lanes, pairs = _lanes(k_cache), k_cache.shape[0] * layer.heads
    plan = schedule(pairs, 1, span, describe(q.device).multiprocessors)
    start(
        Launch(
            decode_kernel,
            (pairs, plan.splits),
            {
                **_shared(q, k_cache, v_cache, visible_end, span, layer, output),
                **_scratch(q, pairs, plan, lanes),
                "q_weight": layer.q_weight,
                "q_bias": layer.q_bias,
                "k_weight": layer.k_weight,
                "k_bias": layer.k_bias,
                "q_scale": layer.q_scale,
                "rope": layer.rope,
                "pairs": pairs,
                "slots": slots_of(k_cache, layer.kv_group, layer.rope),
                "eps": float(layer.eps),
            },
            {
                "APPEND": append,
                "QUANTIZE": output.table is not None,
                "KIND": layer.qk_kind,
                "GROUPING": layer.grouping.kind,
                "SPLITS": plan.splits,
                "HEAD_DIM": layer.head_dim,
                "PADDED": k_cache.shape[3],
                "LANES": lanes,
                "BN": plan.slots,
                "TILES": TILES,
                "ASM": not support.interpreted(),
            },
            num_warps=plan.warps,
            num_stages=1,
        )
    )


# Half-precision format of q in the products, and how many of its values make up one number.
_PIECES = {torch.float16: (tl.float16, 1), torch.bfloat16: (tl.bfloat16, 1), torch.float32: (tl.bfloat16, 3)}


def _start_block(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, visible_end: Tensor, span: int, layer: Heads, output: _Output
) -> None:
    """P queries per sequence and head."""
    batch, heads, period, head_dim = q.shape
    lanes, pairs = _lanes(k_cache), batch * heads
    plan = schedule(pairs, period, span, describe(q.device).multiprocessors)
    row_tiles = triton.cdiv(period, plan.rows)
    dtype, pieces = _PIECES[q.dtype]
    start(
        Launch(
            block_attention_kernel,
            (pairs, row_tiles, plan.splits),
            {
                **_shared(q, k_cache, v_cache, visible_end, span, layer, output),
                **_scratch(q, pairs * row_tiles, plan, lanes),
                "tiles": pairs * row_tiles,
                "period": period,
            },
            {
                "QUANTIZE": output.table is not None,
                "GROUPING": layer.grouping.kind,
                "SPLITS": plan.splits,
                "DTYPE": dtype,
                "PIECES": pieces,
                "HEAD_DIM": head_dim,
                "PADDED": k_cache.shape[3],
                "LANES": lanes,
                "BM": plan.rows,
                "BN": plan.slots,
                "ASM": not support.interpreted(),
            },
            num_warps=plan.warps,
            num_stages=1,
        )
    )


def _attend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, visible_end: Tensor, span: int, layer: Heads, output: _Output
) -> None:
    (_start_decode if q.shape[2] == 1 else _start_block)(q, k_cache, v_cache, visible_end, span, layer, output)


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    visible_end: Tensor,
    span: int,
    k_table: Tensor,
    v_table: Tensor,
    kv_group: Tensor,
    softmax_scale: float,
) -> Tensor:
    """See :func:`ptq4arvg_kernels.ops.attention`."""
    batch, heads, period, head_dim = q.shape
    support.require_rows("attention", k_table=k_table)
    layer = Heads(heads, head_dim, k_table, v_table, kv_group, softmax_scale, Grouping.of_metadata(k_table))
    out = q.new_empty(batch * period, heads * head_dim)
    _attend(q, k_cache, v_cache, visible_end, span, layer, _Output(out))
    return out


def attend_quantize(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    visible_end: Tensor,
    span: int,
    layer: Heads,
    positions: Tensor,
    out_table: Tensor,
    sums: Tensor | None = None,
) -> Tensor:
    """Codes int8 ``[B P, H d]`` of :func:`attention`'s output, rounded to q's dtype first, in one launch.

    Args:
        q, k_cache, v_cache, visible_end, span: as in :func:`ptq4arvg_kernels.attention`.
        layer: the layer's heads.
        positions: int32 or int64 ``[P]``.
        out_table: float32 ``[T, 4]``, of the layer that the codes go to.
        sums: int32 ``[B P]``, the row sums of the codes are added to it; None if nobody wants them.
    """
    batch, heads, period, head_dim = q.shape
    out = torch.empty(batch * period, heads * head_dim, dtype=torch.int8, device=q.device)
    _attend(q, k_cache, v_cache, visible_end, span, layer, _Output(out, out_table, positions, sums))
    return out


def append_attend_quantize(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    visible_end: Tensor,
    span: int,
    layer: Heads,
    positions: Tensor,
    out_table: Tensor,
    sums: Tensor | None = None,
) -> Tensor:
    """``qkv_append``, ``attention`` and ``quantize`` of a decode step, one position per sequence, in one launch.

    Args:
        qkv: float ``[B, 3 H d]``.
        k_cache, v_cache: int8 ``[B, H, S, dp]``, written at the position's slot.
        visible_end: int32 ``[1]``.
        positions: int32 or int64 ``[1]``; one without a slot appends nothing.
        span, layer, out_table, sums: as in :func:`attend_quantize`.

    Returns:
        codes int8 ``[B, H d]``.
    """
    out = torch.empty(len(qkv), layer.heads * layer.head_dim, dtype=torch.int8, device=qkv.device)
    output = _Output(out, out_table, positions, sums)
    _start_decode(qkv, k_cache, v_cache, visible_end, span, layer, output, append=True)
    return out
