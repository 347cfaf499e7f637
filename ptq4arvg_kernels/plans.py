"""What a backend that offers plans is given: the operands of layers and blocks, prepared once.

A backend may implement ``"weights"`` (a :class:`PackedWeights`), ``"layer"`` (a :class:`LayerPlan`) and ``"block"`` (a
:class:`BlockPlan`) beside the operators. A plan keeps its operands alive and must not see them written to; a call
returns None for bad data, and the operators, given the same, say what is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class PackedWeights(Protocol):
    """Weights of one linear layer in a backend's own order, and its other operands.

    Built from ``(qweight, w_bits, in_features, w_scale, col_sums, bias, table, paired)``; ``paired``: the rows are
    ``[w1; w3]`` of a SwiGLU layer. The stored form is not kept.
    """

    w_bits: int
    in_features: int
    out_features: int
    paired: bool
    w_scale: Tensor
    col_sums: Tensor
    bias: Tensor | None
    table: Tensor

    def qweight(self) -> Tensor:
        """The weights as stored, uint8 ``[N, row bytes]``, bit for bit."""


@dataclass(frozen=True)
class NormOperands:
    """A norm, and which chunks of the modulation it reads (-1: none).

    ``scale_offset`` and the affine vectors as in :func:`ptq4arvg_kernels.adaln_quant`; ``gate`` is the chunk that
    multiplies the result of what the norm feeds, in a block.
    """

    kind: str
    eps: float
    weight: Tensor | None
    bias: Tensor | None
    scale_offset: float
    scale: int = -1
    shift: int = -1
    gate: int = -1


@dataclass(frozen=True)
class BlockOperands:
    """A transformer block: everything a call does not bring.

    ``activation`` is one of the operators' or ``"swiglu"`` (fc1 then paired). Vectors of q and k as in
    :func:`ptq4arvg_kernels.qkv_append`.
    """

    heads: int
    head_dim: int
    norm1: NormOperands
    norm2: NormOperands
    qkv: PackedWeights
    proj: PackedWeights
    fc1: PackedWeights
    fc2: PackedWeights
    activation: str
    qk_kind: str
    qk_eps: float
    q_weight: Tensor | None
    q_bias: Tensor | None
    k_weight: Tensor | None
    k_bias: Tensor | None
    q_scale: Tensor | None
    rope: Tensor | None
    k_table: Tensor
    v_table: Tensor
    kv_group: Tensor
    softmax_scale: float


class LayerPlan(Protocol):
    """A linear layer on floating-point rows: norm and modulation, or an activation; codes; products.

    Built from ``(layer: PackedWeights, activation, norm: NormOperands | None)``.
    """

    layer: PackedWeights
    norm: NormOperands | None

    def __call__(
        self, x: Tensor, positions: Tensor, modulation: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor | None:
        """``layer(x [M, K])`` of x's dtype, ``[M, N]``; None for bad data."""


class BlockPlan(Protocol):
    """A transformer block. Built from :class:`BlockOperands`."""

    operands: BlockOperands

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
        """``block(x [M, D])`` as a new tensor; None for bad data."""
