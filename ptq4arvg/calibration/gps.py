"""GPS, gain-projected scaling (method.md §1.3 and §1.4): which shift and scale each channel of a norm → Linear pair
should get.

The closed form balances, channel by channel, the loss from rounding activations (A) against the loss from rounding
weights (B). It assumes that the widest channel stays the widest and that weight steps do not change; what these
assumptions miss is recovered by a clip that keeps the first one true and by a one-dimensional search on the layer's
real output error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq4arvg.calibration.quantizers import UniformParams, fake_quantize, search_columns, symmetric_rows
from ptq4arvg.errors import CalibrationError

__all__ = [
    "ChannelScale",
    "channel_losses",
    "channel_shift",
    "closed_form",
    "gps_scale",
    "layer_error",
    "smoothquant_scale",
]

# Common factors tried on all channels but the widest (method.md §1.4.3, item 4), as powers of √2: first the coarse
# ones, then the neighbours of the best.
COARSE = (-8, -4, -2, 0, 2, 4, 8)
FINE = (-1, 1)
# Rows on which candidates are judged; the errors compared differ by more than what so many rows leave uncertain.
JUDGE_ROWS = 1024
# Judging a candidate: clip candidates of the weight rows, values from which the activation window is searched.
CLIP_STEPS = 8
PERCENTILE_VALUES = 1 << 17
ROUNDS = 2


@dataclass(frozen=True)
class ChannelScale:
    """Result of the search for one pair.

    Attributes:
        scale: float64 ``[D]``; the input is divided by it, the weight multiplied.
        error: relative squared output error on held-out rows with this scale, and ``unscaled_error`` without any.
        start, rounds, factor: which candidate won: starting gauge, closed-form rounds, common factor c.
    """

    scale: Tensor
    error: float
    unscaled_error: float
    start: str
    rounds: int
    factor: float


def channel_shift(x: Tensor, bits: int) -> Tensor:
    """Symmetric channel shift p ``[D]``: the middle of every channel's percentile window, so that ``x − p`` has zero
    point 0.

    The published shift, ``(2^(b−1) − 1 − z)·δ``, moves windows to the code below the middle; in signed codes that is
    −1. The window here is not extended to contain 0, since 0 need not be representable before the shift.
    """
    params = search_columns(x, bits, contain_zero=False)
    low, high = -params.zero_point * params.delta, (2**bits - 1 - params.zero_point) * params.delta
    # The window of a constant channel is not empty (its step falls back to 1): its middle would be far from the value.
    return ((low + high) / 2).clamp(x.double().amin(0), x.double().amax(0))


def smoothquant_scale(peak: Tensor, weight: Tensor) -> Tensor:
    """SmoothQuant with α = ½ (method.md §1.2): ``max|x|^½ / max|W|^½`` per channel, both maxima clamped at 1e-6."""
    return (peak.double().clamp(min=1e-6) / weight.double().abs().amax(0).clamp(min=1e-6)).sqrt()


def channel_losses(x: Tensor, weight: Tensor, act_bits: int, weight_bits: int) -> tuple[Tensor, Tensor, int]:
    """Diagonal losses of method.md §1.4.1: ``A_i = ‖Δx_i‖²‖Ŵ_i‖²``, ``B_i = ‖x_i‖²‖ΔW_i‖²``, and the widest channel k.

    Every channel is quantized with the parameters of channel k, as a per-tensor quantizer would.
    """
    x = x.double()
    k = int((x.amax(0) - x.amin(0)).argmax())
    widest = search_columns(x[:, k : k + 1], act_bits)
    error = fake_quantize(x, UniformParams(widest.delta, widest.zero_point, act_bits)) - x
    codes, scale = symmetric_rows(weight, weight_bits)
    rounded = codes.double() * scale.double()[:, None]
    a = error.square().sum(0) * rounded.square().sum(0)
    b = x.square().sum(0) * (rounded - weight.double()).square().sum(0)
    return a, b, k


def closed_form(a: Tensor, b: Tensor, k: int) -> Tensor:
    """Ratios ``r_i = s_i/s_k = (B_i/A_i)^¼`` ``[D]``, with ``r_k = 1``; channels without loss on either side keep 1."""
    usable = (a > 0) & (b > 0)
    ratio = torch.where(usable, b / torch.where(usable, a, torch.ones_like(a)), torch.ones_like(a)) ** 0.25
    ratio[k] = 1.0
    return ratio


def layer_error(x: Tensor, weight: Tensor, scale: Tensor, act_bits: int, weight_bits: int) -> float:
    """``‖xWᵀ − x̂Ŵᵀ‖² / ‖xWᵀ‖²`` with per-tensor activations and per-row symmetric weights, both after scaling."""
    scaled = (x.double() / scale).float()
    w = (weight.double() * scale).float()
    params = search_columns(_thinned(scaled.reshape(-1, 1), x.shape[1]), act_bits)
    codes, step = symmetric_rows(w, weight_bits, steps=CLIP_STEPS)
    exact = scaled @ w.T
    error = fake_quantize(scaled, params) @ (codes.float() * step[:, None]).T - exact
    return float(error.double().square().sum() / exact.double().square().sum().clamp(min=1e-300))


def _thinned(values: Tensor, channels: int) -> Tensor:
    """Every n-th value, about ``PERCENTILE_VALUES``; n is coprime to the number of channels, so none is left out."""
    stride = max(1, len(values) // PERCENTILE_VALUES)
    while math.gcd(stride, channels) > 1:
        stride += 1
    return values[::stride]


def gps_scale(x: Tensor, weight: Tensor, act_bits: int, weight_bits: int) -> ChannelScale:
    """Scale of the channels of one pair.

    Two starting gauges are tried: the channels as they are, and channels whose activation and weight have equal root
    mean squares, which is where GPS itself would lead if all errors were uniform noise (§1.4.3, RMS law) and does not
    depend on how the model's channels happen to be scaled. From each, the closed form is applied up to twice, clipped
    so that no channel overtakes the widest one (``r_i ≥ R_i/R_k``), and multiplied by a common factor; the candidate of
    the lowest output error on rows that were not used to derive it wins.

    Args:
        x: float ``[n, D]``, non-sink rows of the pair's input, already shifted; even rows derive, odd rows judge.
        weight: float ``[m, D]``, the stacked weights of the pair's linears.

    Raises:
        CalibrationError: fewer than two rows.
    """
    if len(x) < 2:
        raise CalibrationError(
            f"scaling needs at least 2 calibration rows besides the sinks, got {len(x)}; use more samples"
        )
    fit, judge = x[::2].double(), x[1::2].double()
    judge = judge[:: max(1, len(judge) // JUDGE_ROWS)]
    ones = torch.ones(x.shape[1], dtype=torch.float64)
    unscaled = layer_error(judge, weight, ones, act_bits, weight_bits)
    best = ChannelScale(ones, unscaled, unscaled, "none", 0, 1.0)
    for start, gauge in (("as is", ones), ("rms", _rms_gauge(fit, weight))):
        scale = gauge
        for rounds in range(1, ROUNDS + 1):
            scaled = fit / scale
            a, b, k = channel_losses(scaled, weight.double() * scale, act_bits, weight_bits)
            ratio = closed_form(a, b, k)
            spread = scaled.amax(0) - scaled.amin(0)
            floor = spread / spread[k].clamp(min=1e-30)
            scale, error, factor = _search_factor(judge, weight, scale, ratio, floor, k, act_bits, weight_bits)
            if error < best.error:
                best = ChannelScale(scale, error, unscaled, start, rounds, factor)
    return ChannelScale(_sane(best.scale, x, weight), best.error, unscaled, best.start, best.rounds, best.factor)


def _search_factor(
    x: Tensor, weight: Tensor, scale: Tensor, ratio: Tensor, floor: Tensor, k: int, act_bits: int, weight_bits: int
) -> tuple[Tensor, float, float]:
    """The common factor c that makes ``scale · max(c·ratio, floor)`` best on ``x``: that scale, its error, and c."""

    def scaled_by(power: int) -> Tensor:
        relative = torch.maximum(ratio * 2.0 ** (power / 2), floor)
        relative[k] = 1.0
        return scale * relative.clamp(min=1e-6)

    errors = {power: layer_error(x, weight, scaled_by(power), act_bits, weight_bits) for power in COARSE}
    middle = min(errors, key=lambda power: errors[power])
    for power in (middle + step for step in FINE):
        errors[power] = layer_error(x, weight, scaled_by(power), act_bits, weight_bits)
    best = min(errors, key=lambda power: errors[power])
    return scaled_by(best), errors[best], 2.0 ** (best / 2)


def _rms_gauge(x: Tensor, weight: Tensor) -> Tensor:
    """``sqrt(rms(x_i)/rms(w_i))``, 1 for channels that are zero on either side."""
    rms_x, rms_w = x.square().mean(0).sqrt(), weight.double().square().mean(0).sqrt()
    usable = (rms_x > 0) & (rms_w > 0)
    return torch.where(
        usable, (rms_x / torch.where(usable, rms_w, torch.ones_like(rms_w))).sqrt(), torch.ones_like(rms_x)
    )


def _sane(scale: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Fix the free common factor (quantization is scale-equivariant) so that scaled activations and weights have equal
    peaks."""
    peak_x, peak_w = (x.double() / scale).abs().amax(), (weight.double() * scale).abs().amax()
    return scale * (peak_x / peak_w).sqrt() if bool((peak_x > 0) & (peak_w > 0)) else scale
