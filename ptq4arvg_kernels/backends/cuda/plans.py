"""Layers and blocks prepared once: a call of the compiled module per block and step, which starts all its launches.

Operands are checked when a plan is made. A call brings numbers and addresses; what its tensors must look like is
checked here, and their data is not looked at: with ``PTQ4ARVG_DEBUG=1`` a plan leaves all calls to the operators, which
do.

A step can be captured into a CUDA graph after one ordinary step on the stream that captures (:mod:`..scratch`), with a
``span`` that covers the steps to come: what a query sees is in ``visible_end``.
"""

from __future__ import annotations

import weakref
from typing import Any, cast

import torch
from torch import Tensor

from ...checks import FLOAT_DTYPES, INDEX_DTYPES, check_rows_divisible, check_tensor
from ...plans import BlockOperands, NormOperands, PackedWeights
from .. import debug, packed_layer
from ..heads import Grouping
from ..scratch import counters
from ..views import ACTIVATIONS, ELEMENTS, QK_KINDS, SWIGLU, dense, norm_views, view
from . import native, support
from .attention import GROUPINGS
from .weights import pack_bricks, unpack_bricks

_INT8 = (torch.int8,)
_INT32 = (torch.int32,)
_NO_MODULATION = (0, 0, 0, 0, 0)


class PackedLayer(packed_layer.PackedLayer):
    """Weights in the order of :mod:`.weights`."""

    def _pack(self, qweight: Tensor) -> Tensor:
        return pack_bricks(qweight, self.w_bits, self.in_features, self.paired)

    def qweight(self) -> Tensor:
        return unpack_bricks(self.packed, self.out_features, self.w_bits, self.in_features, self.paired)

    def native(self) -> dict[str, Any]:
        return {"weights": view(self.packed.view(-1)), **super().native()}

    def operands(self) -> list[Tensor | None]:
        """The tensors whose addresses the compiled module keeps."""
        return [self.packed, self.w_scale, self.col_sums, self.bias, self.table]


def _rows(op: str, x: Tensor, width: int) -> int:
    if x.dim() != 2 or x.shape[1] != width or x.dtype not in FLOAT_DTYPES or not x.is_contiguous():
        check_tensor(op, "x", x, FLOAT_DTYPES, (None, width), "[M, K]")
        raise ValueError(f"{op}: x is not contiguous; pass x.contiguous()")
    return x.shape[0]


def _positions(op: str, positions: Tensor, rows: int) -> tuple[int, bool, int]:
    """Address, whether int64, and number of the positions."""
    count = positions.numel()
    wide = positions.dtype is torch.int64
    good = positions.dim() == 1 and (wide or positions.dtype is torch.int32) and positions.is_contiguous()
    if not good or count == 0 or rows % count:
        check_tensor(op, "positions", positions, INDEX_DTYPES, (None,), "[P]")
        check_rows_divisible(op, rows, count)
        raise ValueError(f"{op}: positions are not contiguous; pass positions.contiguous()")
    return positions.data_ptr(), wide, count


def _modulation(
    op: str, modulation: Tensor | None, index: Tensor | None, rows: int, chunks: int, width: int
) -> tuple[int, int, int, int, int]:
    """Address, dtype, rows and stride of the modulation, address of the row map."""
    if modulation is None and not chunks:
        return _NO_MODULATION
    if modulation is None or not chunks:
        raise ValueError(
            f"{op}: modulation is missing" if chunks else f"{op}: modulation has nothing to modulate; pass None"
        )
    count = modulation.shape[0]
    good = modulation.dim() == 2 and modulation.shape[1] >= chunks * width and modulation.dtype in FLOAT_DTYPES
    if not good or modulation.stride(1) != 1 or count == 0:
        check_tensor(op, "modulation", modulation, FLOAT_DTYPES, (None, None), "[R, chunks * D]")
        raise ValueError(
            f"{op}: modulation has shape {tuple(modulation.shape)} and strides {modulation.stride()}, expected one or "
            f"more rows of {chunks} chunks of {width} channels, contiguous in themselves"
        )
    if index is None:
        if count != rows:
            raise ValueError(f"{op}: modulation has {count} rows for M = {rows} rows; pass the row of each")
        address = 0
    else:
        if index.dtype is not torch.int32 or index.shape != (rows,) or not index.is_contiguous():
            check_tensor(op, "modulation rows", index, _INT32, (rows,), "[M]")
            raise ValueError(f"{op}: modulation rows are not contiguous; pass them .contiguous()")
        address = index.data_ptr()
    return modulation.data_ptr(), ELEMENTS[modulation.dtype], count, modulation.stride(0), address


def _memory(device: torch.device, needs: tuple[int, int]) -> tuple[Tensor, Tensor | None, tuple[int, int]]:
    """Workspace, counters, and their addresses."""
    size, count = needs
    memory = torch.empty(size, dtype=torch.uint8, device=device)
    counts = counters(device, count) if count else None
    return memory, counts, (memory.data_ptr(), 0 if counts is None else counts.data_ptr())


def _cut(work: Tensor, pieces: list[tuple[int, int]]) -> list[Tensor]:
    return [work[offset : offset + size] for offset, size in pieces]


class LayerPlan:
    """A linear layer on floating-point rows, see :class:`ptq4arvg_kernels.plans.LayerPlan`: two launches, or one where
    the product normalises its rows itself."""

    def __init__(self, layer: PackedWeights, activation: str = "none", norm: NormOperands | None = None) -> None:
        self.layer, self.norm = layer, norm  # kept alive: the native plan holds addresses
        packed = cast(PackedLayer, layer)
        operands = packed.native() | {"activation": ACTIVATIONS[activation]}
        operands["norm"] = None if norm is None else norm_views(norm)
        self._native = native.module().Layer(operands)
        self._kept = [*packed.operands(), *([] if norm is None else [norm.weight, norm.bias])]
        self._chunks = 0 if norm is None else max(norm.scale, norm.shift) + 1

    def __call__(
        self, x: Tensor, positions: Tensor, modulation: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor | None:
        """``layer(x [M, K])`` of x's dtype, ``[M, N]``; None where the operators should look at the data."""
        if debug.enabled(x):
            return None
        layer, device = self.layer, x.device
        info = support.device_info(device)
        count = _rows("layer", x, layer.in_features)
        out = x.new_empty(count, layer.out_features)
        if not count:
            return out
        modulated = _modulation("layer", modulation, rows, count, self._chunks, layer.in_features)
        work, counts, memory = _memory(device, self._native.needs(count, info))
        rest = (count, _positions("layer", positions, count), modulated, out.data_ptr(), info, memory)
        arguments = (x.data_ptr(), ELEMENTS[x.dtype], *rest, native.stream_of(device))
        if not native.replaced():
            self._native.run(*arguments)
            return out
        touched = [*self._kept, x, positions, modulation, rows, out, counts]
        with native.launching([*touched, *_cut(work, self._native.pieces(count, info))]):
            self._native.run(*arguments)
        return out


class BlockPlan:
    """A transformer block, see :class:`ptq4arvg_kernels.plans.BlockPlan` and csrc/cuda/block.h.

    Raises:
        ValueError: operands that do not fit each other.
    """

    def __init__(self, operands: BlockOperands) -> None:
        self.operands = o = operands  # kept alive: the native plan holds addresses
        layers = {name: cast(PackedLayer, getattr(o, name)) for name in ("qkv", "proj", "fc1", "fc2")}
        vectors = ("q_weight", "q_bias", "k_weight", "k_bias", "q_scale", "rope", "k_table", "v_table", "kv_group")
        grouping = Grouping.of_data(o.kv_group, o.k_table)
        plan: dict[str, Any] = {name: dense(getattr(o, name)) for name in vectors}
        plan |= {name: layer.native() for name, layer in layers.items()}
        plan |= {"norm1": norm_views(o.norm1), "norm2": norm_views(o.norm2)}
        plan |= {
            "heads": o.heads,
            "head_dim": o.head_dim,
            "activation": SWIGLU if o.activation == "swiglu" else ACTIVATIONS[o.activation],
            "qk_kind": QK_KINDS[o.qk_kind],
            "qk_eps": o.qk_eps,
            "softmax_scale": o.softmax_scale,
            "grouping": GROUPINGS[grouping.kind],
            "edge": grouping.edge,
        }
        self._native = native.module().Block(plan)
        self._kept = [getattr(o, name) for name in vectors]
        self._kept += [tensor for norm in (o.norm1, o.norm2) for tensor in (norm.weight, norm.bias)]
        self._kept += [tensor for layer in layers.values() for tensor in layer.operands()]
        self._width, self._chunks, self._slots = o.qkv.in_features, self._native.chunks, self._native.slots
        self._known: tuple[Any, ...] = ()

    def _caches(self, k: Tensor, v: Tensor, batch: int) -> tuple[tuple[int, int, int], tuple[int, int, int], int]:
        """Address and strides of the caches, and their slots; those of the last call are not checked again."""
        known = self._known
        if known and known[0]() is k and known[1]() is v and known[2] == (k.data_ptr(), v.data_ptr(), batch):
            return cast("tuple[tuple[int, int, int], tuple[int, int, int], int]", known[3])
        o = self.operands
        shape = (batch, o.heads, None, -(-o.head_dim // 16) * 16)
        for name, cache in (("k_cache", k), ("v_cache", v)):
            check_tensor("block", name, cache, _INT8, shape, "[B, H, S, dp]")
            slots, lanes = cache.shape[2:]
            if cache.stride(3) != 1 or (slots > 1 and cache.stride(2) != lanes):
                raise ValueError(f"block: the slots of {name} are not contiguous (strides {cache.stride()})")
        if k.shape[2] != v.shape[2]:
            raise ValueError(f"block: k_cache has {k.shape[2]} slots, v_cache {v.shape[2]}")
        places = [(cache.data_ptr(), cache.stride(0), cache.stride(1)) for cache in (k, v)]
        found = (places[0], places[1], k.shape[2])
        self._known = (weakref.ref(k), weakref.ref(v), (k.data_ptr(), v.data_ptr(), batch), found)
        return found

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
        device, dtype = x.device, ELEMENTS[x.dtype]
        info = support.device_info(device)
        rows = _rows("block", x, self._width)
        out = torch.empty_like(x)
        if not rows:
            return out
        at = _positions("block", positions, rows)
        period = at[2]
        if visible_end.dtype is not torch.int32 or visible_end.shape != (period,) or not visible_end.is_contiguous():
            check_tensor("block", "visible_end", visible_end, _INT32, (period,), "[P]")
            raise ValueError("block: visible_end is not contiguous; pass visible_end.contiguous()")
        k, v, slots = self._caches(k_cache, v_cache, rows // period)
        if not 1 <= span <= min(slots, self._slots):
            raise ValueError(f"block: span is {span}, expected 1 to {min(slots, self._slots)}, the slots there are")
        modulated = _modulation("block", modulation, modulation_rows, rows, self._chunks, self._width)
        work, counts, memory = _memory(device, self._native.needs(rows, period, span, dtype, info))
        ahead = (x.data_ptr(), dtype, rows, at, visible_end.data_ptr(), span, modulated, k, v, slots)
        arguments = (*ahead, out.data_ptr(), info, memory, native.stream_of(device))
        if not native.replaced():
            self._native.run(*arguments)
            return out
        touched = [x, positions, visible_end, modulation, modulation_rows, k_cache, v_cache, out, counts]
        pieces = _cut(work, self._native.pieces(rows, period, span, dtype, info))
        with native.launching([*self._kept, *touched, *pieces]):
            self._native.run(*arguments)
        return out
