"""The operators on the compiled kernels: outputs, workspaces, one call of the module."""

from __future__ import annotations

import torch
from torch import Tensor

from ..views import ACTIVATIONS, NORMS, QK_KINDS
from . import native
from .attention import attention as attention


def _codes(like: Tensor, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Memory for codes int8 ``[rows, width]`` and their sums int32 ``[rows]``."""
    return like.new_empty((rows, width), dtype=torch.int8), like.new_empty((rows,), dtype=torch.int32)


def quantize(x: Tensor, table: Tensor, positions: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """See :func:`ptq4arvg_kernels.ops.quantize`."""
    codes, sums = _codes(x, *x.shape)
    native.run("quantize", x.device, x, ACTIVATIONS[activation], table, positions, codes, sums)
    return codes, sums


def adaln_quant(
    x: Tensor,
    norm_kind: str,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    mod_scale: Tensor | None,
    mod_shift: Tensor | None,
    mod_rows: Tensor | None,
    scale_offset: float,
    table: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """See :func:`ptq4arvg_kernels.ops.adaln_quant`."""
    codes, sums = _codes(x, *x.shape)
    modulation = (mod_scale, mod_shift, mod_rows, scale_offset)
    norm = (NORMS[norm_kind], eps, weight, bias)
    native.run("adaln_quant", x.device, x, *norm, *modulation, table, positions, codes, sums)
    return codes, sums


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
    q = qkv.new_empty(k_cache.shape[0], num_heads, positions.shape[0], qkv.shape[1] // (3 * num_heads))
    cache = (k_cache, v_cache, positions, k_table, v_table, kv_group)
    vectors = (q_weight, q_bias, k_weight, k_bias, q_scale, rope)
    native.run("qkv_append", qkv.device, qkv, *cache, num_heads, QK_KINDS[qk_kind], *vectors, eps, q)
    return q
