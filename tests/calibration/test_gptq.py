"""Weight rounding with error compensation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptq4arvg.calibration.gptq import compensated_rows
from ptq4arvg.calibration.quantizers import symmetric_rows


def correlated(rows: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs whose channels share a few directions, and a weight."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(width // 4, width, generator=g)
    x = torch.randn(rows, width // 4, generator=g) @ mix + 0.1 * torch.randn(rows, width, generator=g)
    return x, torch.randn(24, width, generator=g)


def output_error(x: Tensor, weight: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Squared output error of every row, float64 ``[N]``."""
    difference = codes.double() * scale.double()[:, None] - weight.double()
    return (x.double() @ difference.T).square().sum(0)


@pytest.mark.parametrize("bits", [6, 8])
@pytest.mark.parametrize("seed", range(3))
def test_correlated_inputs_gain_much(bits: int, seed: int) -> None:
    x, weight = correlated(600, 96, seed)
    nearest = output_error(x, weight, *symmetric_rows(weight, bits))
    compensated = output_error(x, weight, *compensated_rows(weight, bits, x))
    assert float(compensated.sum()) < 0.5 * float(nearest.sum())


@pytest.mark.parametrize("seed", range(5))
def test_no_row_is_worse_than_nearest_on_its_inputs(seed: int) -> None:
    x, weight = correlated(40, 64, seed)  # fewer rows than columns: a singular Hessian
    codes, scale = compensated_rows(weight, 6, x)
    nearest, same_scale = symmetric_rows(weight, 6, x.double().square().mean(0))
    assert torch.equal(scale, same_scale)
    before, after = output_error(x, weight, nearest, scale), output_error(x, weight, codes, scale)
    assert bool((after <= before * (1 + 1e-9)).all())


def test_codes_stay_on_the_symmetric_grid() -> None:
    x, weight = correlated(300, 70, 0)  # a width that is no multiple of the block
    weight[:, 3] *= 50
    for bits in (6, 8):
        codes, scale = compensated_rows(weight, bits, x)
        assert codes.dtype == torch.int8
        assert codes.shape == weight.shape
        assert int(codes.abs().max()) <= 2 ** (bits - 1) - 1
        assert bool((scale > 0).all())


def test_uncorrelated_inputs_of_equal_power_give_nearest_rounding_back() -> None:
    """A diagonal Hessian leaves nothing to compensate."""
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    codes, _ = compensated_rows(weight, 8, torch.eye(32) * 32**0.5)
    assert torch.equal(codes, symmetric_rows(weight, 8)[0])


def test_zero_inputs_and_dead_channels() -> None:
    x, weight = correlated(200, 32, 1)
    codes, scale = compensated_rows(weight, 6, torch.zeros_like(x))
    assert torch.equal(codes, symmetric_rows(weight, 6, torch.zeros(32))[0])
    x[:, 5] = 0
    codes, scale = compensated_rows(weight, 6, x)
    assert bool(torch.isfinite(codes.double() * scale[:, None]).all())
    assert float(output_error(x, weight, codes, scale).sum()) < float(
        output_error(x, weight, *symmetric_rows(weight, 6)).sum()
    )
