"""Folding per-channel scales and shifts between a norm and the linears that read it: exact in floating point (method.md
§1.5).

The linears then see ``x' = x/s − p``. Nothing of s or p remains in the forward pass: a modulated norm absorbs both into
its modulation's rows (and the constant 1 with them, leaving ``scale_offset`` 0), a plain one into its affine.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ptq4arvg.nn import Norm
from ptq4arvg.protocol import FoldPair

__all__ = ["fold", "pair_weight"]


def pair_weight(model: Any, pair: FoldPair) -> Tensor:
    """Weights of all linears of a pair, stacked: float ``[ΣN, D]``."""
    return torch.cat([model.get_submodule(path).weight.detach() for path in pair.linears])


@torch.no_grad()
def fold(model: Any, pair: FoldPair, scale: Tensor, shift: Tensor) -> None:
    """Fold ``x' = x/scale − shift`` into the norm and linears of ``pair``, in place; the model's function does not
    change.

    Args:
        model: the generator.
        pair: one of ``model.fold_pairs()``.
        scale: float ``[D]``, finite and positive.
        shift: float ``[D]``, in units of x'.

    Raises:
        ValueError: a factor that is not finite and positive, a shift that is not finite, or a wrong width.
    """
    norm = model.get_submodule(pair.norm)
    if not isinstance(norm, Norm):
        raise ValueError(f"{pair.norm} is a {type(norm).__name__}, not a ptq4arvg Norm, and cannot be folded into")
    for name, value in (("scale", scale), ("shift", shift)):
        if value.shape != (norm.dim,):
            raise ValueError(f"{pair.norm}: {name} has shape {tuple(value.shape)}, expected ({norm.dim},)")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"{pair.norm}: {name} contains {float(value[~torch.isfinite(value)][0])}; it must be finite"
            )
    if not bool((scale > 0).all()):
        raise ValueError(f"{pair.norm}: scale contains {float(scale[scale <= 0][0])}; channel factors must be positive")
    s, p = scale.double(), shift.double()
    if pair.modulation is not None:
        layer = model.get_submodule(pair.modulation.linear)
        _ensure_bias(layer)
        scale_rows = slice(pair.modulation.scale * norm.dim, (pair.modulation.scale + 1) * norm.dim)
        shift_rows = slice(pair.modulation.shift * norm.dim, (pair.modulation.shift + 1) * norm.dim)
        for rows, addend, offset in ((scale_rows, norm.scale_offset, 0.0), (shift_rows, 0.0, p)):
            layer.weight[rows] = (layer.weight[rows].double() / s[:, None]).to(layer.weight.dtype)
            layer.bias[rows] = ((layer.bias[rows].double() + addend) / s - offset).to(layer.bias.dtype)
        norm.scale_offset = 0.0
    else:
        like = model.get_submodule(pair.linears[0]).weight
        gain = torch.ones_like(s) if norm.weight is None else norm.weight.double()
        bias = torch.zeros_like(s) if norm.bias is None else norm.bias.double()
        norm.weight = nn.Parameter((gain / s).to(like.dtype), like.requires_grad)
        norm.bias = nn.Parameter((bias / s - p).to(like.dtype), like.requires_grad)
    for path in pair.linears:
        linear = model.get_submodule(path)
        _ensure_bias(linear)
        weight = linear.weight.double() * s
        linear.bias.copy_(linear.bias.double() + weight @ p)
        linear.weight.copy_(weight)


def _ensure_bias(linear: nn.Linear) -> None:
    if linear.bias is None:
        weight = linear.weight
        zeros = torch.zeros(linear.out_features, dtype=weight.dtype, device=weight.device)
        linear.bias = nn.Parameter(zeros, weight.requires_grad)
