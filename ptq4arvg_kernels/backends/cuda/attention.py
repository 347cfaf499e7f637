"""``attention`` over the INT8 cache, and the fused attention of a decode step: plans, workspaces, one call each."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..heads import Grouping, Heads
from ..scratch import counters
from ..views import QK_KINDS
from . import native, support

GROUPINGS = {"one": 0, "step": 1, "table": 2}  # numbers of csrc/cuda/attention_params.h


class Schedule(NamedTuple):
    """How attention is cut into thread blocks (csrc/cuda/attention_plan.h).

    Attributes:
        kernel: its name.
        queries: per block, at most.
        warps: per block.
        splits: blocks that share the slots of a tile of queries.
    """

    kernel: str
    queries: int
    warps: int
    splits: int


@functools.lru_cache(maxsize=1024)
def schedule(pairs: int, period: int, span: int, lanes: int, device: tuple[int, int, int]) -> Schedule:
    """The plan of a launch.

    Args:
        pairs: sequences times heads.
        period: queries per pair, P.
        span: slots at most.
        lanes: bytes of a cached vector.
        device: as :func:`.support.device_info`.

    Raises:
        ValueError: the sizes are not possible.
    """
    return Schedule(*native.module().plan_attention(pairs, period, span, lanes, device))


def _scratch(q: Tensor, pairs: int, period: int, lanes: int, plan: Schedule) -> tuple[Tensor | None, Tensor | None]:
    if plan.splits == 1:
        return None, None
    floats, count = native.module().attention_scratch(pairs, period, lanes, plan.warps, plan.splits)
    return torch.empty(floats, dtype=torch.float32, device=q.device), counters(q.device, count)


def _start(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    visible_end: Tensor,
    span: int,
    layer: Heads,
    out: Tensor,
    append: bool = False,
    out_table: Tensor | None = None,
    positions: Tensor | None = None,
    sums: Tensor | None = None,
) -> None:
    pairs, period, lanes = k_cache.shape[0] * layer.heads, len(visible_end), k_cache.shape[3]
    if pairs * period == 0:
        return
    plan = schedule(pairs, period, span, lanes, support.device_info(q.device))
    vectors: tuple[Any, ...] = (layer.q_weight, layer.q_bias, layer.k_weight, layer.k_bias, layer.q_scale, layer.rope)
    native.run(
        "attention",
        q.device,
        q,
        k_cache,
        v_cache,
        visible_end,
        span,
        layer.k_table,
        layer.v_table,
        layer.kv_group,
        layer.softmax_scale,
        layer.heads,
        GROUPINGS[layer.grouping.kind],
        layer.grouping.edge,
        QK_KINDS[layer.qk_kind] if append else None,
        *(vectors if append else [None] * len(vectors)),
        layer.eps,
        out,
        out_table,
        positions,
        sums,
        plan.warps,
        plan.splits,
        *_scratch(q, pairs, period, lanes, plan),
    )


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
    layer = Heads(heads, head_dim, k_table, v_table, kv_group, softmax_scale, Grouping.of_metadata(k_table))
    out = q.new_empty(batch * period, heads * head_dim)
    _start(q, k_cache, v_cache, visible_end, span, layer, out)
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
    out = q.new_empty((batch * period, heads * head_dim), dtype=torch.int8)
    _start(q, k_cache, v_cache, visible_end, span, layer, out, False, out_table, positions, sums)
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
    out = qkv.new_empty((len(qkv), qkv.shape[1] // 3), dtype=torch.int8)
    _start(qkv, k_cache, v_cache, visible_end, span, layer, out, True, out_table, positions, sums)
    return out
