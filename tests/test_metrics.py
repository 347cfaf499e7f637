"""Metrics against closed forms, second computations and the properties they must have."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ptq4arvg.metrics import (
    Frechet,
    bootstrap,
    evaluate_teacher_forced,
    frechet_interval,
    kl_nats,
    logit_sqnr_db,
    mean_interval,
    top1_agreement,
)
from ptq4arvg.models.rar import RAR, RARConfig

TINY = RARConfig(
    dim=16,
    depth=1,
    heads=2,
    mlp_dim=32,
    codebook=12,
    classes=3,
    grid=2,
    pos_rows=6,
    time_rows=6,
    guidance=4.0,
    power=1.0,
)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("relative", [1e-1, 1e-3])
def test_sqnr_of_noise_of_known_power(relative: float) -> None:
    logits = seeded(200, 512)
    noisy = logits + relative * seeded(200, 512, seed=1)
    assert logit_sqnr_db(logits, noisy) == pytest.approx(-20 * math.log10(relative), abs=0.1)


@given(st.floats(-100, 100))
def test_sqnr_ignores_what_the_softmax_ignores(constant: float) -> None:
    logits, noise = seeded(20, 64), 0.05 * seeded(20, 64, seed=1)
    moved = logits + noise + constant * seeded(20, 1, seed=2)
    assert logit_sqnr_db(logits, moved) == pytest.approx(logit_sqnr_db(logits, logits + noise), abs=0.01)


def test_equal_logits_have_infinite_sqnr_no_divergence_and_full_agreement() -> None:
    logits = seeded(5, 9)
    assert logit_sqnr_db(logits, logits) == math.inf
    assert kl_nats(logits, logits) == 0
    assert top1_agreement(logits, logits) == 1


def test_kl_against_the_definition_and_its_direction() -> None:
    ref, test = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()
    assert kl_nats(ref, test) == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), rel=1e-6)
    assert kl_nats(test, ref) == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(5), rel=1e-6)


def test_top1_counts_rows() -> None:
    ref = torch.tensor([[0.0, 1.0], [2.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
    test = torch.tensor([[0.0, 9.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.9]])
    assert top1_agreement(ref, test) == 0.75


@pytest.mark.parametrize("metric", [logit_sqnr_db, kl_nats, top1_agreement])
def test_logits_that_cannot_be_compared_are_refused(metric) -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 4\)"):
        metric(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="no logits"):
        metric(torch.zeros(0, 3), torch.zeros(0, 3))


@pytest.fixture(scope="module")
def models() -> tuple[RAR, RAR]:
    generator = torch.Generator().manual_seed(3)
    fp, other = RAR(TINY).eval(), RAR(TINY).eval()
    with torch.no_grad():
        for name, parameter in fp.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.ndim > 1 else 0.5))
            noise = 0.02 * torch.randn(parameter.shape, generator=generator)
            other.get_parameter(name).copy_(parameter + noise)
    return fp, other


def test_teacher_forced_figures_follow_their_definitions(models: tuple[RAR, RAR]) -> None:
    fp, other = models
    classes = torch.arange(8) % 3
    tokens = fp.generate(classes, seed=1)
    found = evaluate_teacher_forced(fp, other, tokens, classes, batch=3)
    none = torch.full_like(classes, 3)
    with torch.inference_mode():
        ref_c, ref_u, test_c, test_u = (
            fp(tokens, classes),
            fp(tokens, none),
            other(tokens, classes),
            other(tokens, none),
        )
    assert found.logit_sqnr_db == pytest.approx(logit_sqnr_db(torch.cat([ref_c, ref_u]), torch.cat([test_c, test_u])))
    # The weight of each step, written out: it grows from 1 at the first token towards the guidance of 4.
    weight = torch.tensor([3 * 0.5 * (1 - math.cos(math.pi * step / 4)) + 1 for step in range(4)])[:, None]
    assert weight[0] == 1
    ref, test = ref_u + weight * (ref_c - ref_u), test_u + weight * (test_c - test_u)
    assert found.kl_nats == pytest.approx(kl_nats(ref, test), rel=1e-4)
    assert found.kl_nats != pytest.approx(kl_nats(ref_c, test_c), rel=1e-2)
    assert found.top1_agreement == pytest.approx(top1_agreement(ref, test))


def test_teacher_forced_figures_do_not_depend_on_the_batch(models: tuple[RAR, RAR]) -> None:
    fp, other = models
    classes = torch.arange(7) % 3
    tokens = fp.generate(classes, seed=1)
    seen: list[float] = []
    one = evaluate_teacher_forced(fp, other, tokens, classes, batch=7)
    many = evaluate_teacher_forced(fp, other, tokens, classes, batch=2, progress=seen.append)
    assert many.logit_sqnr_db == pytest.approx(one.logit_sqnr_db, abs=1e-3)
    assert many.kl_nats == pytest.approx(one.kl_nats, rel=1e-3)
    assert many.top1_agreement == pytest.approx(one.top1_agreement)
    assert seen == sorted(seen)
    assert seen[-1] == 1


def test_teacher_forcing_needs_sequences(models: tuple[RAR, RAR]) -> None:
    empty = torch.zeros(0, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="no held-out sequences"):
        evaluate_teacher_forced(*models, empty, torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match="2 token sequences but 3 classes"):
        evaluate_teacher_forced(*models, torch.zeros(2, 4, dtype=torch.long), torch.zeros(3, dtype=torch.long))


def mixed(rows: int, features: int, seed: int) -> Tensor:
    """Correlated features with means off zero."""
    return seeded(rows, features, seed=seed) @ seeded(features, features, seed=seed + 100) + seeded(
        features, seed=seed + 200
    )


@given(st.integers(0, 50))
def test_frechet_distance_equals_the_general_matrix_root(seed: int) -> None:
    a, b = Frechet.of(mixed(200, 6, seed)), Frechet.of(mixed(300, 6, seed + 1))
    root = scipy.linalg.sqrtm((a.covariance @ b.covariance).numpy())
    trace = np.trace(a.covariance.numpy()) + np.trace(b.covariance.numpy()) - 2 * np.trace(root).real
    assert a.distance(b) == pytest.approx(float((a.mean - b.mean).square().sum()) + trace, rel=1e-6)
    assert a.distance(b) == pytest.approx(b.distance(a), rel=1e-9)


def test_frechet_distance_of_a_shift_is_its_square() -> None:
    features = mixed(500, 5, 0)
    moved = features + torch.tensor([1.0, -2.0, 0.0, 0.0, 0.5])
    assert Frechet.of(features).distance(Frechet.of(moved)) == pytest.approx(5.25, rel=1e-5)


def test_frechet_distance_survives_dead_and_duplicate_features() -> None:
    features = mixed(100, 4, 0)
    features = torch.cat([features, features, torch.zeros(100, 3)], 1)
    a, b = Frechet.of(features), Frechet.of(features[:50])
    assert a.distance(a) == pytest.approx(0, abs=1e-6)
    assert math.isfinite(a.distance(b))
    assert a.distance(b) > 0


def test_frechet_statistics_refuse_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match=r"\[n ≥ 2, F\]"):
        Frechet.of(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="1 of 8 feature values are NaN"):
        Frechet.of(torch.tensor([[0.0] * 4, [math.nan, 1, 2, 3]]))
    with pytest.raises(ValueError, match="4 and of 3 features"):
        Frechet.of(seeded(9, 4)).distance(Frechet.of(seeded(9, 3)))


def test_bootstrap_interval_of_a_mean_has_the_width_theory_says() -> None:
    correct = torch.arange(1000) % 10 != 0
    found = mean_interval(correct)
    half = 1.96 * math.sqrt(0.9 * 0.1 / 1000)
    assert found.value == pytest.approx(0.9)
    assert found.low == pytest.approx(0.9 - half, abs=0.003)
    assert found.high == pytest.approx(0.9 + half, abs=0.003)
    assert mean_interval(correct) == found
    assert mean_interval(correct, seed=1) != found


def test_frechet_interval_covers_the_figure_and_repeated_draws() -> None:
    """Without the correction of its bias the interval of a small distance would lie above the figure itself."""
    reference = Frechet.of(seeded(20_000, 8, seed=9))
    found = frechet_interval(seeded(300, 8, seed=1), reference, replicas=200)
    assert found.low < found.value < found.high
    again = [reference.distance(Frechet.of(seeded(300, 8, seed=seed))) for seed in range(20, 60)]
    covered = sum(found.low <= value <= found.high for value in again)
    assert covered >= 30


@pytest.mark.parametrize(
    ("rows", "replicas", "level", "message"), [(1, 9, 0.9, "2 rows"), (9, 1, 0.9, "2 replicas"), (9, 9, 1.0, "level")]
)
def test_bootstrap_refuses_what_makes_no_sense(rows: int, replicas: int, level: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap(lambda index: 0.0, rows, replicas, level)
