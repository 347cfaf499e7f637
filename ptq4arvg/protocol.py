"""What calibration, folding and quantization need to know about a generator, whatever its family.

A model describes itself by module paths and small records; nobody outside ``ptq4arvg.models`` tests for a family name.
All four families have the same skeleton (norm, optional modulation, qkv, attention, projection, gate, residual; norm,
modulation, MLP, gate, residual), so one record describes a block of any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

__all__ = [
    "AttentionSpec",
    "BlockSpec",
    "CalibrationSet",
    "Conditioning",
    "FoldPair",
    "GeneratorProtocol",
    "HeadSpec",
    "LinearSpec",
    "Modulation",
    "ordinary_positions",
]

ROLES = ("adaln", "qkv", "proj", "fc1", "fc2", "head")


@dataclass(frozen=True)
class LinearSpec:
    """A linear to be quantized.

    Attributes:
        role: one of ``ROLES``; recipes assign bits per role.
        group_of_position: for every sequence position the index of the group whose static scale it uses (STWQ
            granularity).
        activation: what is applied to the condition before quantization (``"silu"`` for modulation linears, else
            ``"none"``).
    """

    role: str
    group_of_position: tuple[int, ...]
    activation: str = "none"

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"unknown linear role {self.role!r}; known: {', '.join(ROLES)}")
        if sorted(set(self.group_of_position)) != list(range(self.groups)):
            raise ValueError("group_of_position must use every group index from 0 without gaps")

    @property
    def groups(self) -> int:
        return max(self.group_of_position) + 1


@dataclass(frozen=True)
class Modulation:
    """Where a norm's scale, shift and gate come from: D-wide chunks of the output of one linear; gate None: no gate."""

    linear: str
    chunks: int
    shift: int
    scale: int
    gate: int | None = None


@dataclass(frozen=True)
class FoldPair:
    """A norm whose output is read by nothing but ``linears``: scales and shifts of its channels can be folded exactly.

    ``role`` names the pair after the role of its linears; ``modulation`` is None for norms without one.
    """

    norm: str
    modulation: Modulation | None
    linears: tuple[str, ...]
    role: str


@dataclass(frozen=True)
class AttentionSpec:
    """Attention of one block: head layout and what happens to q and k before the product.

    ``qk_kind``: ``"none"``, ``"layer_norm"`` (paths ``q_norm``, ``k_norm``), ``"l2"`` or ``"rope"``.
    """

    path: str
    heads: int
    head_dim: int
    qk_kind: str
    softmax_scale: float
    q_norm: str | None = None
    k_norm: str | None = None


@dataclass(frozen=True)
class BlockSpec:
    """Module paths of one transformer block; ``activation``: ``"gelu_erf"``, ``"gelu_tanh"`` or ``"swiglu"``."""

    path: str
    norm1: str
    norm2: str
    modulation1: Modulation | None
    modulation2: Modulation | None
    qkv: str
    proj: str
    fc1: str
    fc2: str
    activation: str
    attention: AttentionSpec

    @property
    def modulation(self) -> Modulation | None:
        return self.modulation1


@dataclass(frozen=True)
class HeadSpec:
    """The last norm (inside module ``path``) and the linear that makes logits of it."""

    path: str
    norm: str
    modulation: Modulation | None
    linear: str


@dataclass(frozen=True)
class Conditioning:
    """Number of classes, and the class index that means "unconditional"."""

    classes: int
    unconditional: int


@dataclass(frozen=True)
class CalibrationSet:
    """Recorded sequences: named tensors with one row per sequence, and which rows are conditional.

    Attributes:
        inputs: what ``calibration_forward`` takes, each ``[n, …]``.
        conditional: bool ``[n]``.
    """

    inputs: dict[str, Tensor]
    conditional: Tensor

    def __len__(self) -> int:
        return len(self.conditional)

    def select(self, rows: Tensor | slice) -> CalibrationSet:
        """The sequences ``rows`` (indices, mask or slice), in that order."""
        return CalibrationSet({name: value[rows] for name, value in self.inputs.items()}, self.conditional[rows])

    def batches(self, size: int) -> list[CalibrationSet]:
        return [self.select(slice(i, i + size)) for i in range(0, len(self), size)]


@runtime_checkable
class GeneratorProtocol(Protocol):
    """The protocol. A generator is also an ``nn.Module``; paths in its records are resolved with ``get_submodule``."""

    family: str

    @property
    def sequence_length(self) -> int: ...
    @property
    def sinks(self) -> tuple[int, ...]: ...
    @property
    def conditioning(self) -> Conditioning: ...
    def linear_specs(self) -> dict[str, LinearSpec]: ...
    def fold_pairs(self) -> list[FoldPair]: ...
    def block_specs(self) -> list[BlockSpec]: ...
    def head_spec(self) -> HeadSpec: ...
    def sample_calibration(
        self, classes: Tensor, seed: int, progress: Callable[[int], None] | None = None
    ) -> CalibrationSet: ...
    def calibration_forward(self, inputs: dict[str, Tensor]) -> Tensor: ...
    def guided(self, cond: Tensor, uncond: Tensor, step: int) -> Tensor: ...
    def replace_head(self, head: nn.Module) -> None: ...
    def config_dict(self) -> dict[str, Any]: ...


def ordinary_positions(model: GeneratorProtocol) -> Tensor:
    """Mask bool ``[T]`` of the positions that are no sinks; all of them where nothing but sinks exists."""
    ordinary = torch.ones(model.sequence_length, dtype=torch.bool)
    if len(model.sinks) < model.sequence_length:
        ordinary[list(model.sinks)] = False
    return ordinary
