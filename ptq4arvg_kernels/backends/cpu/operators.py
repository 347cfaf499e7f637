"""The operators on the compiled kernels.

The kernels check the data they are given (indices, table rows, code ranges, row sums, finite values) and report only
that something is wrong. The reference backend, given the same arguments, then says what: it reads everything and writes
nothing before its checks have passed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import reference
from ..views import ACTIVATIONS, NORMS, QK_KINDS, SWIGLU, maybe, view
from . import native
from .native import OK, threads
from .weights import panels_of


def _explain(op: Callable[..., Any], *args: Any) -> NoReturn:
    op(*args)
    raise RuntimeError(
        f"{op.__name__}: the CPU kernels refused operands in which the reference finds nothing wrong; please report it"
    )


def _codes(rows: int, width: int) -> tuple[Tensor, Tensor]:
    return torch.empty(rows, width, dtype=torch.int8), torch.empty(rows, dtype=torch.int32)


def quantize(x: Tensor, table: Tensor, positions: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """See :func:`ptq4arvg_kernels.ops.quantize`."""
    codes, sums = _codes(*x.shape)
    status = native.module().quantize(
        view(x), ACTIVATIONS[activation], view(table), view(positions), view(codes), view(sums), threads()
    )
    if status != OK:
        _explain(reference.quantize, x, table, positions, activation)
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
    codes, sums = _codes(*x.shape)
    status = native.module().adaln_quant(
        view(x),
        NORMS[norm_kind],
        eps,
        maybe(weight),
        maybe(bias),
        maybe(mod_scale),
        maybe(mod_shift),
        maybe(mod_rows),
        scale_offset,
        view(table),
        view(positions),
        view(codes),
        view(sums),
        threads(),
    )
    if status != OK:
        arguments = (x, norm_kind, eps, weight, bias, mod_scale, mod_shift, mod_rows, scale_offset, table, positions)
        _explain(reference.adaln_quant, *arguments)
    return codes, sums


def _operands(layer: Sequence[Any], activation: int = ACTIVATIONS["none"]) -> tuple[Any, ...] | None:
    """The leading arguments of the compiled linear functions, or None if the weights are corrupt.

    ``layer``: the leading arguments of the operators, from ``codes`` to ``positions``.
    """
    codes, row_sums, qweight, w_bits, in_features, w_scale, col_sums, bias, table, positions = layer
    panels = panels_of(qweight, w_bits, in_features, paired=activation == SWIGLU)
    if panels is None:
        return None
    return (
        view(codes),
        view(row_sums),
        view(panels),
        w_bits,
        qweight.shape[0],
        in_features,
        view(w_scale),
        view(col_sums),
        maybe(bias),
        view(table),
        view(positions),
    )


def linear(*args: Any) -> Tensor:
    """See :func:`ptq4arvg_kernels.ops.linear`."""
    *layer, activation, out_dtype = args
    codes, _, qweight, *_ = layer
    operands = _operands(layer)
    out = torch.empty(codes.shape[0], qweight.shape[0], dtype=out_dtype)
    if operands is None or native.module().linear(*operands, ACTIVATIONS[activation], view(out), threads()) != OK:
        _explain(reference.linear, *args)
    return out


def _quantizing(layer: list[Any], activation: int, out_table: Tensor) -> tuple[Tensor, Tensor] | None:
    operands = _operands(layer, activation)
    codes, _, qweight, *_ = layer
    out, sums = _codes(codes.shape[0], qweight.shape[0] // (2 if activation == SWIGLU else 1))
    if operands is None:
        return None
    status = native.module().linear_quant(*operands, activation, view(out_table), view(out), view(sums), threads())
    return (out, sums) if status == OK else None


def linear_quant(*args: Any) -> tuple[Tensor, Tensor]:
    """See :func:`ptq4arvg_kernels.ops.linear_quant`."""
    *layer, activation, out_table = args
    result = _quantizing(layer, ACTIVATIONS[activation], out_table)
    return _explain(reference.linear_quant, *args) if result is None else result


def linear_swiglu_quant(*args: Any) -> tuple[Tensor, Tensor]:
    """See :func:`ptq4arvg_kernels.ops.linear_swiglu_quant`."""
    *layer, out_table = args
    result = _quantizing(layer, SWIGLU, out_table)
    return _explain(reference.linear_swiglu_quant, *args) if result is None else result


def linear_gate_residual(*args: Any) -> Tensor:
    """See :func:`ptq4arvg_kernels.ops.linear_gate_residual`."""
    *layer, gate, gate_rows, residual = args
    operands = _operands(layer)
    out = torch.empty_like(residual)
    if (
        operands is None
        or native.module().linear_gate_residual(
            *operands, maybe(gate), maybe(gate_rows), view(residual), view(out), threads()
        )
        != OK
    ):
        _explain(reference.linear_gate_residual, *args)
    return out


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
    options = (q_weight, q_bias, k_weight, k_bias, q_scale, rope)
    status = native.module().qkv_append(
        view(qkv), *map(view, cache), num_heads, QK_KINDS[qk_kind], *map(maybe, options), eps, view(q), threads()
    )
    if status != OK:
        _explain(reference.qkv_append, qkv, *cache, num_heads, qk_kind, *options, eps)
    return q


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
    out = q.new_empty(batch * period, heads * head_dim)
    status = native.module().attention(
        view(q),
        view(k_cache),
        view(v_cache),
        view(visible_end),
        span,
        view(k_table),
        view(v_table),
        view(kv_group),
        softmax_scale,
        view(out),
        threads(),
    )
    if status != OK:
        _explain(reference.attention, q, k_cache, v_cache, visible_end, span, k_table, v_table, kv_group, softmax_scale)
    return out
