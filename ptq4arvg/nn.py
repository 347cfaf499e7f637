"""Building blocks shared by the generators of every family, in floating point.

A model is written with these modules so that the calibrator can watch it and the pipeline can replace its parts:
linears that are told the sequence positions of their rows, norms that accept a modulation, and taps (identity modules)
on the attention operands. Nothing in this file knows about bits.

Row order: activations are ``[B, P, D]``; flattened to ``M = B·P`` rows they are batch-major, so row ``i`` sits at
``positions[i % P]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["AttentionTaps", "Condition", "KVCache", "Linear", "Norm", "Window", "attend"]


class Linear(nn.Linear):
    """``nn.Linear`` whose call also carries the positions of its rows.

    The floating-point layer ignores them; its quantized replacements look up their static scales by them. Parameters
    and state-dict keys are those of ``nn.Linear``.
    """

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Norm(nn.Module):
    """LayerNorm or RMSNorm, with or without affine, followed by an optional modulation.

    ``y = norm(x) ⊙ weight + bias``, then ``y ⊙ (scale_offset + scale) + shift`` when a modulation is given. Published
    models have ``scale_offset`` 1; folding a per-channel factor into the modulation's linear layer absorbs the 1 into
    that layer's bias and leaves ``scale_offset`` 0 (method.md §1.5, simplification i), so that no per-channel constant
    remains in the forward pass.

    Args:
        dim: width D of the last axis.
        kind: ``"layer"`` or ``"rms"``.
        eps: added to the variance (or mean square) before the root.
        affine: whether ``weight`` (and, for LayerNorm, ``bias``) exist. Folding a shift into an RMSNorm creates its
            bias.
    """

    def __init__(
        self, dim: int, kind: Literal["layer", "rms"] = "layer", eps: float = 1e-6, affine: bool = True
    ) -> None:
        super().__init__()
        if kind not in ("layer", "rms"):
            raise ValueError(f"Norm kind must be 'layer' or 'rms', got {kind!r}")
        self.dim, self.eps = dim, eps
        self.kind: Literal["layer", "rms"] = kind
        self.scale_offset = 1.0
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine and kind == "layer" else None

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        if self.kind == "layer":
            y = F.layer_norm(x, (self.dim,), self.weight, self.bias, self.eps)
        else:
            y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
            y = y if self.weight is None else y * self.weight
            y = y if self.bias is None else y + self.bias
        if scale is not None:
            y = y * (scale + self.scale_offset)
        return y if shift is None else y + shift


@dataclass(frozen=True)
class Condition:
    """Condition vectors of one call, without repetition.

    Many rows share a condition (every unconditional row of a guided batch, every repeated class), so a model passes the
    distinct ones and a map, and the modulation is computed once for each.

    Attributes:
        values: float ``[R, D]``, the distinct condition vectors.
        rows: int32 ``[M]``, for each activation row the row of ``values`` that conditions it.
        positions: int64 ``[R]``, the sequence position that each row of ``values`` belongs to.
    """

    values: Tensor
    rows: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Window:
    """The positions that one call computes, and what they may look at.

    Attributes:
        positions: int64 ``[P]``, sequence positions of the call's tokens, the same for every sequence of the batch.
        visible_end: int32 ``[P]``; the query at ``positions[i]`` attends to the positions ``j < visible_end[i]``. One
            number per query describes causal masks, VAR's scales and PAR's groups alike.
        span: ``max(visible_end)`` as a host integer: no position at or beyond it is read.
    """

    positions: Tensor
    visible_end: Tensor
    span: int


class KVCache:
    """Floating-point keys and values of one layer, ``[B, H, S, d]`` each; the slot of a token is its position."""

    def __init__(
        self, batch: int, heads: int, slots: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.k = torch.zeros(batch, heads, slots, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)

    def append(self, k: Tensor, v: Tensor, positions: Tensor) -> None:
        """Write k, v ``[B, H, P, d]`` to the slots ``positions`` ``[P]``."""
        self.k.index_copy_(2, positions, k)
        self.v.index_copy_(2, positions, v)


class AttentionTaps(nn.Module):
    """Identity modules at the operands of attention's two products: q, k, v ``[B, H, ·, d]`` and the probabilities p.

    Calibration hooks watch them; fake-quantized simulation replaces them. They own no parameters, so state dicts do not
    change.
    """

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.p = nn.Identity(), nn.Identity(), nn.Identity(), nn.Identity()


def attend(q: Tensor, k: Tensor, v: Tensor, window: Window, softmax_scale: float, taps: AttentionTaps) -> Tensor:
    """Softmax attention over the first ``window.span`` slots.

    Args:
        q: float ``[B, H, P, d]``.
        k, v: float ``[B, H, S, d]``.
        window: what each query sees.
        softmax_scale: factor of the products q·k.
        taps: what watches or replaces the operands.

    Returns:
        float ``[B, P, H·d]``.
    """
    k, v = k[:, :, : window.span], v[:, :, : window.span]
    scores = (taps.q(q) * softmax_scale) @ taps.k(k).transpose(-2, -1)
    hidden = torch.arange(window.span, device=q.device) >= window.visible_end[:, None]
    p = taps.p(scores.masked_fill(hidden, float("-inf")).softmax(-1))
    return (p @ taps.v(v)).transpose(1, 2).flatten(2)
