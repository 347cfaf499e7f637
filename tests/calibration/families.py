"""Minimal modules with the kinds of norm that other families have, each one norm → Linear pair with its record.

They are driven like one block of a generator: ``module(x, condition)``, where the condition is ignored by those without
a modulation. Only :func:`ptq4arvg.fold.fold` and shift/scale searches look at them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptq4arvg.nn import Linear, Norm
from ptq4arvg.protocol import FoldPair, Modulation
from tests.tiny import randomize

__all__ = ["FAMILIES", "AffineLayerNorm", "ModulatedPlainNorm", "RMSNormTwoLinears", "linear_inputs"]

DIM = 24


class AffineLayerNorm(nn.Module):
    """LayerNorm with affine and no modulation, one linear with a bias (a ViT block)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Norm(DIM)
        self.linear = Linear(DIM, 40)

    def fold_pairs(self) -> list[FoldPair]:
        return [FoldPair("norm", None, ("linear",), "fc1")]

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.linear(self.norm(x))


class RMSNormTwoLinears(nn.Module):
    """RMSNorm without bias, read by two linears without biases (a SwiGLU MLP): a shift has to create three biases."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Norm(DIM, kind="rms")
        self.w1 = Linear(DIM, 32, bias=False)
        self.w3 = Linear(DIM, 32, bias=False)

    def fold_pairs(self) -> list[FoldPair]:
        return [FoldPair("norm", None, ("w1", "w3"), "fc1")]

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.norm(x)
        return F.silu(self.w1(h)) * self.w3(h)


class ModulatedPlainNorm(nn.Module):
    """LayerNorm without affine, modulated by chunks of one linear without a bias; chunk 0 is a gate that is not
    folded."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Norm(DIM, affine=False)
        self.modulation = Linear(DIM, 3 * DIM, bias=False)
        self.linear = Linear(DIM, 40)

    def fold_pairs(self) -> list[FoldPair]:
        return [FoldPair("norm", Modulation("modulation", chunks=3, shift=2, scale=1, gate=0), ("linear",), "qkv")]

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        gate, scale, shift = self.modulation(F.silu(condition)).chunk(3, -1)
        return self.linear(self.norm(x, scale, shift)) * (1 + gate.mean(-1, keepdim=True))


FAMILIES = (AffineLayerNorm, RMSNormTwoLinears, ModulatedPlainNorm)


def build(kind: type[nn.Module], seed: int) -> nn.Module:
    """``kind`` with random parameters."""
    model = kind()
    randomize(model, seed)
    return model.eval().requires_grad_(False)


def data(seed: int, rows: int = 64) -> tuple[Tensor, Tensor]:
    """Input and condition, float32 ``[rows, D]`` each."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, DIM, generator=generator), torch.randn(rows, DIM, generator=generator)


def linear_inputs(model: nn.Module, pair: FoldPair, run: tuple[Tensor, ...]) -> Tensor:
    """What the linears of ``pair`` read during ``model(*run)``, float32 ``[…, D]``."""
    seen: list[Tensor] = []
    handle = model.get_submodule(pair.linears[0]).register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    try:
        model(*run)
    finally:
        handle.remove()
    return seen[0]
