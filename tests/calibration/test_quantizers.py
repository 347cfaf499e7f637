"""Uniform quantizers and the search for their parameters (method.md §1.1, invariants 13 and 14)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ptq4arvg.calibration.observers import Histogram
from ptq4arvg.calibration.quantizers import (
    PERCENTILES,
    UniformParams,
    _best,
    fake_quantize,
    search_columns,
    search_histogram,
    symmetric_rows,
    uniform_params,
)

BITS = st.sampled_from([6, 8])
SEEDS = st.integers(0, 2**20)
SHAPES = ("gauss", "laplace", "t3", "gelu", "uniform")


def draw(seed: int, rows: int, columns: int, shape: str = "t3") -> Tensor:
    """Float64 ``[rows, columns]``, every column with a scale and an offset of its own."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=g, dtype=torch.float64)
    if shape == "laplace":
        u = torch.rand(rows, columns, generator=g, dtype=torch.float64) - 0.5
        x = -u.sign() * (-2 * u.abs()).log1p()
    elif shape == "t3":
        chi2 = torch.randn(3, rows, columns, generator=g, dtype=torch.float64).square().mean(0)
        x = x / chi2.sqrt()
    elif shape == "gelu":
        return torch.nn.functional.gelu(2 * x)
    elif shape == "uniform":
        x = torch.rand(rows, columns, generator=g, dtype=torch.float64)
    spread = torch.exp(torch.randn(columns, generator=g, dtype=torch.float64))
    return x * spread + torch.randn(columns, generator=g, dtype=torch.float64)


def squared_error(x: Tensor, params: UniformParams) -> Tensor:
    return (fake_quantize(x, params) - x).square().sum(0)


def filled(x: Tensor, group: Tensor, groups: int) -> Histogram:
    histogram = Histogram(groups, "x")
    histogram.see_range(x, group)
    histogram.see_values(x, group)
    return histogram


@given(seed=SEEDS, bits=BITS, low=st.floats(-1e4, 1e4), width=st.floats(1e-3, 1e4))
def test_the_error_is_at_most_half_a_step_inside_the_range(seed: int, bits: int, low: float, width: float) -> None:
    params = uniform_params(torch.tensor(low), torch.tensor(low + width), bits)
    first, last = -params.zero_point * params.delta, (2**bits - 1 - params.zero_point) * params.delta
    x = first + (last - first) * torch.rand(500, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    error = (fake_quantize(x, params) - x).abs()
    assert error.max() <= params.delta / 2 * (1 + 1e-9)
    # The grid spans the asked range, up to the rounding of the zero point.
    assert first <= low + params.delta / 2 * (1 + 1e-6)
    assert last >= low + width - params.delta / 2 * (1 + 1e-6)


@given(bits=BITS, low=st.floats(-1e6, 1e6), width=st.floats(0, 1e6))
def test_zero_is_exact_and_the_zero_point_is_a_code(bits: int, low: float, width: float) -> None:
    params = uniform_params(torch.tensor([low]), torch.tensor([low + width]), bits)
    assert bool((params.zero_point == params.zero_point.round()).all())
    assert 0 <= params.zero_point.item() <= 2**bits - 1
    assert params.delta.item() > 0
    assert fake_quantize(torch.zeros(1, dtype=torch.float64), params).item() == 0.0


@given(seed=SEEDS, bits=BITS)
def test_values_outside_are_clipped_to_the_ends(seed: int, bits: int) -> None:
    params = uniform_params(torch.tensor(-1.0), torch.tensor(2.0), bits)
    first, last = -params.zero_point * params.delta, (2**bits - 1 - params.zero_point) * params.delta
    ends = fake_quantize(torch.tensor([-1e6, 1e6], dtype=torch.float64), params)
    assert ends.tolist() == pytest.approx([first.item(), last.item()], rel=1e-12)


@given(seed=SEEDS, bits=BITS, shape=st.sampled_from(SHAPES))
def test_quantizing_twice_changes_nothing(seed: int, bits: int, shape: str) -> None:
    x = draw(seed, 400, 3, shape)
    params = search_columns(x, bits)
    once = fake_quantize(x, params)
    assert torch.equal(fake_quantize(once, params), once)


@given(seed=SEEDS, bits=BITS, shape=st.sampled_from(SHAPES), contain_zero=st.booleans())
def test_search_in_columns_returns_the_best_candidate(seed: int, bits: int, shape: str, contain_zero: bool) -> None:
    x = draw(seed, 2000, 4, shape)
    found = squared_error(x, search_columns(x, bits, contain_zero=contain_zero))
    every = []
    for p in PERCENTILES:
        low, high = torch.quantile(x, 1 - p, dim=0), torch.quantile(x, p, dim=0)
        every.append(squared_error(x, uniform_params(low, high, bits, contain_zero)))
    assert torch.allclose(found, torch.stack(every).amin(0), rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [6, 8])
def test_search_in_a_histogram_returns_the_best_candidate(bits: int, shape: str) -> None:
    x = draw(5, 6, 4000, shape).roll(1, 1)
    centres, counts = filled(x, torch.arange(6) % 3, 3).table()

    def error(params: UniformParams) -> Tensor:
        columns = UniformParams(params.delta[:, None], params.zero_point[:, None], bits)
        return ((fake_quantize(centres, columns) - centres).square() * counts).sum(1)

    found = error(search_histogram(centres, counts, bits))
    single = torch.stack([error(search_histogram(centres, counts, bits, (p,))) for p in PERCENTILES])
    assert torch.equal(found, single.amin(0))


@pytest.mark.parametrize("bits", [6, 8])
def test_the_search_has_something_to_choose(bits: int) -> None:
    """A rare outlier is clipped and short tails are not, so returning any fixed candidate would fail above."""
    short, rare = draw(0, 20000, 1, "uniform"), torch.randn(10**6, 1, generator=torch.Generator().manual_seed(0))
    rare[0] = 9.0
    for x, clipped in ((short, False), (rare.double(), True)):
        whole = uniform_params(x.amin(0), x.amax(0), bits)
        found = search_columns(x, bits)
        assert bool(found.delta < 0.9 * whole.delta) is clipped


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [6, 8])
def test_a_histogram_finds_what_the_values_give(bits: int, shape: str) -> None:
    """4096 bins lose less than a tenth (0.4 dB) of squared error against searching the values themselves."""
    x = draw(9, 30000, 1, shape)
    exact = squared_error(x, search_columns(x, bits))
    params = search_histogram(*filled(x.T, torch.zeros(1, dtype=torch.int64), 1).table(), bits)
    assert squared_error(x, params) <= 1.1 * exact


@given(seed=SEEDS, bits=BITS, groups=st.integers(2, 6))
def test_with_the_global_range_among_the_candidates_no_group_loses(seed: int, bits: int, groups: int) -> None:
    """Invariant 14: a superset of solutions, group by group."""
    x = draw(seed, 500, groups)
    whole = search_columns(x.reshape(-1, 1), bits)
    everywhere = UniformParams(whole.delta.expand(groups), whole.zero_point.expand(groups), bits)
    own = search_columns(x, bits)
    best = _best([(squared_error(x, p), p) for p in (everywhere, own)])
    assert bool((squared_error(x, best) <= squared_error(x, everywhere)).all())
    assert bool((squared_error(x, best) <= squared_error(x, own)).all())


@given(seed=SEEDS, bits=BITS)
def test_groups_of_different_scale_gain_by_parameters_of_their_own(seed: int, bits: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 4000, generator=g, dtype=torch.float64) * torch.tensor([[0.1], [1.0], [10.0]])
    own = search_histogram(*filled(x, torch.arange(3), 3).table(), bits)
    whole = search_histogram(*filled(x, torch.zeros(3, dtype=torch.int64), 1).table(), bits)
    columns = squared_error(x.T, own)
    shared = squared_error(x.T, whole)
    assert columns.sum() < shared.sum()
    assert columns[0] < shared[0] / 100
    assert columns[1] < shared[1] / 10


@pytest.mark.parametrize("value", [0.0, 3.0, -2.5, 1e-20, 1e20])
@pytest.mark.parametrize("bits", [6, 8])
def test_constant_columns(bits: int, value: float) -> None:
    """A constant is an end of the range that contains it and 0, so it is exact; all zeros get a step of 1."""
    x = torch.full((50, 1), value, dtype=torch.float64)
    for params in (search_columns(x, bits), search_histogram(*filled(x.T, torch.zeros(1).long(), 1).table(), bits)):
        assert 0 < params.delta.item() < float("inf")
        assert 0 <= params.zero_point.item() <= 2**bits - 1
        assert fake_quantize(x, params).flatten().tolist() == pytest.approx([value] * 50, rel=1e-6)
    if value == 0.0:
        assert search_columns(x, bits).delta.item() == 1.0


def test_a_single_row() -> None:
    params = search_columns(torch.tensor([[1.0, -4.0, 0.0]]), 8)
    assert fake_quantize(torch.tensor([[1.0, -4.0, 0.0]]), params).tolist() == [pytest.approx([1.0, -4.0, 0.0])]


def test_the_stored_step_is_the_searched_step() -> None:
    params = search_columns(draw(1, 300, 5), 8)
    assert torch.equal(params.delta, params.delta.float().double())


@given(seed=SEEDS, bits=BITS)
def test_windows_without_zero_are_not_extended(seed: int, bits: int) -> None:
    x = 100 + torch.rand(500, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    window = search_columns(x, bits, contain_zero=False)
    assert bool((window.delta * (2**bits - 1) <= 1.0 + 1e-6).all())
    assert bool((window.zero_point < 0).all())
    assert bool((search_columns(x, bits).delta * (2**bits - 1) >= 100).all())


# ------------------------------------------------------------------------------------------------------------- weights


@given(seed=SEEDS, bits=BITS, shape=st.sampled_from(SHAPES))
def test_weight_codes_are_symmetric_and_no_worse_than_the_full_range(seed: int, bits: int, shape: str) -> None:
    w = draw(seed, 30, 5, shape).T.float()
    codes, scale = symmetric_rows(w, bits)
    limit = 2 ** (bits - 1) - 1
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert int(codes.abs().max()) <= limit
    assert bool((scale > 0).all())
    full = (w.double().abs().amax(1) / limit).float().double()
    assert bool((scale.double() <= full).all())
    rounded = (w.double() / full[:, None]).round().clamp(-limit, limit) * full[:, None]
    error = (codes.double() * scale.double()[:, None] - w.double()).square().sum(1)
    assert bool((error <= (rounded - w.double()).square().sum(1) * (1 + 1e-12)).all())


def test_weight_codes_are_nearest_for_their_scale() -> None:
    w = draw(3, 40, 6).T.float()
    codes, scale = symmetric_rows(w, 6)
    again = (w.double() / scale.double()[:, None]).round().clamp(-31, 31)
    assert torch.equal(codes.double(), again)


def test_importance_moves_the_clip() -> None:
    """An outlier that hardly matters is clipped in favour of the rest; one that matters is kept."""
    w = torch.linspace(-0.5, 0.5, 63)[None].repeat(1, 1)
    w[0, 0] = 1.0
    heavy, light = torch.ones(63), torch.ones(63)
    heavy[0], light[0] = 1e4, 1e-4
    _, kept = symmetric_rows(w, 6, heavy)
    _, clipped = symmetric_rows(w, 6, light)
    assert kept.item() == pytest.approx(1 / 31, rel=0.05)
    assert clipped.item() < 0.7 * kept.item()


def test_zero_and_single_weights() -> None:
    codes, scale = symmetric_rows(torch.tensor([[0.0], [3.0], [-1e-12]]), 8)
    assert codes.flatten().tolist() == [0, 127, -127]
    assert bool((torch.isfinite(scale) & (scale > 0)).all())
    assert scale[1].item() * 127 == pytest.approx(3.0, rel=1e-6)
