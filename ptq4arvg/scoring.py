"""Scores of generated pictures: agreement with the class asked for, and distance to the test set."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq4arvg.metrics import Frechet
from ptq4arvg.models.classifier import Classifier
from ptq4arvg.models.tokenizers.small_vq import SmallVQ

__all__ = ["Observations", "Scorer"]

BATCH = 250


@dataclass(frozen=True)
class Observations:
    """What the classifier saw in n pictures.

    Attributes:
        features: float ``[n, F]``.
        correct: bool ``[n]``, whether the predicted class is the one asked for.
    """

    features: Tensor
    correct: Tensor

    @property
    def class_accuracy(self) -> float:
        return float(self.correct.double().mean())


@dataclass(frozen=True)
class Scorer:
    """Decodes tokens and scores the pictures.

    Attributes:
        tokenizer: turns tokens into pictures.
        classifier: in eval mode.
        reference: statistics of the classifier's features of the test set.
    """

    tokenizer: SmallVQ
    classifier: Classifier
    reference: Frechet

    @torch.inference_mode()
    def observe_images(self, images: Tensor, classes: Tensor) -> Observations:
        """Look at images ``[n, 1, 28, 28]`` in [0, 1] that should show ``classes`` ``[n]``."""
        if len(images) != len(classes):
            raise ValueError(f"{len(images)} images but {len(classes)} classes")
        features = torch.cat([self.classifier.features(part) for part in images.split(BATCH)])
        return Observations(features, self.classifier.out(features).argmax(1) == classes)

    @torch.inference_mode()
    def observe(self, tokens: Tensor, classes: Tensor) -> Observations:
        """Decode tokens ``[n, T]`` and look at the pictures."""
        return self.observe_images(self.decode(tokens), classes)

    @torch.inference_mode()
    def decode(self, tokens: Tensor) -> Tensor:
        """Pictures ``[n, 1, 28, 28]`` in [0, 1] of tokens ``[n, T]``."""
        return torch.cat([self.tokenizer.decode_tokens(part) for part in tokens.split(BATCH)])

    def frechet(self, seen: Observations) -> float:
        """Fréchet distance of the observed features to the test set's."""
        return self.reference.distance(Frechet.of(seen.features))
