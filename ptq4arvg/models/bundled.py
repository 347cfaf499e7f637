"""The trained models in the box: a small RAR for Fashion-MNIST, its tokenizer, the scoring classifier and the reference
statistics.

Weights ship as fp16 and compute in fp32. The scripts in :mod:`ptq4arvg.training` made them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ptq4arvg.metrics import Frechet
from ptq4arvg.models.classifier import Classifier
from ptq4arvg.models.rar import RAR, RARConfig
from ptq4arvg.models.tokenizers.small_vq import SmallVQ
from ptq4arvg.scoring import Scorer
from ptq4arvg.state_dict import load_strict, read_state_dict

__all__ = [
    "ASSETS",
    "CLASS_NAMES",
    "FASHION",
    "VARIANTS",
    "Reference",
    "load_bundled",
    "load_classifier",
    "load_reference",
    "load_scorer",
    "load_tokenizer",
]

# Sampling settings: the best of the table that `python -m ptq4arvg.training.tune_guidance` prints.
FASHION = RARConfig(
    dim=128,
    depth=6,
    heads=2,
    mlp_dim=512,
    codebook=512,
    classes=10,
    grid=7,
    pos_rows=51,
    time_rows=51,
    temperature=0.9,
    guidance=3.5,
    power=0.5,
)

CLASS_NAMES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")

VARIANTS = ("bundled", "stress")
STRESS_SEED = 0

ASSETS = Path(__file__).resolve().parents[1] / "assets"

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Reference:
    """What the generated pictures are compared with.

    Attributes:
        statistics: of the classifier's features of the 10,000 test pictures.
        figures: facts measured when the assets were packaged: ``classifier_test_accuracy``, ``reconstruction_frechet``
            and ``reconstruction_class_accuracy`` (the tokenizer's own reconstructions of the test set),
            ``generator_class_accuracy``, ``generator_frechet`` and ``generator_images`` (floating point, bundled
            sampling settings).
    """

    statistics: Frechet
    figures: dict[str, Any]


def _load(module: Module, name: str) -> Module:
    path = ASSETS / f"{name}.safetensors"
    load_strict(module, read_state_dict(path), source=str(path))
    return module.eval().requires_grad_(False)


def load_bundled(variant: str = "bundled") -> RAR:
    """The trained generator in fp32.

    Args:
        variant: ``"bundled"``, or ``"stress"`` for the same function with the channel outliers of
            :mod:`ptq4arvg.models.stress`, derived here from the same fp16 weights, so that rounding their large values
            to fp16 does not enter.

    Raises:
        ValueError: another variant.
        CheckpointError: the asset is missing or damaged.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r} of the bundled model; known: {', '.join(VARIANTS)}")
    model = _load(RAR(FASHION), "generator")
    if variant == "stress":
        from ptq4arvg.models.stress import stress

        model = stress(model, STRESS_SEED)
    return model


def load_tokenizer() -> SmallVQ:
    """The tokenizer of the bundled generator."""
    return _load(SmallVQ(), "tokenizer")


def load_classifier() -> Classifier:
    """The classifier that scores generated pictures."""
    return _load(Classifier(), "classifier")


def load_reference() -> Reference:
    """Statistics and figures of the test set; the dataset itself is not needed."""
    tensors = read_state_dict(ASSETS / "reference.safetensors")
    figures = json.loads((ASSETS / "reference.json").read_text())
    return Reference(Frechet(tensors["mean"].to(torch.float64), tensors["covariance"].to(torch.float64)), figures)


def load_scorer() -> Scorer:
    """Tokenizer, classifier and reference statistics, ready to score tokens."""
    return Scorer(load_tokenizer(), load_classifier(), load_reference().statistics)
