"""The trained models in the box keep what they promise; nothing here needs the dataset."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from ptq4arvg.errors import CheckpointError
from ptq4arvg.models import bundled
from ptq4arvg.models.bundled import ASSETS, CLASS_NAMES, FASHION, VARIANTS, load_bundled, load_reference, load_scorer

IMAGES = 500


@pytest.fixture(scope="module")
def classes() -> Tensor:
    return torch.arange(IMAGES) % FASHION.classes


@pytest.fixture(scope="module")
def tokens(classes: Tensor) -> Tensor:
    return load_bundled().generate(classes, seed=77)


def test_assets_are_small_and_fp16() -> None:
    assert sum(path.stat().st_size for path in ASSETS.iterdir()) <= 6_000_000
    for name in ("generator", "tokenizer", "classifier"):
        with safe_open(ASSETS / f"{name}.safetensors", "pt") as file:
            dtypes = {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118  (safe_open is no mapping)
        assert dtypes <= {torch.float16, torch.int64}, name


def test_size_of_the_generator_is_what_was_asked_for() -> None:
    assert FASHION.dim >= 128
    assert FASHION.dim % 64 == 0
    assert FASHION.depth >= 6
    assert FASHION.tokens == 49
    assert len(CLASS_NAMES) == FASHION.classes


def test_models_are_fp32_frozen_and_in_eval_mode() -> None:
    scorer = load_scorer()
    for module in (load_bundled(), load_bundled("stress"), scorer.tokenizer, scorer.classifier):
        assert not module.training
        assert all(p.dtype == torch.float32 and not p.requires_grad for p in module.parameters())


def test_the_generator_draws_what_was_asked_for(tokens: Tensor, classes: Tensor) -> None:
    scorer = load_scorer()
    seen = scorer.observe(tokens, classes)
    assert seen.class_accuracy >= 0.90
    # Few pictures have a larger distance than many (about 1.2 at 500 against 0.6 at 2,000): a gate against broken
    # sampling.
    assert scorer.frechet(seen) < 1.6
    mixed_up = scorer.observe(tokens, classes.roll(1))
    assert mixed_up.class_accuracy < 0.2


def test_every_class_is_drawn_with_variety(tokens: Tensor, classes: Tensor) -> None:
    for c in range(FASHION.classes):
        mine = tokens[classes == c]
        assert len(mine.unique(dim=0)) == len(mine)


def test_packaged_figures_keep_the_promises() -> None:
    figures = load_reference().figures
    assert figures["classifier_test_accuracy"] >= 0.90
    assert figures["generator_class_accuracy"] >= 0.90
    assert figures["generator_images"] >= 2000
    assert 0 < figures["generator_frechet"] < 2
    assert 0 < figures["reconstruction_frechet"] < 2


def test_reference_statistics_are_a_covariance() -> None:
    statistics = load_reference().statistics
    assert statistics.mean.dtype == torch.float64
    torch.testing.assert_close(statistics.covariance, statistics.covariance.T)
    assert torch.linalg.eigvalsh(statistics.covariance).min() > -1e-9
    assert statistics.distance(statistics) == pytest.approx(0, abs=1e-9)


def test_the_stress_variant_draws_the_same_pictures(tokens: Tensor, classes: Tensor) -> None:
    again = load_bundled("stress").generate(classes, seed=77)
    # Logits differ by 1e-5 or so, which decides a draw once in some ten thousand.
    assert (again == tokens).all(1).double().mean() >= 0.99


def test_loading_twice_gives_the_same_stress_variant() -> None:
    first, second = load_bundled("stress").state_dict(), load_bundled("stress").state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'strss'.*bundled, stress"):
        load_bundled("strss")
    assert VARIANTS == ("bundled", "stress")


def test_a_missing_or_damaged_asset_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bundled, "ASSETS", tmp_path)
    with pytest.raises(CheckpointError, match=r"generator\.safetensors"):
        load_bundled()
    (tmp_path / "generator.safetensors").write_bytes((ASSETS / "generator.safetensors").read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match=r"generator\.safetensors"):
        load_bundled()
