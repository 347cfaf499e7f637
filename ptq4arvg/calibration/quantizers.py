"""Static quantization parameters by percentile search (method.md §1.1), for activations and for weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "PERCENTILES",
    "UniformParams",
    "fake_quantize",
    "search_columns",
    "search_histogram",
    "symmetric_rows",
]

# The published candidates and the full range.
PERCENTILES = (0.999, 0.9999, 0.99999, 1.0)


@dataclass(frozen=True)
class UniformParams:
    """``q = clamp(round(x/delta) + zero_point, 0, 2^bits − 1)``; float64 ``delta`` and ``zero_point`` of any common
    shape.

    The zero point is an integer in the grid: every calibrated range contains 0 (architecture, laws of the arithmetic).
    """

    delta: Tensor
    zero_point: Tensor
    bits: int


def uniform_params(low: Tensor, high: Tensor, bits: int, contain_zero: bool = True) -> UniformParams:
    """Parameters of the range ``[min(low, 0), max(high, 0)]``; an empty range (only zeros seen) gets a step of 1.

    The step is rounded to float32 first, so that what is searched is what is stored.
    """
    low, high = low.double(), high.double()
    if contain_zero:
        low, high = low.clamp(max=0), high.clamp(min=0)
    steps = 2**bits - 1
    delta = (high - low) / steps
    delta = torch.where(delta > 1e-30, delta, torch.ones_like(delta)).float().double()
    zero_point = (-low / delta).round()
    return UniformParams(delta, zero_point.clamp(0, steps) if contain_zero else zero_point, bits)


def fake_quantize(x: Tensor, params: UniformParams) -> Tensor:
    """Quantize and dequantize; parameters broadcast against x. In x's dtype."""
    delta, zero_point = params.delta.to(x.dtype), params.zero_point.to(x.dtype)
    q = ((x / delta).round() + zero_point).clamp(0, 2**params.bits - 1)
    return (q - zero_point) * delta


def _best(candidates: list[tuple[Tensor, UniformParams]]) -> UniformParams:
    """Element by element, the candidate of the lowest error; the earlier one wins a tie."""
    error, params = candidates[0]
    delta, zero_point = params.delta, params.zero_point
    for other_error, other in candidates[1:]:
        better = other_error < error
        error = torch.where(better, other_error, error)
        delta = torch.where(better, other.delta, delta)
        zero_point = torch.where(better, other.zero_point, zero_point)
    return UniformParams(delta, zero_point, params.bits)


def search_histogram(
    centres: Tensor, counts: Tensor, bits: int, percentiles: tuple[float, ...] = PERCENTILES
) -> UniformParams:
    """Per group the percentile window of the lowest squared error.

    Args:
        centres, counts: float64 ``[G, bins]`` from :class:`~ptq4arvg.calibration.observers.Histogram`.
        bits: width of the codes.
        percentiles: candidates p; the window is ``[quantile(1 − p), quantile(p)]`` extended to contain 0.

    Returns:
        parameters of shape ``[G]``.
    """
    mass = counts.cumsum(1)
    total = mass[:, -1:]
    half = (centres[:, 1:2] - centres[:, :1]) / 2
    candidates = []
    for p in percentiles:
        # Edges of the first bins that reach the two quantiles.
        upper = torch.searchsorted(mass, total * p).clamp(max=counts.shape[1] - 1)
        lower = torch.searchsorted(mass, total * (1 - p), right=True).clamp(max=counts.shape[1] - 1)
        params = uniform_params((centres.gather(1, lower) - half)[:, 0], (centres.gather(1, upper) + half)[:, 0], bits)
        column = UniformParams(params.delta[:, None], params.zero_point[:, None], bits)
        error = ((fake_quantize(centres, column) - centres).square() * counts).sum(1)
        candidates.append((error, params))
    return _best(candidates)


def search_columns(
    x: Tensor, bits: int, percentiles: tuple[float, ...] = PERCENTILES, contain_zero: bool = True
) -> UniformParams:
    """The same search for every column of x ``[n, C]``; parameters of shape ``[C]``.

    With ``contain_zero`` False windows are not extended and zero points may leave the grid, as in the published
    per-channel quantizer; such parameters describe a window (for a channel shift) and cannot be deployed.
    """
    ordered = x.sort(0).values.double()
    candidates = []
    for p in percentiles:
        at = p * (len(x) - 1)
        params = uniform_params(_quantile(ordered, len(x) - 1 - at), _quantile(ordered, at), bits, contain_zero)
        error = (fake_quantize(ordered, params) - ordered).square().sum(0)
        candidates.append((error, params))
    return _best(candidates)


def _quantile(ordered: Tensor, at: float) -> Tensor:
    """Row ``at`` of a column-wise sorted matrix, linearly interpolated (torch.quantile refuses more than 2^24
    elements)."""
    below = min(int(at), len(ordered) - 1)
    above = min(below + 1, len(ordered) - 1)
    return torch.lerp(ordered[below], ordered[above], at - below)


def symmetric_rows(
    weight: Tensor, bits: int, importance: Tensor | None = None, steps: int = 24
) -> tuple[Tensor, Tensor]:
    """Round-to-nearest symmetric weight codes, one scale per row, clipped where that lowers the squared error.

    Args:
        weight: float ``[N, K]``.
        bits: 8 or 6; codes lie in ``±(2^(bits−1) − 1)``.
        importance: float ``[K]``, weight of each column's error (the mean square of the channel it multiplies); None
            means 1.
        steps: candidates; the scale is searched from the row's maximum down to half of it.

    Returns:
        codes int8 ``[N, K]``, scale float32 ``[N]``.
    """
    limit = 2 ** (bits - 1) - 1
    w = weight if weight.dtype == torch.float64 else weight.float()
    peak = w.abs().amax(1)
    peak = torch.where(peak > 1e-30, peak, torch.ones_like(peak))
    column_weight = torch.ones(w.shape[1], dtype=w.dtype) if importance is None else importance.to(w.dtype)
    best_error = torch.full_like(peak, torch.inf)
    best_scale = peak / limit
    for step in range(steps):
        scale = (peak * (1 - 0.5 * step / steps) / limit).float().to(w.dtype)
        codes = (w / scale[:, None]).round_().clamp_(-limit, limit)
        error = codes.mul_(scale[:, None]).sub_(w).square_() @ column_weight
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    codes = (w / best_scale[:, None]).round().clamp(-limit, limit)
    return codes.to(torch.int8), best_scale.float()
