"""Histograms and row samples: pooled, not averaged (invariant 29)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ptq4arvg.calibration.observers import Histogram, RowSample
from ptq4arvg.errors import CalibrationError

SEEDS = st.integers(0, 2**20)


def batches(seed: int, sizes: list[int], width: int = 7, groups: int = 3) -> list[tuple[Tensor, Tensor]]:
    """The same values and groups, cut as ``sizes`` says."""
    g = torch.Generator().manual_seed(seed)
    total = sum(sizes)
    x = torch.randn(total, width, generator=g) * torch.exp(torch.randn(total, 1, generator=g))
    group = torch.randint(groups, (total,), generator=g)
    group[:groups] = torch.arange(groups)
    return list(zip(x.split(sizes), group.split(sizes), strict=True))


def histogram(parts: list[tuple[Tensor, Tensor]], groups: int = 3) -> Histogram:
    result = Histogram(groups, "layer")
    for x, group in parts:
        result.see_range(x, group)
    for x, group in parts:
        result.see_values(x, group)
    return result


@given(seed=SEEDS, cut=st.integers(1, 39))
def test_histograms_do_not_depend_on_the_batch_split(seed: int, cut: int) -> None:
    whole = histogram(batches(seed, [40])).table()
    for sizes in ([cut, 40 - cut], [1] * 40):
        parts = histogram(batches(seed, sizes)).table()
        assert torch.equal(whole[0], parts[0])
        assert torch.equal(whole[1], parts[1])


def test_order_of_the_data_does_not_matter() -> None:
    parts = batches(3, [10, 10, 20])
    first, second = histogram(parts).table(), histogram(parts[::-1]).table()
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@given(seed=SEEDS)
def test_every_value_is_counted_in_its_bin(seed: int) -> None:
    ((x, group),) = batches(seed, [40])
    centres, counts = histogram([(x, group)]).table()
    for g in range(3):
        values = x[group == g].double().flatten()
        assert counts[g].sum() == values.numel()
        half = (centres[g, 1] - centres[g, 0]) / 2
        assert centres[g, 0] - half == pytest.approx(values.min().item(), rel=1e-9)
        assert centres[g, -1] + half == pytest.approx(values.max().item(), rel=1e-9)
        # The k-th smallest value lies within half a bin of the k-th smallest counted centre.
        counted = centres[g].repeat_interleave(counts[g].long())
        assert (counted - values.sort().values).abs().max() <= half * (1 + 1e-6)


@given(seed=SEEDS)
def test_counts_are_repetitions(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    ((x, group),) = batches(seed, [12])
    repeats = torch.randint(1, 9, (12,), generator=g)
    weighted = Histogram(3, "layer")
    weighted.see_range(x, group)
    weighted.see_values(x, group, repeats)
    repeated = histogram([(x.repeat_interleave(repeats, 0), group.repeat_interleave(repeats))])
    assert torch.equal(weighted.table()[0], repeated.table()[0])
    assert torch.equal(weighted.table()[1], repeated.table()[1])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_named(bad: float) -> None:
    x = torch.randn(4, 3)
    x[2, 1] = bad
    with pytest.raises(CalibrationError, match=rf"blocks\.7\.fc1.*{bad}"):
        Histogram(1, "blocks.7.fc1").see_range(x, torch.zeros(4, dtype=torch.int64))


def test_a_constant_group_keeps_its_value() -> None:
    centres, counts = histogram([(torch.full((6, 7), 2.5), torch.arange(6) % 3)]).table()
    assert torch.equal(centres, torch.full_like(centres, 2.5))
    assert counts.sum() == 42


def test_groups_without_values_are_named() -> None:
    partial = histogram([(torch.randn(4, 7), torch.tensor([0, 2, 0, 2]))], groups=4)
    with pytest.raises(CalibrationError, match=r"layer: no calibration value seen for groups \[1, 3\]"):
        partial.table()
    with pytest.raises(CalibrationError, match="layer: no calibration value"):
        Histogram(2, "layer").table()


# ------------------------------------------------------------------------------------------------------------- samples


def numbered(sequences: int, length: int) -> tuple[Tensor, Tensor]:
    """Rows ``[n·T, 2]`` that hold (sequence, position), and their positions."""
    s, p = torch.meshgrid(torch.arange(sequences), torch.arange(length), indexing="ij")
    return torch.stack([s.flatten(), p.flatten()], 1).float(), p.flatten()


def sample(sequences: int, keep: Tensor, limit: int, sizes: list[int]) -> tuple[Tensor, RowSample]:
    result = RowSample(sequences, keep, limit)
    values, positions = numbered(sequences, len(keep))
    rows = [size * len(keep) for size in sizes]
    for x, at in zip(values.split(rows), positions.split(rows), strict=True):
        result.see(x, at)
    return result.rows(), result


def without_sinks(length: int, sinks: int = 2) -> Tensor:
    keep = torch.ones(length, dtype=torch.bool)
    keep[:sinks] = False
    return keep


@given(
    sequences=st.integers(2, 40),
    length=st.integers(3, 30),
    limit=st.integers(1, 400),
    data=st.data(),
    sinks=st.integers(0, 2),
)
def test_samples_do_not_depend_on_the_batch_split(
    sequences: int, length: int, limit: int, data: st.DataObject, sinks: int
) -> None:
    keep = without_sinks(length, sinks)
    cut = data.draw(st.integers(1, sequences - 1))
    whole, _ = sample(sequences, keep, limit, [sequences])
    assert torch.equal(whole, sample(sequences, keep, limit, [cut, sequences - cut])[0])
    assert torch.equal(whole, sample(sequences, keep, limit, [1] * sequences)[0])
    assert bool(keep[whole[:, 1].long()].all())
    assert len(whole) >= 1
    assert len(whole.unique(dim=0)) == len(whole)


@given(sequences=st.integers(1, 40), length=st.integers(3, 30), limit=st.integers(1, 400))
def test_the_sample_is_about_as_large_as_asked(sequences: int, length: int, limit: int) -> None:
    keep = without_sinks(length)
    total = sequences * int(keep.sum())
    rows, state = sample(sequences, keep, limit, [sequences])
    assert len(rows) <= limit
    if total <= limit:
        assert len(rows) == total
    else:
        assert len(rows) == math.ceil(total / state.stride)


@pytest.mark.parametrize(
    ("sequences", "length", "limit"), [(16, 18, 64), (32, 17, 100), (128, 257, 4096), (64, 14, 96)]
)
def test_all_positions_are_visited(sequences: int, length: int, limit: int) -> None:
    """12, 15, 255 positions and strides that would share a factor with them."""
    keep = without_sinks(length)
    rows, state = sample(sequences, keep, limit, [sequences])
    assert state.stride > 1
    assert sorted(rows[:, 1].unique().tolist()) == list(range(2, length))
    # … and about equally often.
    _, often = rows[:, 1].unique(return_counts=True)
    assert often.max() - often.min() <= 1


def test_a_sample_is_a_copy() -> None:
    """Hooks hand over activations that later layers may overwrite."""
    keep = without_sinks(3, 0)
    state = RowSample(1, keep, 10)
    x = torch.ones(3, 2)
    state.see(x, torch.arange(3))
    x.zero_()
    assert torch.equal(state.rows(), torch.ones(3, 2))
