"""What attention needs to know of a layer, for all backends that run on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Grouping(NamedTuple):
    """How slots are grouped: ``one`` group, a ``step`` from group 0 to 1 at slot ``edge``, or as a ``table`` says."""

    kind: str
    edge: int = 0

    @staticmethod
    def of_metadata(k_table: Tensor) -> Grouping:
        """One group, or groups that only the data knows."""
        return Grouping("one" if len(k_table) == 1 else "table")

    @staticmethod
    def of_data(kv_group: Tensor, k_table: Tensor) -> Grouping:
        """What ``kv_group`` says, read on the host: for plans, once. A step from group 0 to group 1 (sinks, then the
        rest) needs no loads per slot."""
        groups = kv_group.tolist()
        edge = groups.count(0)
        if len(k_table) == 2 and groups == [0] * edge + [1] * (len(groups) - edge):
            return Grouping("step", edge)
        return Grouping.of_metadata(k_table)


@dataclass(frozen=True)
class Heads:
    """The heads of a layer.

    Attributes:
        heads, head_dim: H and d.
        k_table, v_table, kv_group, softmax_scale: as in :func:`ptq4arvg_kernels.attention`.
        grouping: of the slots.
        qk_kind, eps, q_weight, q_bias, k_weight, k_bias, q_scale, rope: as in :func:`ptq4arvg_kernels.qkv_append`; only
            the fused form uses them.
    """

    heads: int
    head_dim: int
    k_table: Tensor
    v_table: Tensor
    kv_group: Tensor
    softmax_scale: float
    grouping: Grouping
    qk_kind: str = "none"
    eps: float = 0.0
    q_weight: Tensor | None = None
    q_bias: Tensor | None = None
    k_weight: Tensor | None = None
    k_bias: Tensor | None = None
    q_scale: Tensor | None = None
    rope: Tensor | None = None
