"""Tiny generators with random weights, for tests of calibration, models and pipeline."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ptq4arvg.models.rar import RAR, RARConfig
from ptq4arvg.protocol import CalibrationSet

__all__ = ["randomize", "tiny_calibration", "tiny_inputs", "tiny_rar"]


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Draw every parameter, in place, so that none is neutral.

    Matrices get a standard deviation of 1/√(fan in), vectors of 0.3, and the gains of norms lie around 1. Modulations
    are random too: those that start at zero, as for training, would hide a wrong fold.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)


def tiny_rar(seed: int = 0, **overrides: Any) -> RAR:
    """A RAR in evaluation mode with random weights (:func:`randomize`), cheap enough to be quantized in a test.

    Args:
        seed: of the weights.
        overrides: fields of :class:`~ptq4arvg.models.rar.RARConfig`; by default D = 32, depth 2, 2 heads, MLP 48, 4×4
            tokens of 16 codes, 5 classes, guidance 2, and position tables that are just long enough.
    """
    sizes: dict[str, Any] = {"dim": 32, "depth": 2, "heads": 2, "mlp_dim": 48, "codebook": 16, "classes": 5, "grid": 4}
    sizes |= {"guidance": 2.0, **overrides}
    rows = sizes["grid"] ** 2 + 2
    model = RAR(RARConfig(**({"pos_rows": rows, "time_rows": rows} | sizes)))
    randomize(model, seed)
    return model.eval().requires_grad_(False)


def tiny_inputs(model: RAR, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random tokens int64 ``[count, grid²]`` and classes int64 ``[count]``, the unconditional one in turn."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.config.codebook, (count, model.config.tokens), generator=generator)
    return tokens, torch.arange(count) % (model.config.classes + 1)


def tiny_calibration(model: RAR, samples: int, seed: int = 0) -> CalibrationSet:
    """2·samples calibration sequences with random tokens: conditional rows first, then the same tokens unconditional.

    Sampling from the model would cost a decode per token and is not what calibration tests are about.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.config.codebook, (samples, model.config.tokens), generator=generator)
    classes = torch.randint(model.config.classes, (samples,), generator=generator)
    none = torch.full_like(classes, model.config.none_class)
    return CalibrationSet(
        inputs={"tokens": tokens.repeat(2, 1), "classes": torch.cat([classes, none])},
        conditional=torch.arange(2 * samples) < samples,
    )
