"""What the bundled model must reach, at sizes that take minutes: run by ``make check-full``."""

from __future__ import annotations

import pytest
import torch

from ptq4arvg.evaluation import Experiment, Settings, row_specs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["bundled", "stress"])
def experiment(request: pytest.FixtureRequest) -> Experiment:
    return Experiment(request.param, Settings(images=2000))


def test_floating_point_draws_the_class_asked_for(experiment: Experiment) -> None:
    row = experiment.run(row_specs(["FP"])[0]).row
    assert row.class_accuracy >= 0.90
    assert row.frechet < 0.8


@pytest.mark.parametrize(("name", "sqnr", "distance"), [("W8A8", 33.0, 0.8), ("W6A8", 29.0, 0.8), ("W6A6", 22.5, 0.85)])
def test_integer_generators_keep_quality_on_both_variants(
    experiment: Experiment, name: str, sqnr: float, distance: float
) -> None:
    """The same bounds for both variants: outliers cost nothing."""
    row = experiment.run(row_specs([name])[0]).row
    assert row.logit_sqnr_db is not None
    assert row.logit_sqnr_db > sqnr
    assert row.class_accuracy >= 0.90
    assert row.frechet < distance


def test_published_sizes_quantize_and_decode() -> None:
    """Two blocks of rar_b's width, random weights: pack, full pass equals cached decode bit for bit."""
    import dataclasses

    from ptq4arvg import quantize
    from ptq4arvg.models.rar import CONFIGS, RAR

    model = RAR(dataclasses.replace(CONFIGS["rar_b"], depth=2))
    generator = torch.Generator().manual_seed(0)
    model.initialize(generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adaLN" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    recorded = model.eval().calibration_set(
        torch.randint(1024, (4, 256), generator=generator), torch.tensor([1, 5, 999, 3])
    )
    quantized = quantize(model, "w6a6", recorded, samples=8, batch=4)
    tokens, classes = torch.randint(1024, (2, 256), generator=generator), torch.tensor([7, 1000])
    full = quantized(tokens, classes)
    caches = quantized.new_caches(2)
    for step in (0, 1, 2, 3):
        start = step + 1 if step else 0
        logits = quantized.step(classes, tokens[:, :step], quantized.window(start, step + 2 - start), caches)
        assert torch.equal(logits[:, -1], full[:, step])
