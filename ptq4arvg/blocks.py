"""Integer execution of a transformer block and of the head.

One class serves all families, driven by the model's own description.

Between two linears nothing is written in floating point that does not have to be: the norm hands over int8 codes, fc1
hands codes to fc2, the projections add gate·y to the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ptq4arvg.kv_cache import Int8KVCache
from ptq4arvg.linear import QuantLinear
from ptq4arvg.nn import Condition, Norm, Window
from ptq4arvg.protocol import BlockSpec, HeadSpec, Modulation
from ptq4arvg_kernels import (
    adaln_quant,
    attention,
    linear,
    linear_gate_residual,
    linear_quant,
    linear_swiglu_quant,
    qkv_append,
    quantize,
)
from ptq4arvg_kernels.plans import BlockOperands, BlockPlan, LayerPlan, NormOperands
from ptq4arvg_kernels.registry import Served, serving
from ptq4arvg_kernels.tables import make_kv_table

__all__ = ["QuantBlock", "QuantHead", "prepare", "restore"]


def prepare(model: nn.Module) -> bool:
    """Prepare every quantized layer, block and head of ``model`` for the backend that serves its device.

    Weights go, layer by layer, into that backend's own order and blocks become one call each. Results, state dicts and
    saved files stay the same. Returns whether a backend offers this; if none does, operators are called one by one.
    """
    served = False
    for module in model.modules():
        if isinstance(module, QuantBlock | QuantHead):
            served = module.prepare() or served
    return served


def restore(model: nn.Module) -> None:
    """Undo :func:`prepare`: weights as stored, operators one by one, as ``torch.export`` needs them."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.restore()
        elif isinstance(module, QuantBlock | QuantHead):
            module.plan = None


def _norm_operands(norm: Norm, spec: Modulation | None, gate: bool = True) -> NormOperands:
    chunks = (-1, -1, -1)
    if spec is not None:
        chunks = (spec.scale, spec.shift, spec.gate if gate and spec.gate is not None else -1)
    return NormOperands(norm.kind, norm.eps, norm.weight, norm.bias, norm.scale_offset, *chunks)


def _modulation(layer: QuantLinear, condition: Condition) -> Tensor:
    """Modulation channels ``[R, chunks·D]`` of the distinct conditions."""
    return layer(condition.values, condition.positions)


def _chunk(modulation: Tensor, index: int, width: int) -> Tensor:
    return modulation[:, index * width : (index + 1) * width]


def _norm_codes(
    x: Tensor,
    norm: Norm,
    spec: Modulation | None,
    modulation: Tensor | None,
    rows: Tensor | None,
    table: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    scale = shift = None
    if spec is not None and modulation is not None:
        scale, shift = _chunk(modulation, spec.scale, norm.dim), _chunk(modulation, spec.shift, norm.dim)
    return adaln_quant(
        x,
        norm.kind,
        norm.eps,
        norm.weight,
        norm.bias,
        scale,
        shift,
        None if scale is None else rows,
        norm.scale_offset,
        table,
        positions,
    )


class QuantBlock(nn.Module):
    """A block in integers: linears of any supported width, INT8 keys and values, position tables.

    Args:
        spec: the model's description of the block.
        norm1, norm2, q_norm, k_norm: the (folded) norms; the latter two None unless the description has them.
        layers: the quantized linears by role: ``qkv, proj, fc1, fc2`` and, with modulation, ``adaln``.
        k_params, v_params: ``(delta float32 [G, H], zero_point [G, H])`` of keys and values.
        kv_group: int ``[T]``, group of every slot.
    """

    def __init__(
        self,
        spec: BlockSpec,
        norm1: Norm,
        norm2: Norm,
        q_norm: Norm | None,
        k_norm: Norm | None,
        layers: dict[str, QuantLinear],
        k_params: tuple[Tensor, Tensor],
        v_params: tuple[Tensor, Tensor],
        kv_group: Tensor,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.norm1, self.norm2, self.q_norm, self.k_norm = norm1, norm2, q_norm, k_norm
        self.adaln = layers.get("adaln")
        self.qkv, self.proj, self.fc1, self.fc2 = (layers[role] for role in ("qkv", "proj", "fc1", "fc2"))
        for name, (delta, zero_point) in (("k", k_params), ("v", v_params)):
            self.register_buffer(f"{name}_delta", delta.float())
            self.register_buffer(f"{name}_zero_point", zero_point.to(torch.int16))
            self.register_buffer(f"{name}_table", torch.zeros(*delta.shape, 4), persistent=False)
        self.register_buffer("kv_group", kv_group.to(torch.int32))
        self.k_delta: Tensor
        self.k_zero_point: Tensor
        self.k_table: Tensor
        self.v_delta: Tensor
        self.v_zero_point: Tensor
        self.v_table: Tensor
        self.kv_group: Tensor
        self.plan: BlockPlan | None = None
        self._served: Served | None = None
        self.refresh()

    def _layers(self) -> dict[str, QuantLinear]:
        return {"qkv": self.qkv, "proj": self.proj, "fc1": self.fc1, "fc2": self.fc2}

    def prepare(self) -> bool:
        """See :func:`prepare`."""
        self.plan = None
        swiglu = self.spec.activation == "swiglu"
        ready = [layer.prepare(paired=swiglu and role == "fc1") for role, layer in self._layers().items()]
        if self.adaln is not None:
            ready.append(self.adaln.prepare())
        backend = serving("block", self.qkv.call_spec(torch.float32))
        if not all(ready) or backend is None:
            return False
        attention, q_norm, k_norm = self.spec.attention, self.q_norm, self.k_norm
        operands = BlockOperands(
            heads=attention.heads,
            head_dim=attention.head_dim,
            norm1=_norm_operands(self.norm1, self.spec.modulation1),
            norm2=_norm_operands(self.norm2, self.spec.modulation2),
            **{role: layer.packed for role, layer in self._layers().items()},  # type: ignore[arg-type]
            activation=self.spec.activation,
            qk_kind=attention.qk_kind,
            qk_eps=0.0 if q_norm is None else q_norm.eps,
            q_weight=None if q_norm is None else q_norm.weight,
            q_bias=None if q_norm is None else q_norm.bias,
            k_weight=None if k_norm is None else k_norm.weight,
            k_bias=None if k_norm is None else k_norm.bias,
            q_scale=None,
            rope=None,
            k_table=self.k_table,
            v_table=self.v_table,
            kv_group=self.kv_group,
            softmax_scale=attention.softmax_scale,
        )
        self.plan = backend.implementations["block"](operands)
        self._served = Served("block", self.qkv.call_spec)
        return True

    def planned(self, dtype: torch.dtype) -> bool:
        """Whether what :meth:`prepare` made serves the next call: same operands, same backend."""
        if self.plan is None or self._served is None or torch.compiler.is_compiling():
            return False
        known = self.plan.operands
        pairs: list[tuple[Any, Any]] = [(layer.packed, getattr(known, role)) for role, layer in self._layers().items()]
        pairs += [(self.k_table, known.k_table), (self.v_table, known.v_table), (self.kv_group, known.kv_group)]
        for norm, kept in ((self.norm1, known.norm1), (self.norm2, known.norm2)):
            pairs += [(norm.weight, kept.weight), (norm.bias, kept.bias)]
            if norm.scale_offset != kept.scale_offset:
                return False
        if self.q_norm is not None and self.k_norm is not None:
            pairs += [(self.q_norm.weight, known.q_weight), (self.q_norm.bias, known.q_bias)]
            pairs += [(self.k_norm.weight, known.k_weight), (self.k_norm.bias, known.k_bias)]
        if any(mine is not planned for mine, planned in pairs):
            return False
        return self._served(dtype) is not None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantBlock:
        self.plan = None
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"plan": None, "_served": None}

    def refresh(self) -> None:
        """Derive the key and value tables from the saved parameters.

        Raises:
            ValueError: parameters outside the law, or a slot in a group that does not exist.
        """
        groups = len(self.k_delta)
        outside = self.kv_group[(self.kv_group < 0) | (self.kv_group >= groups)]
        if len(outside):
            raise ValueError(f"kv_group contains {int(outside[0])}, valid groups are 0 to {groups - 1}")
        self.k_table = make_kv_table(self.k_delta, self.k_zero_point)
        self.v_table = make_kv_table(self.v_delta, self.v_zero_point)

    def new_cache(self, batch: int, slots: int) -> Int8KVCache:
        spec = self.spec.attention
        return Int8KVCache(batch, spec.heads, slots, spec.head_dim, self.kv_group.device)

    def forward(
        self, x: Tensor, condition: Condition | None, window: Window, cache: Int8KVCache | None = None
    ) -> Tensor:
        """``x`` float ``[B, P, D]``; returns the same shape. Without a cache the window must start at position 0.

        Raises:
            ValueError: no cache, although the window looks at slots that it does not compute.
        """
        batch, length, width = x.shape
        if cache is None:
            if window.span > length:
                raise ValueError(
                    f"a window of {length} positions looking at {window.span} slots needs a cache of the earlier ones"
                )
            cache = self.new_cache(batch, window.span)
        positions = window.positions
        modulation = rows = None
        if self.adaln is not None and condition is not None:
            modulation, rows = _modulation(self.adaln, condition), condition.rows
        stream = x.reshape(batch * length, width)
        if self.plan is not None and self.planned(x.dtype):
            ends = window.visible_end.contiguous()
            cond = None if rows is None else rows.contiguous()
            operands = (stream.contiguous(), positions.contiguous(), ends, window.span, modulation, cond)
            planned = self.plan(*operands, cache.k, cache.v)
            if planned is not None:
                return planned.view(batch, length, width)
        # One operator at a time; after a plan that refused its input, these say what is wrong.
        codes, sums = _norm_codes(
            stream, self.norm1, self.spec.modulation1, modulation, rows, self.qkv.table, positions
        )
        qkv = linear(*self.qkv.operands(codes, sums, positions), "none", x.dtype)
        mixed = self._attention(qkv, window, cache)
        codes, sums = quantize(mixed, self.proj.table, positions)
        stream = self._add(self.proj, codes, sums, positions, self.spec.modulation1, modulation, rows, stream)

        codes, sums = _norm_codes(
            stream, self.norm2, self.spec.modulation2, modulation, rows, self.fc1.table, positions
        )
        if self.spec.activation == "swiglu":
            codes, sums = linear_swiglu_quant(*self.fc1.operands(codes, sums, positions), self.fc2.table)
        else:
            activation: Any = self.spec.activation
            codes, sums = linear_quant(*self.fc1.operands(codes, sums, positions), activation, self.fc2.table)
        stream = self._add(self.fc2, codes, sums, positions, self.spec.modulation2, modulation, rows, stream)
        return stream.view(batch, length, width)

    def _attention(self, qkv: Tensor, window: Window, cache: Int8KVCache) -> Tensor:
        spec = self.spec.attention
        tables = (self.k_table, self.v_table, self.kv_group)
        affine: dict[str, Any] = {}
        if self.q_norm is not None and self.k_norm is not None:
            affine = {
                "q_weight": self.q_norm.weight,
                "q_bias": self.q_norm.bias,
                "k_weight": self.k_norm.weight,
                "k_bias": self.k_norm.bias,
                "eps": self.q_norm.eps,
            }
        kind: Any = spec.qk_kind
        q = qkv_append(qkv, cache.k, cache.v, window.positions, *tables, spec.heads, kind, **affine)
        return attention(q, cache.k, cache.v, window.visible_end, window.span, *tables, spec.softmax_scale)

    def _add(
        self,
        layer: QuantLinear,
        codes: Tensor,
        sums: Tensor,
        positions: Tensor,
        spec: Modulation | None,
        modulation: Tensor | None,
        rows: Tensor | None,
        stream: Tensor,
    ) -> Tensor:
        gate = None
        if spec is not None and spec.gate is not None and modulation is not None:
            gate = _chunk(modulation, spec.gate, layer.out_features)
        return linear_gate_residual(
            *layer.operands(codes, sums, positions), gate, None if gate is None else rows, stream
        )


class QuantHead(nn.Module):
    """The last norm with its modulation and the logits' linear, in integers.

    Args:
        spec: the model's description of its head.
        norm: the (folded) norm.
        adaln: the modulation's linear, or None.
        linear: the logits' linear.
    """

    def __init__(self, spec: HeadSpec, norm: Norm, adaln: QuantLinear | None, linear: QuantLinear) -> None:
        super().__init__()
        self.spec = spec
        self.norm, self.adaln, self.linear = norm, adaln, linear
        self.plan: LayerPlan | None = None

    def prepare(self) -> bool:
        """See :func:`prepare`."""
        self.plan = None
        ready = self.linear.prepare() and (self.adaln is None or self.adaln.prepare())
        backend = serving("layer", self.linear.call_spec(torch.float32))
        if not ready or backend is None:
            return False
        norm = _norm_operands(self.norm, self.spec.modulation, gate=False)
        self.plan = backend.implementations["layer"](self.linear.packed, "none", norm)
        return True

    def planned(self, dtype: torch.dtype) -> bool:
        """Whether what :meth:`prepare` made serves the next call: same operands, same backend."""
        plan, norm = self.plan, self.norm
        if plan is None or plan.norm is None or plan.layer is not self.linear.packed or not self.linear.planned(dtype):
            return False
        same = plan.norm.weight is norm.weight and plan.norm.bias is norm.bias
        return same and plan.norm.scale_offset == norm.scale_offset

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantHead:
        self.plan = None
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"plan": None}

    def forward(self, x: Tensor, condition: Condition | None, positions: Tensor) -> Tensor:
        """Logits ``[B, P, V]`` of x ``[B, P, D]``."""
        batch, length, width = x.shape
        modulation = rows = None
        if self.adaln is not None and condition is not None:
            modulation, rows = _modulation(self.adaln, condition), condition.rows
        stream = x.reshape(batch * length, width)
        if self.plan is not None and self.planned(x.dtype):
            cond = None if rows is None else rows.contiguous()
            planned = self.plan(stream.contiguous(), positions.contiguous(), modulation, cond)
            if planned is not None:
                return planned.view(batch, length, -1)
        codes, sums = _norm_codes(
            stream,
            self.norm,
            self.spec.modulation,
            modulation,
            rows,
            self.linear.table,
            positions,
        )
        return linear(*self.linear.operands(codes, sums, positions), "none", x.dtype).view(batch, length, -1)
