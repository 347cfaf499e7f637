"""STWQ, static token-wise quantization (method.md §1.6): one static (δ, z) per group of positions, for every layer
input.

Which positions share a group is the model's statement (``LinearSpec.group_of_position``); here the groups are measured,
from pooled histograms of the floating-point model's activations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptq4arvg.calibration.observers import Histogram
from ptq4arvg.calibration.quantizers import PERCENTILES, UniformParams, search_histogram
from ptq4arvg.calibration.watch import Rows, calibration_pass, watch_attention, watch_linears
from ptq4arvg.protocol import CalibrationSet

__all__ = ["GroupParams", "Statistics", "kv_groups", "measure"]


@dataclass(frozen=True)
class GroupParams:
    """Static parameters of one layer input: float32 ``delta``, int64 ``zero_point`` and ``bits``, each ``[G]``, and the
    map ``[T]``."""

    delta: Tensor
    zero_point: Tensor
    bits: Tensor
    group_of_position: Tensor

    def rounded(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Rows ``[n, K]`` at ``positions [n]`` after quantizing and dequantizing them."""
        group = self.group_of_position[positions]
        delta, zero_point = self.delta[group][:, None], self.zero_point[group][:, None]
        top = 2 ** self.bits[group][:, None] - 1
        return (((rows / delta).round() + zero_point).clamp_min(0).minimum(top) - zero_point) * delta


@dataclass(frozen=True)
class Statistics:
    """Histograms of everything that gets a static scale.

    Attributes:
        linears: by linear path, groups as in ``groups[path]``.
        groups: by linear path, int64 ``[T]``.
        attention: by (attention path, operand); for k and v the groups are (slot group, head), slot groups as
            ``kv_groups(model)``; for q and p there is one.
        sinks: the model's sink positions.
    """

    linears: dict[str, Histogram]
    groups: dict[str, Tensor]
    attention: dict[tuple[str, str], Histogram]
    sinks: tuple[int, ...]

    def linear(
        self, path: str, bits: int, sink_bits: int | None = None, percentiles: tuple[float, ...] = PERCENTILES
    ) -> GroupParams:
        """Parameters of a linear's input at ``bits``; groups that hold sink positions only get ``sink_bits`` where that
        is more."""
        centres, counts = self.linears[path].table()
        group_of_position = self.groups[path]
        params = search_histogram(centres, counts, bits, percentiles)
        delta, zero_point = params.delta.clone(), params.zero_point.clone()
        widths = torch.full(delta.shape, bits)
        if sink_bits is not None and sink_bits > bits:
            ordinary = torch.ones(len(group_of_position), dtype=torch.bool)
            ordinary[list(self.sinks)] = False
            only_sinks = torch.ones(len(delta), dtype=torch.bool)
            only_sinks[group_of_position[ordinary]] = False
            wide = search_histogram(centres[only_sinks], counts[only_sinks], sink_bits, percentiles)
            delta[only_sinks], zero_point[only_sinks], widths[only_sinks] = wide.delta, wide.zero_point, sink_bits
        return GroupParams(delta.float(), zero_point.long(), widths, group_of_position)

    def kv(self, path: str, operand: str, heads: int, bits: int = 8) -> tuple[Tensor, Tensor]:
        """``delta`` float32 and ``zero_point`` int64, each ``[G, H]``, of keys or values."""
        params = search_histogram(*self.attention[path, operand].table(), bits)
        return params.delta.float().view(-1, heads), params.zero_point.long().view(-1, heads)

    def operand(
        self, path: str, operand: str, bits: int, percentiles: tuple[float, ...] = PERCENTILES
    ) -> UniformParams:
        """Parameters of one attention operand, shape ``[G]``."""
        return search_histogram(*self.attention[path, operand].table(), bits, percentiles)


def kv_groups(model: Any) -> Tensor:
    """Slot groups of the key/value cache, int64 ``[T]``: sinks have scales of their own, the rest shares one per
    head."""
    groups = torch.zeros(model.sequence_length, dtype=torch.int64)
    if 0 < len(model.sinks) < model.sequence_length:
        groups[:] = 1
        groups[list(model.sinks)] = 0
    return groups


def measure(
    model: Any,
    sequences: CalibrationSet,
    *,
    per_tensor: bool = False,
    kv_per_tensor: bool = False,
    operands: tuple[str, ...] = ("k", "v"),
    batch: int = 16,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Statistics:
    """Two passes of the floating-point model over the sequences: ranges, then histograms.

    Args:
        per_tensor: one group per linear instead of the model's groups (baselines).
        kv_per_tensor: one group for k and one for v, instead of (slot group, head) (the published recipe).
        operands: attention operands to observe.

    Raises:
        CalibrationError: no sequences, or NaN or infinity in an activation.
    """
    specs = model.linear_specs()
    groups = {
        path: torch.zeros(model.sequence_length, dtype=torch.int64)
        if per_tensor
        else torch.tensor(spec.group_of_position)
        for path, spec in specs.items()
    }
    linears = {path: Histogram(int(group.max()) + 1, path) for path, group in groups.items()}
    slots = kv_groups(model)
    attention: dict[tuple[str, str], Histogram] = {}
    for spec in model.block_specs():
        for operand in operands:
            single = kv_per_tensor or operand not in ("k", "v")
            count = 1 if single else (int(slots.max()) + 1) * spec.attention.heads
            attention[spec.attention.path, operand] = Histogram(count, f"{spec.attention.path}.{operand}")

    def kv_rows(path: str, operand: str, x: Tensor) -> tuple[Tensor, Tensor]:
        batch_size, heads, length, _ = x.shape
        rows = x.flatten(0, 2)
        if kv_per_tensor or operand not in ("k", "v"):
            return rows, torch.zeros(len(rows), dtype=torch.int64)
        group = slots[:length] * heads + torch.arange(heads)[:, None]
        return rows, group.flatten().repeat(batch_size)

    def first(path: str, rows: Rows) -> None:
        linears[path].see_range(rows.values, groups[path][rows.positions])

    def second(path: str, rows: Rows) -> None:
        linears[path].see_values(rows.values, groups[path][rows.positions], rows.counts)

    paths = list(specs)
    with (
        watch_linears(model, paths, first),
        watch_attention(
            model, operands, lambda path, name, x: attention[path, name].see_range(*kv_rows(path, name, x))
        ),
    ):
        calibration_pass(model, sequences, batch, lambda fraction: progress(0.4 * fraction))
    with (
        watch_linears(model, paths, second),
        watch_attention(
            model, operands, lambda path, name, x: attention[path, name].see_values(*kv_rows(path, name, x))
        ),
    ):
        calibration_pass(model, sequences, batch, lambda fraction: progress(0.4 + 0.6 * fraction))
    return Statistics(linears, groups, attention, tuple(model.sinks))
