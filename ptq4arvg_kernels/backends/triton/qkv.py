"""``qkv_append``: split qkv, normalize or rotate q and k, write k and v as codes into their cache slots."""

from __future__ import annotations

import math
from typing import Any

import triton
from torch import Tensor

from .launch import Launch, start
from .qkv_kernels import qkv_append_kernel
from .support import require_rows

TILE = 512  # values of q, k or v that a block holds


def cache_arguments(k_cache: Tensor, v_cache: Tensor) -> dict[str, Any]:
    """The caches and the strides of their free dimensions, as kernels name them."""
    return {
        "k_cache": k_cache,
        "v_cache": v_cache,
        "k_batch": k_cache.stride(0),
        "k_head": k_cache.stride(1),
        "v_batch": v_cache.stride(0),
        "v_head": v_cache.stride(1),
    }


def slots_of(k_cache: Tensor, kv_group: Tensor, rope: Tensor | None) -> int:
    """Positions that have a slot in the cache, a group, and a rotation where there is one."""
    limits = [k_cache.shape[2], len(kv_group)]
    return min(limits if rope is None else [*limits, len(rope)])


def qkv_append(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    k_table: Tensor,
    v_table: Tensor,
    kv_group: Tensor,
    num_heads: int,
    qk_kind: str,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    q_scale: Tensor | None,
    rope: Tensor | None,
    eps: float,
) -> Tensor:
    """See :func:`ptq4arvg_kernels.ops.qkv_append`."""
    rows, period = len(qkv), len(positions)
    if rows:
        require_rows("qkv_append", k_table=k_table, k_cache=k_cache[0, 0], kv_group=kv_group, rope=rope)
    head_dim = qkv.shape[1] // (3 * num_heads)
    q = qkv.new_empty(k_cache.shape[0], num_heads, period, head_dim)
    lanes = triton.next_power_of_2(k_cache.shape[3])
    heads_per_block = min(max(1, TILE // lanes), triton.next_power_of_2(num_heads))
    start(
        Launch(
            qkv_append_kernel,
            (rows, triton.cdiv(num_heads, heads_per_block)),
            {
                "qkv": qkv,
                "q": q,
                **cache_arguments(k_cache, v_cache),
                "positions": positions,
                "k_table": k_table,
                "v_table": v_table,
                "kv_group": kv_group,
                "q_weight": q_weight,
                "q_bias": q_bias,
                "k_weight": k_weight,
                "k_bias": k_bias,
                "q_scale": q_scale,
                "rope": rope,
                "period": period,
                "heads": num_heads,
                "slots": slots_of(k_cache, kv_group, rope),
                "groups": len(k_table),
                "eps": float(eps),
            },
            {
                "KIND": qk_kind,
                "HEAD_DIM": head_dim,
                "PADDED": k_cache.shape[3],
                "LANES": lanes,
                "ROWS": heads_per_block,
                "VECTOR": math.gcd(16, head_dim * qkv.element_size()) // qkv.element_size(),
            },
            num_warps=1,
            num_stages=1,
        )
    )
    return q
