"""What takes part in a benchmark of linear layers: the interface of a contender, and this package's own kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

import ptq4arvg_kernels as kernels
from ptq4arvg_kernels.backends.cpu.native import view
from ptq4arvg_kernels.backends.cpu.plans import PackedLayer
from ptq4arvg_kernels.packing import column_sums, pack, packed_row_bytes
from ptq4arvg_kernels.registry import OpSpec, serving
from ptq4arvg_kernels.tables import make_table

# Activations are standard normal; this half range clips a few values of a million.
ACT_RANGE = 4.5
# Signed zero point of our activations: not 0, so that its correction is part of what is measured.
ZERO_POINT = 3

Call: TypeAlias = Callable[[], Tensor]
"""One execution of a layer on the rows it was bound to."""
Layer: TypeAlias = Callable[[Tensor, Tensor], Call]
"""Binds a layer to rows ``[M, K]`` and to a buffer ``[M, N]`` it may return its results in: what a user would prepare
once per shape happens here, untimed."""


class Contender:
    """A way to execute linear layers: float32 ``[M, K]`` in, float32 ``[M, N]`` with bias out."""

    name: str

    def missing(self) -> str | None:
        """Reason why it cannot run here, or None."""
        return None

    def weight_bytes(self, n: int, k: int) -> int:
        """Bytes of a layer's weight that a call has to read."""
        return n * k

    def layers(self, weight: Tensor, bias: Tensor, copies: int) -> list[Layer]:
        """Independent copies of a layer, quantized and packed; copy i has the rows of ``weight`` rolled by i."""
        raise NotImplementedError


def channel_codes(weight: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Symmetric codes (int8) of a weight ``[N, K]``, and one float32 scale per row of it."""
    top = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(1) / top
    return (weight / scale[:, None]).round_().clamp_(-top, top).to(torch.int8), scale


class Ours(Contender):
    """A linear layer of this package: the plan of the requested backend bound to its buffers, as a decode step calls
    it, or ``quantize`` and ``linear`` where the backend makes no plans."""

    def __init__(self, w_bits: int, a_bits: int) -> None:
        self.name, self.w_bits, self.a_bits = f"w{w_bits}a{a_bits}", w_bits, a_bits

    def weight_bytes(self, n: int, k: int) -> int:
        return n * packed_row_bytes(k, self.w_bits)

    def layers(self, weight: Tensor, bias: Tensor, copies: int) -> list[Layer]:
        codes, scale = channel_codes(weight, self.w_bits)
        packed, sums = pack(codes, self.w_bits), column_sums(codes)
        return [
            self._layer(packed.roll(i, 0), scale.roll(i), sums.roll(i), bias.roll(i), weight.shape[1])
            for i in range(copies)
        ]

    def _layer(self, packed: Tensor, scale: Tensor, sums: Tensor, bias: Tensor, k: int) -> Layer:
        step = 2 * ACT_RANGE / (2**self.a_bits - 1)
        table = make_table(step, 2 ** (self.a_bits - 1) + ZERO_POINT, self.a_bits, [0])
        positions = torch.zeros(1, dtype=torch.int32)
        quantize, linear, w_bits, out = kernels.quantize, kernels.linear, self.w_bits, torch.float32
        backend = serving("layer", OpSpec(packed.device, out, 1, k, len(packed), w_bits))
        if backend is not None:
            weights = PackedLayer(packed, w_bits, k, scale, sums, bias, table)
            plan = backend.implementations["layer"](weights)

            def bind_plan(x: Tensor, y: Tensor) -> Call:
                views = view(x), view(positions), None, None, view(y)

                def call(kept: tuple[Tensor, ...] = (x, positions)) -> Tensor:  # the views are addresses in these
                    if not plan.run(*views):
                        raise ValueError("the plan refused its input")
                    return y

                return call

            return bind_plan

        def bind(x: Tensor, y: Tensor) -> Call:
            def call() -> Tensor:
                q, row_sums = quantize(x, table, positions)
                return linear(q, row_sums, packed, w_bits, k, scale, sums, bias, table, positions, "none", out)

            return call

        return bind


OURS: tuple[tuple[int, int], ...] = ((8, 8), (6, 8), (6, 6))
OUR_NAMES: tuple[str, ...] = tuple(f"w{w}a{a}" for w, a in OURS)
