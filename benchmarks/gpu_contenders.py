"""What takes part in the GPU benchmark of linear layers: our kernels with quantization, and torch's products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import ptq4arvg_kernels as kernels
from ptq4arvg_kernels.registry import OpSpec, serving
from ptq4arvg_kernels.tables import make_table

from .contenders import ACT_RANGE, OURS, ZERO_POINT, Call, Contender, Layer, Ours


class IntegerLayer(Ours):
    """A linear layer of this package on rows of ``dtype``, quantization included.

    The plan of the backend that serves the device, as a decode step calls it, or ``quantize`` and ``linear`` where it
    makes no plans.
    """

    def __init__(self, w_bits: int, a_bits: int, dtype: torch.dtype) -> None:
        super().__init__(w_bits, a_bits)
        self.dtype = dtype

    def _layer(self, packed: Tensor, scale: Tensor, sums: Tensor, bias: Tensor, k: int) -> Layer:
        device, dtype, w_bits = packed.device, self.dtype, self.w_bits
        step = 2 * ACT_RANGE / (2**self.a_bits - 1)
        table = make_table(step, 2 ** (self.a_bits - 1) + ZERO_POINT, self.a_bits, [0]).to(device)
        positions = torch.zeros(1, dtype=torch.int64, device=device)
        operands = (packed, w_bits, k, scale, sums, bias, table)
        spec = OpSpec(device, dtype, 1, k, len(packed), w_bits)
        backend = serving("layer", spec)
        if backend is not None:
            weights = backend.implementations["weights"](*operands, False)
            plan = backend.implementations["layer"](weights, "none", None)

            def bind_plan(x: Tensor, y: Tensor) -> Call:
                def call() -> Tensor:
                    result = plan(x, positions)
                    if result is None:
                        raise ValueError("the plan refused its input")
                    return result

                return call

            return bind_plan

        def bind(x: Tensor, y: Tensor) -> Call:
            def call() -> Tensor:
                q, row_sums = kernels.quantize(x, table, positions)
                return kernels.linear(q, row_sums, *operands, positions, "none", dtype)

            return call

        return bind


class TorchLayer(Contender):
    """``torch.nn.functional.linear`` in ``dtype``: cuBLAS on a GPU.

    Args:
        compiler: backend of ``torch.compile``, or None for eager.
    """

    def __init__(self, dtype: torch.dtype, compiler: str | None = None) -> None:
        short = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
        self.name = short if compiler is None else f"{short} compiled"
        self.dtype, self.compiler = dtype, compiler

    def weight_bytes(self, n: int, k: int) -> int:
        return n * k * self.dtype.itemsize

    def layers(self, weight: Tensor, bias: Tensor, copies: int) -> list[Layer]:
        product: Any = F.linear
        if self.compiler is not None:
            torch._dynamo.reset()  # else the shapes before count against its limit of graphs
            product = torch.compile(F.linear, backend=self.compiler, dynamic=False, fullgraph=True)

        def layer(w: Tensor, b: Tensor) -> Layer:
            def bind(x: Tensor, y: Tensor) -> Call:
                return lambda: product(x, w, b)

            return bind

        whole, short = weight.to(self.dtype), bias.to(self.dtype)
        return [layer(whole.roll(i, 0), short.roll(i)) for i in range(copies)]


def gpu_contenders(dtype: torch.dtype, compiler: str | None = "inductor") -> dict[str, Contender]:
    """Ours at every width, torch's product, and the same compiled unless ``compiler`` is None."""
    chosen: list[Contender] = [IntegerLayer(w, a, dtype) for w, a in OURS]
    chosen.append(TorchLayer(dtype))
    if compiler is not None:
        chosen.append(TorchLayer(dtype, compiler))
    return {contender.name: contender for contender in chosen}
