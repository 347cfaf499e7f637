"""Channel shift and gain-projected scaling (method.md §1.3, §1.4, invariants 4 and 6 to 12)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ptq4arvg.calibration import gps
from ptq4arvg.calibration.gps import (
    channel_losses,
    channel_shift,
    closed_form,
    gps_scale,
    layer_error,
    smoothquant_scale,
)
from ptq4arvg.calibration.quantizers import search_columns, symmetric_rows
from ptq4arvg.errors import CalibrationError

SEEDS = st.integers(0, 2**20)
BITS = st.sampled_from([6, 8])


def outliers(
    seed: int, rows: int = 512, channels: int = 48, outputs: int = 64, sigma: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Centred Gaussian channels with lognormal scales, float64 ``[n, D]``, and a weight ``[m, D]`` that knows nothing
    of them."""
    g = torch.Generator().manual_seed(seed)
    spread = torch.exp(sigma * torch.randn(channels, generator=g, dtype=torch.float64))
    x = torch.randn(rows, channels, generator=g, dtype=torch.float64) * spread
    return x, torch.randn(outputs, channels, generator=g) / channels**0.5


def offsets(seed: int, channels: int, x: Tensor) -> Tensor:
    """±4 deviations per channel, as in the stress models."""
    g = torch.Generator().manual_seed(seed + 1)
    return 4 * x.std(0) * (torch.randint(0, 2, (channels,), generator=g) * 2 - 1)


def surrogate(a: Tensor, b: Tensor, ratio: Tensor, k: int) -> float:
    """Diagonal loss without channel k, which scaling by ratios leaves as it is."""
    others = torch.arange(len(a)) != k
    return float((a * ratio**2 + b / ratio**2)[others].sum())


# --------------------------------------------------------------------------------------------------------- closed form


@given(
    a=st.floats(1e-8, 1e8, allow_subnormal=False),
    b=st.floats(1e-8, 1e8, allow_subnormal=False),
    s_k=st.floats(0.01, 100),
)
def test_the_closed_form_is_the_minimum_of_a_dense_grid(a: float, b: float, s_k: float) -> None:
    losses_a, losses_b = (torch.tensor([1.0, v], dtype=torch.float64) for v in (a, b))
    r = float(closed_form(losses_a, losses_b, 0)[1])
    # J(s) = A (s/s_k)² + B (s_k/s)² on a grid of relative step 5e-5 around two decades of the claimed minimum.
    s = s_k * r * torch.exp(torch.linspace(-4.6, 4.6, 184_001, dtype=torch.float64))
    loss = a * (s / s_k) ** 2 + b * (s_k / s) ** 2
    best = int(loss.argmin())
    assert float(s[best]) / s_k == pytest.approx(r, rel=1e-4)
    assert float(loss[best]) == pytest.approx(2 * math.sqrt(a * b), rel=1e-6)
    # The minimum is inside, and it is a minimum.
    assert loss[0] > loss[best] < loss[-1]


@given(seed=SEEDS, n=st.integers(2, 20))
def test_losses_are_balanced_everywhere_but_at_the_widest_channel(seed: int, n: int) -> None:
    g = torch.Generator().manual_seed(seed)
    a, b = torch.exp(3 * torch.randn(2, n, generator=g, dtype=torch.float64))
    k = int(torch.randint(n, (1,), generator=g))
    r = closed_form(a, b, k)
    assert r[k] == 1.0
    others = torch.arange(n) != k
    assert torch.allclose((a * r**2)[others], (b / r**2)[others], rtol=1e-10)
    assert torch.allclose((a * r**2)[others], (a * b).sqrt()[others], rtol=1e-10)


def test_channels_without_loss_keep_their_scale() -> None:
    a = torch.tensor([1.0, 0.0, 2.0, 0.0], dtype=torch.float64)
    b = torch.tensor([1.0, 3.0, 0.0, 0.0], dtype=torch.float64)
    assert closed_form(a, b, 0).tolist() == [1.0, 1.0, 1.0, 1.0]
    assert closed_form(torch.tensor([0.0]).double(), torch.tensor([0.0]).double(), 0).tolist() == [1.0]


def test_losses_are_those_of_the_definition() -> None:
    x, w = outliers(0, 40, 5, 6)
    a, b, k = channel_losses(x, w, 6, 8)
    assert k == int((x.amax(0) - x.amin(0)).argmax())
    params = search_columns(x[:, k : k + 1], 6)
    delta, zero_point = params.delta.item(), params.zero_point.item()
    codes, scale = symmetric_rows(w, 8)
    rounded = codes.double() * scale[:, None].double()
    for i in range(5):
        q = ((x[:, i] / delta).round() + zero_point).clamp(0, 63)
        dx = float((((q - zero_point) * delta) - x[:, i]).square().sum())
        assert float(a[i]) == pytest.approx(dx * float(rounded[:, i].square().sum()), rel=1e-9)
        dw = float((rounded[:, i] - w[:, i].double()).square().sum())
        assert float(b[i]) == pytest.approx(float(x[:, i].square().sum()) * dw, rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_law_of_uniform_noise(seed: int) -> None:
    """8-bit Gaussian data, channels well above a step: r_i = √(rms(x_i) δ_w / (rms(w_i) δ_x))."""
    g = torch.Generator().manual_seed(seed)
    spread = torch.exp(0.4 * torch.randn(64, generator=g, dtype=torch.float64))
    x = torch.randn(4096, 64, generator=g, dtype=torch.float64) * spread
    w = torch.randn(512, 64, generator=g)
    a, b, k = channel_losses(x, w, 8, 8)
    r = closed_form(a, b, k)
    delta_x = search_columns(x[:, k : k + 1], 8).delta
    delta_w = symmetric_rows(w, 8)[1].double().square().mean().sqrt()
    law = (x.square().mean(0).sqrt() * delta_w / (w.double().square().mean(0).sqrt() * delta_x)).sqrt()
    others = torch.arange(64) != k
    observed = (r / law)[others]
    assert float(observed.min()) >= 0.95
    assert float(observed.max()) <= 1.05


@given(seed=SEEDS, act_bits=BITS, weight_bits=BITS)
def test_the_surrogate_falls_below_no_scaling_and_below_smoothquant(seed: int, act_bits: int, weight_bits: int) -> None:
    x, w = outliers(seed, 256, 24, 32)
    a, b, k = channel_losses(x, w, act_bits, weight_bits)
    r = closed_form(a, b, k)
    smooth = smoothquant_scale(x.abs().amax(0), w)
    loss = surrogate(a, b, r, k)
    assert loss <= surrogate(a, b, torch.ones_like(a), k) * (1 + 1e-12)
    assert loss <= surrogate(a, b, smooth / smooth[k], k) * (1 + 1e-12)


def test_smoothquant_is_its_formula() -> None:
    w = torch.tensor([[1.0, -4.0, 0.0], [0.5, 2.0, 0.0]])
    scale = smoothquant_scale(torch.tensor([9.0, 1.0, 0.0]), w)
    assert scale.tolist() == pytest.approx([3.0, 0.5, 1.0])


# --------------------------------------------------------------------------------------------------------------- gauge


@pytest.mark.parametrize("act_bits", [6, 8])
@pytest.mark.parametrize("weight_bits", [6, 8])
def test_a_common_factor_changes_nothing(act_bits: int, weight_bits: int) -> None:
    x, w = outliers(1, 512, 48, 64)
    scale = torch.exp(torch.randn(48, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    error = layer_error(x, w, scale, act_bits, weight_bits)
    assert error > 1e-6
    for power in (0.25, 2.0, 1024.0):
        assert layer_error(x, w, scale * power, act_bits, weight_bits) == error
    for factor in (0.3, 1.7, 77.0):
        assert layer_error(x, w, scale * factor, act_bits, weight_bits) == pytest.approx(error, rel=GAUGE)


# Squared error that a rounding of steps to float32 may move: a value on the edge of two codes errs by δ/2 either way.
GAUGE = 1e-5


def test_the_factor_is_fixed_by_equal_peaks() -> None:
    x, w = outliers(3)
    scale = gps_scale(x, w, 8, 8).scale
    assert float((x / scale).abs().max()) == pytest.approx(float((w.double() * scale).abs().max()), rel=1e-9)


# --------------------------------------------------------------------------------------------------------------- shift


@given(seed=SEEDS, bits=BITS)
def test_the_shift_centres_every_channel(seed: int, bits: int) -> None:
    # A share of the values lies at the ends, so that all percentiles agree: where they differ, the search may prefer
    # another window, with another middle, for the shifted values.
    x = torch.rand(2000, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x.clamp(0.05, 0.95) * torch.exp(torch.linspace(-3, 3, 16, dtype=torch.float64)) + torch.linspace(
        -20, 20, 16, dtype=torch.float64
    )
    middle = 2 ** (bits - 1)
    assert bool(((search_columns(x, bits).zero_point - middle).abs() > 1).any())
    after = search_columns(x - channel_shift(x, bits), bits)
    assert bool(((after.zero_point - middle).abs() <= 1).all())


@pytest.mark.parametrize("bits", [6, 8])
def test_the_shift_centres_tails_too(bits: int) -> None:
    x, _ = outliers(0, 4096, 64)
    x = x + offsets(0, 64, x)
    away = (search_columns(x - channel_shift(x, bits), bits).zero_point - 2 ** (bits - 1)).abs()
    assert float((away <= 1).double().mean()) > 0.8
    assert away.max() <= 2 ** (bits - 1) / 8


@given(seed=SEEDS, bits=BITS, value=st.floats(-1e3, 1e3))
def test_constant_and_dead_channels_are_shifted_to_zero(seed: int, bits: int, value: float) -> None:
    x, _ = outliers(seed, 64, 6)
    x[:, 1], x[:, 4] = value, 0.0
    shift = channel_shift(x, bits)
    assert shift[1].item() == value
    assert shift[4].item() == 0.0
    assert bool(((x - shift)[:, [1, 4]] == 0).all())
    assert bool((shift >= x.amin(0)).all())
    assert bool((shift <= x.amax(0)).all())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bits", [6, 8])
def test_without_the_shift_offsets_ruin_gps(bits: int, seed: int) -> None:
    """Closed-form GPS loses to SmoothQuant on offset channels, and wins once they are shifted (method.md §1.3)."""
    centred, w = outliers(seed, 1024, 64, 96, sigma=1.5)
    x = centred + offsets(seed, 64, centred)

    def error(x: Tensor, scale: Tensor) -> float:
        """Absolute: the mean that a shift moves into the bias must not count as signal."""
        return layer_error(x, w, scale, bits, bits) * float((x @ w.double().T).square().sum())

    def closed(x: Tensor) -> float:
        return error(x, closed_form(*channel_losses(x, w, bits, bits)))

    def smooth(x: Tensor) -> float:
        return error(x, smoothquant_scale(x.abs().amax(0), w))

    shifted = x - channel_shift(x, bits)
    assert closed(x) > 2 * smooth(x)
    assert closed(shifted) < closed(x) / 10
    # The whole search hides the loss only in part.
    assert error(shifted, gps_scale(shifted, w, bits, bits).scale) < error(x, gps_scale(x, w, bits, bits).scale) / 2


# -------------------------------------------------------------------------------------------------------------- search


@pytest.mark.parametrize("power", [-8, -4, 0, 8])
@pytest.mark.parametrize("seed", range(3))
def test_the_clip_keeps_the_widest_channel_the_widest(monkeypatch: pytest.MonkeyPatch, seed: int, power: int) -> None:
    factor = 2.0 ** (power / 2)
    monkeypatch.setattr(gps, "COARSE", (power,))
    monkeypatch.setattr(gps, "FINE", ())
    monkeypatch.setattr(gps, "ROUNDS", 1)
    tried: list[Tensor] = []
    measure = gps.layer_error

    def watch(x: Tensor, weight: Tensor, scale: Tensor, act_bits: int, weight_bits: int) -> float:
        tried.append(scale)
        return measure(x, weight, scale, act_bits, weight_bits)

    monkeypatch.setattr(gps, "layer_error", watch)
    x, w = outliers(seed, sigma=1.5)
    gps_scale(x, w, 6, 6)
    fit = x[::2]
    starts = [torch.ones(x.shape[1], dtype=torch.float64), gps._rms_gauge(fit, w)]
    assert len(tried) == 1 + len(starts)
    clipped = 0
    for start, scale in zip(starts, tried[1:], strict=True):
        before, after = ((fit / s).amax(0) - (fit / s).amin(0) for s in (start, scale))
        k = int(before.argmax())
        assert float(after.max()) <= float(after[k]) * (1 + 1e-9)
        assert float(after[k]) == pytest.approx(float(before[k]), rel=1e-12)
        a, b, _ = channel_losses(fit / start, w.double() * start, 6, 6)
        wanted = factor * closed_form(a, b, k)
        clipped += int(((scale / start) > wanted * (1 + 1e-9)).sum())
    if factor < 0.2:
        assert clipped > 10


@settings(max_examples=10)
@given(seed=SEEDS, bits=BITS)
def test_scaling_helps_on_rows_it_has_not_seen(seed: int, bits: int) -> None:
    """True layer error on fresh rows, not the surrogate and not the rows that chose (invariant 12)."""
    x, w = outliers(seed, 1024, 48, 64, sigma=1.5)
    found = gps_scale(x[:512], w, bits, bits)
    fresh = x[512:]
    unscaled = layer_error(fresh, w, torch.ones(48, dtype=torch.float64), bits, bits)
    assert layer_error(fresh, w, found.scale, bits, bits) <= unscaled
    assert found.error < found.unscaled_error


@pytest.mark.parametrize("bits", [6, 8])
def test_on_average_the_search_beats_what_it_starts_from(bits: int) -> None:
    """Geometric means over layers of the error on fresh rows, against no scaling, SmoothQuant and plain GPS."""
    ratios = []
    for seed in range(6):
        x, w = outliers(seed, 1024, 48, 64, sigma=1.5)
        fit, fresh = x[:512], x[512:]
        found = layer_error(fresh, w, gps_scale(fit, w, bits, bits).scale, bits, bits)
        others = (
            torch.ones(48, dtype=torch.float64),
            smoothquant_scale(fit.abs().amax(0), w),
            closed_form(*channel_losses(fit, w, bits, bits)),
        )
        ratios.append([math.log(found / layer_error(fresh, w, scale, bits, bits)) for scale in others])
    none, smooth, plain = torch.tensor(ratios).mean(0).exp().tolist()
    assert none < 0.5
    assert smooth < 0.95
    assert plain < 0.9


def test_the_report_is_the_error_of_the_scale() -> None:
    x, w = outliers(5)
    found = gps_scale(x, w, 6, 6)
    judge = x[1::2]
    assert layer_error(judge, w, found.scale, 6, 6) == pytest.approx(found.error, rel=1e-4)
    ones = torch.ones(48, dtype=torch.float64)
    assert layer_error(judge, w, ones, 6, 6) == found.unscaled_error
    assert found.start in ("as is", "rms")
    assert found.rounds in (1, 2)
    assert (2 * math.log2(found.factor)).is_integer()


def test_it_is_deterministic() -> None:
    x, w = outliers(6)
    assert torch.equal(gps_scale(x, w, 8, 8).scale, gps_scale(x.clone(), w.clone(), 8, 8).scale)


@pytest.mark.parametrize("case", ["constant", "dead", "no weight", "all dead", "exact", "single"])
@pytest.mark.parametrize("seed", [0, 1])
def test_degenerate_channels_get_finite_positive_scales(seed: int, case: str) -> None:
    x, w = outliers(seed, 64, 1 if case == "single" else 8, 12)
    if case == "constant":
        x[:, 2] = 3.0
    elif case == "dead":
        x[:, [2, 5]] = 0.0
    elif case == "no weight":
        w[:, [0, 3]] = 0.0
    elif case == "all dead":
        x.zero_()
    elif case == "exact":  # values on the grid of the widest channel: A_i = 0 up to rounding
        k = int((x.amax(0) - x.amin(0)).argmax())
        delta = search_columns(x[::2, k : k + 1], 8).delta
        others = [i for i in range(8) if i != k][:2]
        x[:, others] = (x[:, others] / delta).round() * delta
    scale = gps_scale(x, w, 8, 6).scale
    assert scale.shape == (x.shape[1],)
    assert bool((torch.isfinite(scale) & (scale > 0)).all())
    error = layer_error(x[1::2], w, scale, 8, 6)
    assert error <= layer_error(x[1::2], w, torch.ones_like(scale), 8, 6) * (1 + 1e-3)


@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_rows_are_an_error_that_says_so(rows: int) -> None:
    x, w = outliers(0, 4, 8, 12)
    with pytest.raises(CalibrationError, match=f"at least 2 calibration rows.*got {rows}"):
        gps_scale(x[:rows], w, 8, 8)
