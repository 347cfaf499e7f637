"""Weights of one linear layer in a backend's own order, with its other operands: what plans are built on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from .views import dense


class PackedLayer(ABC):
    """See :class:`ptq4arvg_kernels.plans.PackedWeights`; a backend says how weights are packed.

    Args:
        qweight: uint8 ``[N, row bytes]`` as stored; not kept.
        w_bits, in_features, w_scale, col_sums, bias, table: as in :func:`ptq4arvg_kernels.linear`.
        paired: rows are ``[w1; w3]`` of a SwiGLU layer.

    Attributes:
        packed: the weights in the backend's order.

    Raises:
        ValueError: the stored weights are corrupt.
    """

    def __init__(
        self,
        qweight: Tensor,
        w_bits: int,
        in_features: int,
        w_scale: Tensor,
        col_sums: Tensor,
        bias: Tensor | None,
        table: Tensor,
        paired: bool = False,
    ) -> None:
        self.w_bits, self.in_features, self.out_features, self.paired = w_bits, in_features, len(qweight), paired
        self.packed = self._pack(qweight)
        self.w_scale, self.col_sums, self.bias, self.table = w_scale, col_sums, bias, table

    @abstractmethod
    def _pack(self, qweight: Tensor) -> Tensor:
        """Stored weights in the backend's order."""

    @abstractmethod
    def qweight(self) -> Tensor:
        """The weights as stored, uint8 ``[N, row bytes]``, bit for bit."""

    def native(self) -> dict[str, Any]:
        """What a compiled module is told of the layer, weights aside.

        Raises:
            ValueError: an operand is not contiguous.
        """
        return {
            "bits": self.w_bits,
            "out_features": self.out_features,
            "in_features": self.in_features,
            "paired": self.paired,
            "w_scale": dense(self.w_scale),
            "col_sums": dense(self.col_sums),
            "bias": dense(self.bias),
            "table": dense(self.table),
        }
