"""Statistics of activations, pooled over any number of batches.

Two passes: the first finds the range of every group, the second counts values in a histogram over that range. Counts
are integers, so the result does not depend on how the data were cut into batches.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ptq4arvg.errors import CalibrationError

__all__ = ["Histogram", "RowSample"]


class Histogram:
    """Histogram of the values of G groups, filled in two passes.

    Args:
        groups: G.
        name: what is observed, for messages.
        bins: resolution; percentiles and errors are exact to one bin, a 16th of the step of an 8-bit grid over the
            whole range.
    """

    def __init__(self, groups: int, name: str, bins: int = 4096) -> None:
        self.name, self.bins = name, bins
        self.low = torch.full((groups,), math.inf, dtype=torch.float64)
        self.high = torch.full((groups,), -math.inf, dtype=torch.float64)
        self.counts: Tensor | None = None

    def see_range(self, values: Tensor, group: Tensor) -> None:
        """First pass: ``values [n, K]``, ``group`` int64 ``[n]``.

        Raises:
            CalibrationError: a NaN or infinity.
        """
        low, high = values.amin(1).double(), values.amax(1).double()
        if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
            bad = values[~torch.isfinite(values)][0].item()
            raise CalibrationError(f"{self.name}: calibration saw {bad}; the model or its checkpoint is damaged")
        self.low.scatter_reduce_(0, group, low, "amin")
        self.high.scatter_reduce_(0, group, high, "amax")

    def see_values(self, values: Tensor, group: Tensor, counts: Tensor | None = None) -> None:
        """Second pass over the same data; ``counts`` int64 ``[n]`` gives the multiplicity of each row."""
        groups = len(self.low)
        if self.counts is None:
            self.counts = torch.zeros(groups * self.bins, dtype=torch.float64)
        low, width = self.low[group], (self.high - self.low)[group]
        scale = torch.where(width > 0, self.bins / width, torch.zeros_like(width))
        index = ((values.double() - low[:, None]) * scale[:, None]).long().clamp_(0, self.bins - 1)
        index += group[:, None] * self.bins
        weights = None if counts is None else counts.double()[:, None].expand_as(values).flatten()
        self.counts += torch.bincount(index.flatten(), weights, minlength=groups * self.bins)

    def table(self) -> tuple[Tensor, Tensor]:
        """Bin centres and counts, float64 ``[G, bins]`` each.

        Raises:
            CalibrationError: a group that saw no value.
        """
        if self.counts is None or not bool(torch.isfinite(self.low).all()):
            empty = [] if self.counts is None else torch.nonzero(~torch.isfinite(self.low)).flatten().tolist()
            raise CalibrationError(f"{self.name}: no calibration value seen{f' for groups {empty}' if empty else ''}")
        width = (self.high - self.low) / self.bins
        centres = self.low[:, None] + (torch.arange(self.bins, dtype=torch.float64) + 0.5) * width[:, None]
        return centres, self.counts.view(-1, self.bins)


class RowSample:
    """An evenly spread sample of the rows of a layer's input, sinks excluded.

    Rows are numbered sequence by sequence and every ``stride``-th one is kept. The stride is coprime to the number of
    positions, so that every position is visited, and depends on the totals only: cutting the sequences into other
    batches keeps the same rows.

    Args:
        sequences: how many sequences the pass will show.
        kept_positions: bool ``[T]``, False for the positions to leave out.
        limit: about how many rows to keep.
    """

    def __init__(self, sequences: int, kept_positions: Tensor, limit: int) -> None:
        self.keep = kept_positions
        per_sequence = int(kept_positions.sum())
        self.stride = max(1, math.ceil(sequences * per_sequence / limit))
        while self.stride > 1 and math.gcd(self.stride, per_sequence) > 1:
            self.stride += 1
        self.seen = 0
        self.parts: list[Tensor] = []
        self.places: list[Tensor] = []

    def see(self, values: Tensor, positions: Tensor) -> None:
        """``values [n, K]`` batch-major, ``positions`` int64 ``[n]``."""
        kept = self.keep[positions]
        rows = values[kept]
        first = -self.seen % self.stride
        self.parts.append(rows[first :: self.stride].clone())
        self.places.append(positions[kept][first :: self.stride].clone())
        self.seen += len(rows)

    def rows(self) -> Tensor:
        """The sample, float32 ``[n, K]``."""
        return torch.cat(self.parts).float()

    def positions(self) -> Tensor:
        """Positions of the sampled rows, int64 ``[n]``."""
        return torch.cat(self.places)
