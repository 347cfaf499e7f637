"""Scores of trained models against the dataset, shared by the packaging and the tuning of the sampling settings."""

from __future__ import annotations

import torch
from torch import Tensor

from ptq4arvg.models.rar import RAR
from ptq4arvg.scoring import Scorer

__all__ = ["sample", "score_generator"]

CHUNK = 500


def sample(model: RAR, images: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens and classes of ``images`` pictures, classes in turn, drawn in chunks with consecutive seeds."""
    classes = torch.arange(images) % model.config.classes
    tokens = [model.generate(part, seed + i) for i, part in enumerate(classes.split(CHUNK))]
    return torch.cat(tokens), classes


def score_generator(model: RAR, scorer: Scorer, images: int, seed: int) -> tuple[float, float]:
    """Class agreement and Fréchet distance of ``images`` sampled pictures."""
    seen = scorer.observe(*sample(model, images, seed))
    return seen.class_accuracy, scorer.frechet(seen)
