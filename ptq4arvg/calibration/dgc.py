"""DGC, distribution-guided calibration: which recorded sequences to calibrate on.

The published criterion, the Mahalanobis distance of each sequence in a space with more dimensions than sequences, is
the same number for every sequence (method.md §1.7), and its code keeps the first sequences in order. The default here
ranks samples for real: sequences are described by their activations in several blocks, the description is reduced to at
most 16 principal axes pooled over both guidance branches, and sequences are taken greedily by how much each one adds to
the log-determinant of the covariance of those already taken (D-optimal design). The published criterion is here too,
for ``recipe="paper"``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptq4arvg.calibration.watch import calibration_pass
from ptq4arvg.errors import CalibrationError
from ptq4arvg.protocol import CalibrationSet, ordinary_positions

__all__ = ["Selection", "d_optimal", "features", "mahalanobis", "select", "select_published"]

AXES = 16
RIDGE = 1e-3


@dataclass(frozen=True)
class Selection:
    """Sequences kept.

    Attributes:
        rows: int64 ``[k]``, indices into the candidates, in the order of selection.
        gains: float64 ``[k]``, what each added (log-determinant, nats); None for the published criterion.
        conditional, unconditional: how many of each branch were kept, out of ``candidates`` sequences in all.
        method: ``"d_optimal"``, ``"published"`` or ``"all"``.
    """

    rows: Tensor
    gains: Tensor | None
    conditional: int
    unconditional: int
    candidates: int
    method: str

    def report(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "candidates": self.candidates,
            "conditional": self.conditional,
            "unconditional": self.unconditional,
            "rows": self.rows.tolist(),
            "gains": None if self.gains is None else [round(g, 6) for g in self.gains.tolist()],
        }


def _selection(sequences: CalibrationSet, rows: Tensor, gains: Tensor | None, method: str) -> Selection:
    conditional = int(sequences.conditional[rows].sum())
    return Selection(rows, gains, conditional, len(rows) - conditional, len(sequences), method)


def _check_count(sequences: CalibrationSet, count: int) -> None:
    if count < 1:
        raise CalibrationError(f"calibration needs at least one sequence, got {count}; pass samples ≥ 1")
    if count > len(sequences):
        raise CalibrationError(
            f"cannot keep {count} of {len(sequences)} calibration sequences; record more or keep fewer"
        )


def block_outputs(model: Any, sequences: CalibrationSet, blocks: list[int], batch: int) -> list[Tensor]:
    """Output of the named blocks for all sequences, each as a list of float64 ``[n, 2, D]``: mean and deviation over
    non-sink positions."""
    keep = ordinary_positions(model)
    specs = model.block_specs()
    seen: dict[int, list[Tensor]] = {i: [] for i in blocks}
    handles = []
    for i in blocks:

        def hook(_module: Any, _args: Any, output: Tensor, i: int = i) -> None:
            rows = output[:, keep[: output.shape[1]]].double()
            seen[i].append(torch.stack([rows.mean(1), rows.std(1, unbiased=False)], 1))

        handles.append(model.get_submodule(specs[i].path).register_forward_hook(hook))
    try:
        calibration_pass(model, sequences, batch)
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(seen[i]) for i in blocks]


def features(model: Any, sequences: CalibrationSet, batch: int = 16) -> Tensor:
    """Descriptions of sequences, float64 ``[n, ≤ 16]``: per-channel mean and deviation after a third, two thirds and
    all of the blocks, standardised over the candidates, projected on their leading principal axes and scaled to unit
    variance along the first."""
    depth = len(model.block_specs())
    blocks = sorted({max(0, round(depth * part) - 1) for part in (1 / 3, 2 / 3, 1.0)})
    raw = torch.cat([part.flatten(1) for part in block_outputs(model, sequences, blocks, batch)], 1)
    return principal_axes(raw)


def principal_axes(raw: Tensor, axes: int = AXES) -> Tensor:
    """Standardise the columns of ``raw [n, F]`` and project on at most ``axes`` principal axes."""
    deviation = raw.std(0, unbiased=False)
    varying = deviation > 1e-12 * deviation.max().clamp(min=1e-300)
    if not bool(varying.any()):
        return torch.zeros(len(raw), 1, dtype=torch.float64)
    standard = (raw[:, varying] - raw[:, varying].mean(0)) / deviation[varying]
    u, s, _ = torch.linalg.svd(standard, full_matrices=False)
    kept = min(axes, int((s > 1e-9 * s[0]).sum()))
    return u[:, :kept] * (s[:kept] / s[0]) * len(raw) ** 0.5


def d_optimal(points: Tensor, count: int, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """Greedy D-optimal subset.

    Starting from ``M = ridge·I``, the point with the largest ``log(1 + xᵀM⁻¹x)`` is taken, ``M`` grows by ``xxᵀ`` (its
    inverse by Sherman–Morrison), and so on. Equal gains go to the lower index.

    Args:
        points: float64 ``[n, d]``, centred.
        count: how many to take.

    Returns:
        indices int64 ``[count]`` in order of selection, and their gains in nats.
    """
    inverse = torch.eye(points.shape[1], dtype=torch.float64) / ridge
    left = torch.ones(len(points), dtype=torch.bool)
    rows, gains = [], []
    for _ in range(count):
        projected = points @ inverse
        gain = torch.log1p((projected * points).sum(1).clamp(min=0))
        gain[~left] = -1.0
        best = int(gain.argmax())
        rows.append(best)
        gains.append(float(gain[best]))
        left[best] = False
        v = projected[best]
        inverse = inverse - torch.outer(v, v) / (1 + v @ points[best])
    return torch.tensor(rows), torch.tensor(gains, dtype=torch.float64)


def select(model: Any, sequences: CalibrationSet, count: int, batch: int = 16) -> Selection:
    """Keep the ``count`` sequences that add most to the distribution.

    Raises:
        CalibrationError: count below 1 or above the number of sequences.
    """
    _check_count(sequences, count)
    if count == len(sequences):
        return _selection(sequences, torch.arange(count), None, "all")
    rows, gains = d_optimal(features(model, sequences, batch), count)
    return _selection(sequences, rows, gains, "d_optimal")


def mahalanobis(points: Tensor) -> Tensor:
    """Distance of each row of ``points [n, D]`` to their mean, with the pseudo-inverse of ``XᵀX/(n−1)`` (method.md
    §1.7); float64 ``[n]``.

    In float64, and with deviations below single precision taken for none: rows that are equal but for the rounding of
    the forward pass (the unconditional ones of a causal model) have distance 0, not one that is made of rounding.
    """
    points = points.double()
    if len(points) == 0:
        return points.new_zeros(0)
    centred = points - points.mean(0)
    covariance = centred.T @ centred / max(1, len(points) - 1)
    noise = float(points.square().mean()) * 1e-12
    relative = points.shape[1] * torch.finfo(points.dtype).eps
    inverse = torch.linalg.pinv(covariance, atol=noise, rtol=relative, hermitian=True)
    return ((centred @ inverse) * centred).sum(1).clamp(min=0).sqrt()


def select_published(model: Any, sequences: CalibrationSet, count: int, batch: int = 16) -> Selection:
    """The published choice: a conditional fraction from Mahalanobis distances at token 0 of the last block, then the
    first rows in order."""
    _check_count(sequences, count)
    specs = model.block_specs()
    parts: list[Tensor] = []
    handle = model.get_submodule(specs[-1].path).register_forward_hook(
        lambda _m, _a, output: parts.append(output[:, 0])
    )
    try:
        calibration_pass(model, sequences, batch)
    finally:
        handle.remove()
    token0 = torch.cat(parts)
    conditional = sequences.conditional.nonzero().flatten()
    unconditional = (~sequences.conditional).nonzero().flatten()
    cond, uncond = mahalanobis(token0[conditional]), mahalanobis(token0[unconditional])
    if len(cond) == len(uncond) and torch.allclose(cond, uncond, atol=1e-3):
        fraction = 0.5
    else:
        largest = torch.cat([cond, uncond]).topk(min(count, len(cond) + len(uncond))).indices
        fraction = float((largest < len(cond)).double().mean())
    wanted = min(round(fraction * count), len(conditional))
    rows = torch.cat([conditional[:wanted], unconditional[: count - wanted]])
    return _selection(sequences, rows, None, "published")
