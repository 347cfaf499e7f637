"""Layers and blocks prepared once: a decode step of a block is seven launches, and nothing waits for the device.

With one position per sequence::

    codes  = adaln_quant(x)                                          norm1, modulation
    qkv    = linear(codes)
    codes  = append, attend, quantize                                :func:`.attention.append_attend_quantize`
    x      = x + gate * linear(codes)                                proj
    codes  = adaln_quant(x)                                          norm2, modulation
    codes  = quantize(act(linear(codes)))                            fc1, or SwiGLU
    x      = x + gate * linear(codes)                                fc2

With several (prefixes, VAR's scales, PAR's groups), ``qkv_append`` is a launch of its own, the eighth: all new keys
must be in the cache before a query of the step reads them, and between thread blocks only a launch orders that.

Weights are signed, so that no product needs the row sums of its codes, and those that would cost atomics are not made.
Positions are read from device tensors only; outputs and scratch memory come from torch's allocator. A step can be
captured into a CUDA graph after one ordinary step on the stream that captures (:mod:`..scratch`), with a ``span`` that
covers the steps to come: what a query sees is in ``visible_end``.

A plan cannot look at data, so it never refuses; with ``PTQ4ARVG_DEBUG=1`` it leaves all calls to the operators, which
do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...plans import BlockOperands, NormOperands, PackedWeights
from .. import debug, packed_layer
from ..heads import Grouping, Heads
from .attention import append_attend_quantize, attend_quantize
from .linear import start_gemm
from .qkv import qkv_append
from .quantize import adaln_quant, quantize
from .weights import pack_tiles, unpack_tiles


class PackedLayer(packed_layer.PackedLayer):
    """Weights in the order of :mod:`.weights`."""

    def _pack(self, qweight: Tensor) -> Tensor:
        return pack_tiles(qweight, self.w_bits, self.in_features, self.paired)

    def qweight(self) -> Tensor:
        return unpack_tiles(self.packed, self.out_features, self.w_bits, self.in_features, self.paired)


def _multiply(
    layer: PackedWeights, codes: Tensor, positions: Tensor, epilogue: str, out: Tensor, **rest: Any
) -> Tensor:
    assert isinstance(layer, PackedLayer)
    operands = (
        codes,
        None,
        None,
        layer.w_bits,
        layer.in_features,
        layer.w_scale,
        layer.col_sums,
        layer.bias,
        layer.table,
        positions,
    )
    start_gemm("linear", epilogue, operands, out, w=layer.packed, **rest)
    return out


def _chunk(modulation: Tensor | None, index: int, width: int) -> Tensor | None:
    return None if modulation is None or index < 0 else modulation[:, index * width : (index + 1) * width]


def _norm_codes(
    x: Tensor, norm: NormOperands, modulation: Tensor | None, rows: Tensor | None, table: Tensor, positions: Tensor
) -> Tensor:
    width = x.shape[1]
    scale, shift = _chunk(modulation, norm.scale, width), _chunk(modulation, norm.shift, width)
    index = None if scale is None else rows
    offset = norm.scale_offset
    affine = (norm.weight, norm.bias)
    return adaln_quant(x, norm.kind, norm.eps, *affine, scale, shift, index, offset, table, positions)[0]


class LayerPlan:
    """A linear layer on floating-point rows in two launches, see :class:`ptq4arvg_kernels.plans.LayerPlan`."""

    def __init__(self, layer: PackedWeights, activation: str = "none", norm: NormOperands | None = None) -> None:
        self.layer, self.activation, self.norm = layer, activation, norm

    def __call__(
        self, x: Tensor, positions: Tensor, modulation: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor | None:
        """``layer(x [M, K])`` of x's dtype, ``[M, N]``; None where the operators should look at the data."""
        if debug.enabled(x):
            return None
        if self.norm is None:
            codes, _ = quantize(x, self.layer.table, positions, self.activation)
        else:
            codes = _norm_codes(x, self.norm, modulation, rows, self.layer.table, positions)
        out = x.new_empty(len(x), self.layer.out_features)
        return _multiply(self.layer, codes, positions, "store", out)


class BlockPlan:
    """A transformer block, see the module and :class:`ptq4arvg_kernels.plans.BlockPlan`."""

    def __init__(self, operands: BlockOperands) -> None:
        self.operands = o = operands
        self.heads = Heads(
            o.heads,
            o.head_dim,
            o.k_table,
            o.v_table,
            o.kv_group,
            o.softmax_scale,
            Grouping.of_data(o.kv_group, o.k_table),
            o.qk_kind,
            o.qk_eps,
            o.q_weight,
            o.q_bias,
            o.k_weight,
            o.k_bias,
            o.q_scale,
            o.rope,
        )

    def _attend(
        self, qkv: Tensor, k_cache: Tensor, v_cache: Tensor, visible_end: Tensor, span: int, positions: Tensor
    ) -> Tensor:
        """Codes of attention's output ``[M, H d]``, the input of proj."""
        o, table = self.operands, self.operands.proj.table
        if len(positions) == 1:
            return append_attend_quantize(qkv, k_cache, v_cache, visible_end, span, self.heads, positions, table)
        vectors = (o.q_weight, o.q_bias, o.k_weight, o.k_bias, o.q_scale, o.rope)
        tables = (o.k_table, o.v_table, o.kv_group)
        q = qkv_append(qkv, k_cache, v_cache, positions, *tables, o.heads, o.qk_kind, *vectors, o.qk_eps)
        return attend_quantize(q, k_cache, v_cache, visible_end, span, self.heads, positions, table)

    def __call__(
        self,
        x: Tensor,
        positions: Tensor,
        visible_end: Tensor,
        span: int,
        modulation: Tensor | None,
        modulation_rows: Tensor | None,
        k_cache: Tensor,
        v_cache: Tensor,
    ) -> Tensor | None:
        """``block(x [M, D])`` as a new tensor; None where the operators should look at the data."""
        if debug.enabled(x):
            return None
        o = self.operands
        rows, width = x.shape

        def add(stream: Tensor, layer: PackedWeights, codes: Tensor, norm: NormOperands) -> Tensor:
            gate = _chunk(modulation, norm.gate, width)
            index = None if gate is None else modulation_rows
            out = torch.empty_like(stream)
            rest: dict[str, Any] = {"gate": gate, "gate_rows": index, "residual": stream}
            return _multiply(layer, codes, positions, "gate_residual", out, **rest)

        codes = _norm_codes(x, o.norm1, modulation, modulation_rows, o.qkv.table, positions)
        qkv = _multiply(o.qkv, codes, positions, "store", x.new_empty(rows, o.qkv.out_features))
        codes = self._attend(qkv, k_cache, v_cache, visible_end, span, positions)
        x = add(x, o.proj, codes, o.norm1)

        codes = _norm_codes(x, o.norm2, modulation, modulation_rows, o.fc1.table, positions)
        hidden = codes.new_empty(rows, o.fc2.in_features)
        if o.activation == "swiglu":
            _multiply(o.fc1, codes, positions, "swiglu_quant", hidden, out_table=o.fc2.table)
        else:
            _multiply(o.fc1, codes, positions, "quant", hidden, activation=o.activation, out_table=o.fc2.table)
        return add(x, o.fc2, hidden, o.norm2)
