"""Layers and blocks prepared once, so that a decode step makes one call per block and allocates nothing.

A plan owns its weights in the kernels' order (csrc/cpu/pack.h) and keeps every other operand alive; the operands must
not be written to while the plan is in use. A call checks what it brings and returns False for bad data (a position
outside a table, a NaN), with nothing of the output defined; the operators, given the same, say what is wrong.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from ...plans import BlockOperands, NormOperands, PackedWeights
from .. import packed_layer
from ..views import ACTIVATIONS, QK_KINDS, SWIGLU, View, dense, maybe, norm_views, view
from . import native
from .native import OK, threads
from .weights import pack_panels, unpack_panels


class PackedLayer(packed_layer.PackedLayer):
    """Weights in the kernels' order."""

    def _pack(self, qweight: Tensor) -> Tensor:
        panels = pack_panels(qweight.contiguous(), self.w_bits, self.in_features, self.paired)
        if panels is None:
            raise ValueError(
                "the packed weights hold a byte that no weight has; the data is corrupt (a truncated file?): load again"
            )
        return panels

    def qweight(self) -> Tensor:
        return unpack_panels(self.packed, self.out_features, self.w_bits, self.in_features, self.paired)

    def native(self) -> dict[str, Any]:
        return {"panels": view(self.packed), **super().native()}


class LayerPlan:
    """A linear layer on floating-point rows: norm and modulation, or an activation; codes; products. One call.

    Args:
        layer: its weights.
        activation: applied before quantization when there is no norm.
        norm: the norm in front of it, or None.
    """

    def __init__(self, layer: PackedWeights, activation: str = "none", norm: NormOperands | None = None) -> None:
        self.layer, self.norm = layer, norm  # kept alive: the native plan holds addresses
        operands = cast(PackedLayer, layer).native() | {"activation": ACTIVATIONS[activation]}
        operands["norm"] = None if norm is None else norm_views(norm)
        self._run = native.module().Layer(operands).run

    def run(self, x: View, positions: View, modulation: View | None, modulation_rows: View | None, out: View) -> bool:
        """``out [M, N] = layer(x [M, K])``, all as views; False for bad data."""
        return bool(self._run(x, positions, modulation, modulation_rows, out, threads()) == OK)

    def __call__(
        self, x: Tensor, positions: Tensor, modulation: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor | None:
        """:meth:`run` on tensors, with a new output of x's dtype; None for bad data."""
        out = x.new_empty(x.shape[0], self.layer.out_features)
        good = self.run(view(x), view(positions), maybe(modulation), maybe(rows), view(out))
        return out if good else None


class BlockPlan:
    """A transformer block in one call (csrc/cpu/block.cpp).

    Raises:
        ValueError: operands that do not fit each other, or table rows outside the law.
    """

    def __init__(self, operands: BlockOperands) -> None:
        self.operands = operands  # kept alive: the native plan holds addresses
        o = operands
        vectors = ("q_weight", "q_bias", "k_weight", "k_bias", "q_scale", "rope", "k_table", "v_table", "kv_group")
        plan: dict[str, Any] = {name: dense(getattr(o, name)) for name in vectors}
        plan |= {name: getattr(o, name).native() for name in ("qkv", "proj", "fc1", "fc2")}
        plan |= {"norm1": norm_views(o.norm1), "norm2": norm_views(o.norm2)}
        plan |= {
            "heads": o.heads,
            "head_dim": o.head_dim,
            "activation": SWIGLU if o.activation == "swiglu" else ACTIVATIONS[o.activation],
            "qk_kind": QK_KINDS[o.qk_kind],
            "qk_eps": o.qk_eps,
            "softmax_scale": o.softmax_scale,
        }
        self._run = native.module().Block(plan).run
        # The stored form of this block's weights is free by now; loading should not pile it up block by block.
        native.module().release_freed_memory()

    def run(
        self,
        x: View,
        positions: View,
        visible_end: View,
        span: int,
        modulation: View | None,
        modulation_rows: View | None,
        k_cache: View,
        v_cache: View,
        out: View,
    ) -> bool:
        """``out = block(x)``, rows ``[M, D]`` of one dtype, all as views; out may be x itself. False for bad data."""
        status = self._run(
            x, positions, visible_end, span, modulation, modulation_rows, k_cache, v_cache, out, threads()
        )
        return bool(status == OK)

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
        """:meth:`run` on tensors, with a new output; None for bad data."""
        out = torch.empty_like(x)
        operands = (view(x), view(positions), view(visible_end), span, maybe(modulation), maybe(modulation_rows))
        return out if self.run(*operands, view(k_cache), view(v_cache), view(out)) else None
