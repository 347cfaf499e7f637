"""Decoding one position per step through prepared blocks: one native call per block, no allocation after construction.

The modulation of a position does not depend on the tokens, so it is computed for a chunk of positions at once: its
weights, a third of a RAR, are then read once per chunk instead of once per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ptq4arvg.blocks import QuantBlock, QuantHead
from ptq4arvg.kv_cache import Int8KVCache
from ptq4arvg.linear import QuantLinear
from ptq4arvg_kernels.backends.cpu import plans
from ptq4arvg_kernels.backends.cpu.native import View, view

__all__ = ["Decoder", "can_decode"]

# Distinct conditions times positions of a chunk. At this many rows products cost more than reading the weights, so
# larger chunks would only take memory.
CHUNK_ROWS = 64

Conditions = Callable[[Tensor, int], None]


def can_decode(blocks: Sequence[nn.Module], head: nn.Module | None) -> bool:
    """Whether all of the model is prepared for the CPU backend and served by it now, in float32."""
    dtype = torch.float32
    if not isinstance(head, QuantHead) or not isinstance(head.plan, plans.LayerPlan) or not head.planned(dtype):
        return False
    layers = [head.adaln]
    for block in blocks:
        if not isinstance(block, QuantBlock) or not isinstance(block.plan, plans.BlockPlan):
            return False
        if not block.planned(dtype):
            return False
        layers.append(block.adaln)
    return all(layer is None or layer.planned(dtype) for layer in layers)


class _Modulation:
    """Modulation channels of the present chunk of positions, for one modulation layer."""

    def __init__(self, layer: QuantLinear, rows: int) -> None:
        assert isinstance(layer.plan, plans.LayerPlan)
        self.values = torch.empty(rows, layer.out_features)
        self.view = view(self.values)
        self._run = layer.plan.run

    def compute(self, conditions: View, positions: View) -> bool:
        return self._run(conditions, positions, None, None, self.view)


class Decoder:
    """Steps over single positions for M sequences at once.

    Fill ``x`` (float32 ``[M, D]``, the embeddings of the position), call :meth:`step`, read the logits it returns; the
    buffer of the logits is reused by the next step, and so is ``x``.

    Args:
        blocks, head: prepared (:func:`can_decode`).
        caches: one per block, holding the earlier positions.
        width: D.
        index: int64 ``[M]``, which of the distinct conditions each sequence has.
        length: positions that are ever fed, T.
        conditions: called as ``conditions(out, first)`` to write the condition vectors of the distinct conditions at
            the positions ``first … first + C - 1`` into ``out`` float32 ``[U, C, D]``.
    """

    def __init__(
        self,
        blocks: Sequence[QuantBlock],
        head: QuantHead,
        caches: Sequence[Int8KVCache],
        width: int,
        index: Tensor,
        length: int,
        conditions: Conditions,
    ) -> None:
        rows, distinct = len(index), int(index.max()) + 1
        self.x = torch.empty(rows, width)
        self.logits = torch.empty(rows, head.linear.out_features)
        self._length, self._conditions = length, conditions
        self._chunk = max(1, min(CHUNK_ROWS // distinct, length))
        self._first = -1
        self._distinct = torch.empty(distinct, self._chunk, width)
        self._distinct_positions = torch.empty(distinct, self._chunk, dtype=torch.int64)
        self._offsets = torch.arange(self._chunk)
        self._start = torch.zeros((), dtype=torch.int64)
        self._row_base = (index * self._chunk).to(torch.int32)
        self._rows = self._row_base.clone()
        self._offset = torch.zeros((), dtype=torch.int32)  # a number would become a new tensor in every step
        self._position = torch.zeros(1, dtype=torch.int64)
        self._end = torch.zeros(1, dtype=torch.int32)

        chunk_rows = distinct * self._chunk
        layers = [block.adaln for block in blocks] + [head.adaln]
        self._modulations = [None if layer is None else _Modulation(layer, chunk_rows) for layer in layers]
        self._chunk_views = view(self._distinct.view(chunk_rows, width)), view(self._distinct_positions.view(-1))
        self._steps: list[tuple[Callable[..., bool], tuple[Any, ...], tuple[Any, ...]]] = []
        x, position, end, map_view = view(self.x), view(self._position), view(self._end), view(self._rows)
        for block, cache, modulation in zip(blocks, caches, self._modulations, strict=False):
            assert isinstance(block.plan, plans.BlockPlan)
            ahead = (x, position, end)
            behind = (
                None if modulation is None else modulation.view,
                None if modulation is None else map_view,
                view(cache.k),
                view(cache.v),
                x,
            )
            self._steps.append((block.plan.run, ahead, behind))
        assert isinstance(head.plan, plans.LayerPlan)
        last = self._modulations[-1]
        self._head_run = head.plan.run
        self._head_views = (
            x,
            position,
            None if last is None else last.view,
            None if last is None else map_view,
            view(self.logits),
        )
        self._kept = (blocks, head, caches)  # the views above are addresses in their tensors

    def step(self, position: int) -> Tensor:
        """Feed ``x`` at ``position``; returns the logits ``[M, V]`` (one buffer, reused).

        Raises:
            ValueError: the position is outside the sequence, or the residual stream holds NaN or infinity.
        """
        if not 0 <= position < self._length:
            raise ValueError(f"position {position} is outside the sequence of {self._length} positions")
        if not self._first <= position < self._first + self._chunk or self._first < 0:
            self._begin_chunk(min(position, self._length - self._chunk))
        self._position.fill_(position)
        self._end.fill_(position + 1)
        torch.add(self._row_base, self._offset.fill_(position - self._first), out=self._rows)
        good = True
        for run, ahead, behind in self._steps:
            good = good and run(*ahead, position + 1, *behind)
        if not (good and self._head_run(*self._head_views)):
            raise ValueError(
                f"position {position}: the residual stream holds NaN or infinity; the weights or the embeddings of "
                "this model are damaged"
            )
        return self.logits

    def _begin_chunk(self, first: int) -> None:
        self._first = first
        self._conditions(self._distinct, first)
        torch.add(self._offsets, self._start.fill_(first), out=self._distinct_positions[0])
        self._distinct_positions[1:] = self._distinct_positions[:1]
        for modulation in self._modulations:
            if modulation is not None and not modulation.compute(*self._chunk_views):
                raise ValueError(f"position {first}: a condition vector holds NaN or infinity")
