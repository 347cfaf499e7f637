"""The key/value cache: append quantized keys and values, and attend over them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...tables import KV_BITS
from ...value_checks import check_distinct, check_index, check_positions, check_quant_rows
from .matmul import wide_dtype
from .quantize import Grid, grid_of, normalize, to_codes

L2_EPS = 1e-12  # as torch.nn.functional.normalize


def _slot_grid(op: str, name: str, table: Tensor, kv_group: Tensor, slots: Tensor) -> Grid:
    """Grid ``[H, n, 1]`` of the slots: row (group of slot, head) of a ``[G, H, 4]`` table."""
    groups = kv_group.index_select(0, slots)
    check_index(op, "kv_group", groups, table.shape[0], f"{name} has {table.shape[0]} groups")
    check_quant_rows(op, table, (KV_BITS,), name)
    return grid_of(table.index_select(0, groups).transpose(0, 1))


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    y = normalize(x, "layer", eps)
    if weight is not None:
        y = y * weight.to(torch.float32)
    return y if bias is None else y + bias.to(torch.float32)


def _l2(x: Tensor) -> Tensor:
    """``x / max(|x|, 1e-12)`` over the last dimension."""
    return x / x.square().sum(-1, keepdim=True).sqrt().clamp_min(L2_EPS)


def _rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate the pairs (2j, 2j + 1) of ``x [B, H, P, d]`` by ``cos_sin [P, d/2, 2]``.

    ``(a, b) -> (a cos - b sin, b cos + a sin)``; a row of zeros is no rotation and gives zeros, which models with
    condition tokens rely on.
    """
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_sin.to(torch.float32).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


def _write(cache: Tensor, codes: Tensor, slots: Tensor) -> None:
    """Copy ``codes [B, H, P, d]`` into the slots of ``cache [B, H, S, dp]``, zeros in the padding lanes."""
    cache.index_copy_(2, slots, F.pad(codes, (0, cache.shape[3] - codes.shape[3])))


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
    """``q, k, v = split(qkv); q, k = kind(q, k); cache[slot] = Q(k), Q(v)``; k is quantized from its float32 value.

    Nothing is written when a check fails. See :func:`ptq4arvg_kernels.ops.qkv_append`.
    """
    op = "qkv_append"
    capacity = k_cache.shape[2]
    check_index(op, "positions", positions, capacity, f"the cache has {capacity} slots: allocate one per position")
    check_positions(op, positions, kv_group.shape[0], "kv_group")
    check_distinct(op, positions)
    slots = positions.to(torch.int64)
    k_grid = _slot_grid(op, "k_table", k_table, kv_group, slots)
    v_grid = _slot_grid(op, "v_table", v_table, kv_group, slots)
    batch, period = k_cache.shape[0], positions.shape[0]
    head_dim = qkv.shape[1] // (3 * num_heads)
    split = qkv.to(torch.float32).reshape(batch, period, 3, num_heads, head_dim)
    q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
    if qk_kind == "layer_norm":
        q, k = _layer_norm(q, q_weight, q_bias, eps), _layer_norm(k, k_weight, k_bias, eps)
    elif qk_kind == "l2" and q_scale is not None:
        q, k = _l2(q) * q_scale.to(torch.float32).view(-1, 1, 1), _l2(k)
    elif qk_kind == "rope" and rope is not None:
        check_positions(op, positions, rope.shape[0], "rope")
        cos_sin = rope.index_select(0, slots)
        q, k = _rotate(q, cos_sin), _rotate(k, cos_sin)
    k_codes, v_codes = to_codes(op, k, k_grid), to_codes(op, v, v_grid)
    _write(k_cache, k_codes, slots)
    _write(v_cache, v_codes, slots)
    return q.to(qkv.dtype, memory_format=torch.contiguous_format, copy=True)


def _dequantize(cache: Tensor, grid: Grid, span: int, head_dim: int) -> Tensor:
    """``(code - zq) * delta`` of the first ``span`` slots, float32 ``[B, H, span, d]``: the subtraction is exact."""
    codes = cache[:, :, :span, :head_dim].to(torch.float32)
    return codes.sub_(grid.zq).mul_(grid.delta)


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
    """``out = softmax_j<visible_end[i](q . K^ * softmax_scale) . V^``; see :func:`ptq4arvg_kernels.ops.attention`.

    K^ and V^ are the float32 values every backend must have bit for bit. From there on the reference computes in
    float64 (where the device has it) and rounds once, so that its result does not depend on how many queries or slots
    one call covers: decoding token by token gives what one block gives.
    """
    op = "attention"
    check_index(op, "visible_end", visible_end, span, f"a query sees at least one slot and at most span = {span}", 1)
    batch, heads, period, head_dim = q.shape
    slots = torch.arange(span, device=q.device)
    wide = wide_dtype(q.device)
    keys = _dequantize(k_cache, _slot_grid(op, "k_table", k_table, kv_group, slots), span, head_dim).to(wide)
    values = _dequantize(v_cache, _slot_grid(op, "v_table", v_table, kv_group, slots), span, head_dim).to(wide)
    logits = (q.to(wide) @ keys.transpose(-1, -2)) * softmax_scale
    hidden = slots.unsqueeze(0) >= visible_end.unsqueeze(1)
    probabilities = torch.softmax(logits.masked_fill(hidden, float("-inf")), dim=-1)
    out = probabilities @ values
    return out.transpose(1, 2).reshape(batch * period, heads * head_dim).to(q.dtype)
