"""The small classifier that scores generated pictures: class agreement, and the features of the Fréchet distance."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Classifier"]


class Classifier(nn.Module):
    """Four convolutions, 64 pooled features, ten classes."""

    feature_dim = 64

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 48, 3, padding=1)
        self.conv3 = nn.Conv2d(48, 64, 3, padding=1)
        self.conv4 = nn.Conv2d(64, 64, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(32), nn.BatchNorm2d(48)
        self.bn3, self.bn4 = nn.BatchNorm2d(64), nn.BatchNorm2d(64)
        self.out = nn.Linear(self.feature_dim, classes)

    def features(self, images: Tensor) -> Tensor:
        """Pooled features ``[B, 64]`` of images ``[B, 1, 28, 28]`` in [0, 1]."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(images))), 2)
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.max_pool2d(F.relu(self.bn3(self.conv3(x))), 2)
        return F.relu(self.bn4(self.conv4(x))).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Class logits ``[B, classes]``."""
        return self.out(self.features(images))
