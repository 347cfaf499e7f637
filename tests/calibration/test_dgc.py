"""Distribution-guided choice of sequences, and the published criterion's degeneracy (method.md §1.7, invariants 27,
28)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ptq4arvg.calibration.dgc import d_optimal, features, mahalanobis, principal_axes, select, select_published
from ptq4arvg.errors import CalibrationError
from ptq4arvg.models.rar import RAR
from ptq4arvg.pipeline import _alternating, collect_calibration, quantize
from ptq4arvg.protocol import CalibrationSet
from tests.tiny import tiny_calibration, tiny_rar

SEEDS = st.integers(0, 2**20)


@pytest.fixture(scope="module")
def model() -> RAR:
    return tiny_rar(0)


def points(seed: int, n: int, d: int) -> Tensor:
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x - x.mean(0)


# ---------------------------------------------------------------------------------------------------- published
# criterion


@pytest.mark.parametrize("kind", ["gauss", "heavy", "clustered", "outlying"])
@pytest.mark.parametrize(("n", "d"), [(8, 8), (16, 40), (32, 33)])
def test_with_no_more_rows_than_dimensions_all_distances_are_equal(kind: str, n: int, d: int) -> None:
    """(n − 1)/√n whatever the data: the published ranking carries no information."""
    x = points(n + d, n, d)
    if kind == "heavy":
        x = x**3
    elif kind == "clustered":
        x[: n // 2] += 5
    elif kind == "outlying":
        x[0] *= 100
    expected = torch.full((n,), (n - 1) / math.sqrt(n), dtype=torch.float64)
    assert torch.allclose(mahalanobis(x), expected, rtol=1e-6)


def test_repeated_rows_are_closer() -> None:
    """A row that occurs m times lies at √((n − 1)(1/m − 1/n))."""
    x = points(0, 12, 30)
    x[1] = x[0]
    distance = mahalanobis(x)
    assert distance[0].item() == pytest.approx(math.sqrt(11 * (1 / 2 - 1 / 12)), rel=1e-6)
    assert distance[2].item() == pytest.approx(math.sqrt(11 * (1 - 1 / 12)), rel=1e-6)


@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_rows_that_are_equal_but_for_rounding_are_at_no_distance(noise: float) -> None:
    """In single precision such rows get distances of rounding, or NaN, and would outrank rows that do differ."""
    x = torch.randn(32, generator=torch.Generator().manual_seed(0)).repeat(12, 1)
    x = x + noise * torch.randn(12, 32, generator=torch.Generator().manual_seed(1))
    distance = mahalanobis(x.float())
    assert bool(torch.isfinite(distance).all())
    assert distance.max() < 1e-3


def test_with_many_rows_it_is_the_textbook_distance() -> None:
    x = points(1, 400, 3)
    covariance = torch.cov(x.T)
    expected = (x @ torch.linalg.inv(covariance) * x).sum(1).sqrt()
    assert torch.allclose(mahalanobis(x), expected, rtol=1e-9)
    assert mahalanobis(x).std() > 0.1


def test_the_published_choice_on_a_causal_model_is_all_conditional(model: RAR) -> None:
    """Token 0 depends on the class only, so the unconditional branch has no spread at all; the rows are the first
    ones."""
    sequences = tiny_calibration(model, 12)
    chosen = select_published(model, sequences, 8)
    assert chosen.rows.tolist() == list(range(8))
    assert (chosen.conditional, chosen.unconditional) == (8, 0)
    assert chosen.method == "published"
    assert chosen.report()["gains"] is None


def test_the_published_choice_keeps_as_many_as_asked(model: RAR) -> None:
    """Also where the preferred branch is too short."""
    sequences = tiny_calibration(model, 8).select(torch.tensor([0, 1, 2, 8, 9, 10, 11, 12, 13]))
    chosen = select_published(model, sequences, 7)
    assert len(chosen.rows.unique()) == len(chosen.rows) == 7
    assert (chosen.conditional, chosen.unconditional) == (3, 4)


# ------------------------------------------------------------------------------------------------------------ D-optimal


@given(seed=SEEDS, n=st.integers(2, 40), d=st.integers(1, 16), data=st.data())
def test_greedy_gains_fall_and_are_those_of_the_determinant(seed: int, n: int, d: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, n))
    x, ridge = points(seed, n, d), 1e-3
    rows, gains = d_optimal(x, count, ridge)
    assert len(rows) == len(gains) == count
    assert len(set(rows.tolist())) == count
    assert bool((gains[1:] <= gains[:-1] + 1e-9).all())
    taken = x[rows]
    matrix = ridge * torch.eye(d, dtype=torch.float64) + taken.T @ taken
    volume = torch.logdet(matrix) - d * math.log(ridge)
    assert float(gains.sum()) == pytest.approx(float(volume), rel=1e-6, abs=1e-6)


@given(seed=SEEDS)
def test_every_step_takes_the_best_row_that_is_left(seed: int) -> None:
    """Against log-determinants computed from scratch."""
    x, ridge = points(seed, 10, 4), 1e-3
    rows, _ = d_optimal(x, 4, ridge)
    matrix, left = ridge * torch.eye(4, dtype=torch.float64), list(range(10))
    for row in rows.tolist():
        volume = {i: float(torch.logdet(matrix + torch.outer(x[i], x[i]))) for i in left}
        assert volume[row] >= max(volume.values()) - 1e-9
        left.remove(row)
        matrix = matrix + torch.outer(x[row], x[row])


@given(seed=SEEDS, n=st.integers(4, 40))
def test_the_order_of_rows_does_not_matter(seed: int, n: int) -> None:
    x = points(seed, n, 5)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    straight, permuted = d_optimal(x, n // 2)[0], d_optimal(x[order], n // 2)[0]
    assert order[permuted].tolist() == straight.tolist()


def test_equal_gains_go_to_the_lower_index() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert d_optimal(x, 4)[0].tolist() == [0, 1, 2, 3]


@given(seed=SEEDS)
def test_a_novel_cluster_is_sampled_before_more_of_the_same(seed: int) -> None:
    """60 rows along one direction and 2 along another: a novel one is among the first two, both among the first six."""
    x = torch.zeros(62, 2, dtype=torch.float64)
    noise = torch.randn(62, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[:60, 0], x[60:, 1] = 3.0, 3.0
    rows, _ = d_optimal(x + 0.01 * noise, 6)
    assert {60, 61} & set(rows[:2].tolist())
    assert {60, 61} <= set(rows.tolist())


def test_axes_are_standardised_ordered_and_few() -> None:
    raw = points(0, 30, 50) * torch.logspace(-6, 6, 50, dtype=torch.float64)
    axes = principal_axes(raw)
    assert axes.shape == (30, 16)
    deviation = axes.std(0, unbiased=False)
    assert deviation[0].item() == pytest.approx(1.0, rel=1e-9)
    assert bool((deviation[1:] <= deviation[:-1] + 1e-12).all())
    assert axes.mean(0).abs().max() < 1e-9
    # Units do not matter.
    scaled = principal_axes(raw * torch.logspace(3, -3, 50, dtype=torch.float64) + 7)
    assert torch.allclose(scaled @ scaled.T, axes @ axes.T, atol=1e-6)


def test_constant_descriptions() -> None:
    raw = torch.ones(5, 4, dtype=torch.float64)
    assert principal_axes(raw).abs().max() == 0
    assert d_optimal(principal_axes(raw), 3)[0].tolist() == [0, 1, 2]
    raw[:, 2] = torch.arange(5)
    assert principal_axes(raw).shape == (5, 1)


# --------------------------------------------------------------------------------------------------------- on a model


def test_the_choice_is_unique_deterministic_and_reported(model: RAR) -> None:
    sequences = tiny_calibration(model, 12)
    chosen = select(model, sequences, 9)
    assert len(chosen.rows.unique()) == len(chosen.rows) == 9
    assert torch.equal(chosen.rows, select(model, sequences, 9).rows)
    assert chosen.conditional == int((chosen.rows < 12).sum())
    assert chosen.conditional + chosen.unconditional == 9
    assert chosen.candidates == 24
    report = chosen.report()
    assert report["rows"] == chosen.rows.tolist()
    assert report["method"] == "d_optimal"
    assert (report["conditional"], report["unconditional"]) == (chosen.conditional, chosen.unconditional)
    assert report["gains"] == sorted(report["gains"], reverse=True)
    assert min(report["gains"]) >= 0


@pytest.mark.parametrize("seed", range(3))
def test_the_choice_is_invariant_to_the_order_and_the_batches(model: RAR, seed: int) -> None:
    """The same set of sequences, by content."""
    sequences = tiny_calibration(model, 12)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
    expected = select(model, sequences, 9).rows.sort().values
    assert torch.equal(order[select(model, sequences.select(order), 9).rows].sort().values, expected)
    assert torch.equal(select(model, sequences, 9, batch=5).rows.sort().values, expected)


def test_both_branches_share_one_space(model: RAR) -> None:
    """Joint statistics: conditional and unconditional candidates are described together."""
    described = features(model, tiny_calibration(model, 12))
    assert described.shape == (24, 16)
    assert described.mean(0).abs().max() < 1e-9


def test_novel_sequences_are_preferred(model: RAR) -> None:
    """Twenty near-copies (one token differs) and three sequences of other tokens and classes."""
    tokens = torch.zeros(23, model.config.tokens, dtype=torch.int64)
    tokens[torch.arange(20), torch.arange(20) % model.config.tokens] = 1
    tokens[20:] = torch.randint(2, 16, (3, model.config.tokens), generator=torch.Generator().manual_seed(0))
    classes = torch.zeros(23, dtype=torch.int64)
    classes[20:] = torch.tensor([2, 3, 4])
    sequences = CalibrationSet({"tokens": tokens, "classes": classes}, torch.ones(23, dtype=torch.bool))
    assert {20, 21, 22} <= set(select(model, sequences, 6).rows.tolist())
    assert select(model, sequences, 1).rows.item() >= 20


def test_keeping_all_needs_no_ranking(model: RAR) -> None:
    chosen = select(model, tiny_calibration(model, 3), 6)
    assert chosen.rows.tolist() == list(range(6))
    assert chosen.method == "all"
    assert chosen.gains is None


def test_without_ranking_branches_alternate() -> None:
    conditional = torch.tensor([True, True, True, False, False])
    sequences = CalibrationSet({}, conditional)
    assert _alternating(sequences, 4).tolist() == [0, 3, 1, 4]


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("choose", [select, select_published])
def test_counts_that_cannot_be(model: RAR, choose: object) -> None:
    sequences = tiny_calibration(model, 3)
    with pytest.raises(CalibrationError, match="cannot keep 7 of 6 calibration sequences; record more"):
        choose(model, sequences, 7)
    for count in (0, -2):
        with pytest.raises(CalibrationError, match=f"at least one sequence, got {count}"):
            choose(model, sequences, count)


@pytest.mark.parametrize("count", [0, -3])
def test_zero_samples(model: RAR, count: int) -> None:
    with pytest.raises(CalibrationError, match=f"at least one sample, got {count}"):
        collect_calibration(model, count)
    with pytest.raises(CalibrationError, match=f"got samples={count}"):
        quantize(model, calibration=tiny_calibration(model, 2), samples=count)


def test_an_empty_set(model: RAR) -> None:
    with pytest.raises(CalibrationError, match="holds no sequences"):
        quantize(model, calibration=tiny_calibration(model, 2).select(slice(0, 0)))


@pytest.mark.parametrize("choose", [select, select_published])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_damaged_model(choose: object, bad: float) -> None:
    model = tiny_rar(1)
    with torch.no_grad():
        model.blocks[0].mlp.fc2.bias[3] = bad
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        choose(model, tiny_calibration(model, 3), 2)
