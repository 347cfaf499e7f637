"""The small vector-quantized tokenizer of the bundled model: 28×28 grey pictures to 7×7 tokens and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SmallVQ", "SmallVQConfig"]


@dataclass(frozen=True)
class SmallVQConfig:
    """Channel widths at 28×28, 14×14 and 7×7; number and width of the codes."""

    widths: tuple[int, int, int] = (24, 48, 80)
    codebook: int = 512
    code_dim: int = 16


class ResBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(8, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(self.norm(x)))))


class SmallVQ(nn.Module):
    """Convolutional encoder, nearest-code quantizer, convolutional decoder."""

    def __init__(self, config: SmallVQConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or SmallVQConfig()
        a, b, c = config.widths
        self.encoder = nn.Sequential(
            nn.Conv2d(1, a, 3, padding=1),
            ResBlock(a),
            nn.Conv2d(a, b, 4, stride=2, padding=1),
            ResBlock(b),
            nn.Conv2d(b, c, 4, stride=2, padding=1),
            ResBlock(c),
            nn.Conv2d(c, config.code_dim, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(config.code_dim, c, 3, padding=1),
            ResBlock(c),
            ResBlock(c),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(c, b, 3, padding=1),
            ResBlock(b),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(b, a, 3, padding=1),
            ResBlock(a),
            nn.Conv2d(a, 1, 3, padding=1),
        )
        self.register_buffer("codes", torch.zeros(config.codebook, config.code_dim))
        self.codes: Tensor

    def nearest(self, z: Tensor) -> Tensor:
        """Index of the nearest code for every row of z ``[n, code_dim]``."""
        distance = self.codes.square().sum(1) - 2 * z @ self.codes.T
        return distance.argmin(1)

    def encode(self, images: Tensor) -> Tensor:
        """Tokens int64 ``[B, 49]`` of images float ``[B, 1, 28, 28]`` in [0, 1]."""
        z = self.encoder(images)
        return self.nearest(z.permute(0, 2, 3, 1).flatten(0, 2)).view(len(images), -1)

    def decode_tokens(self, tokens: Tensor) -> Tensor:
        """Images float ``[B, 1, 4s, 4s]`` in [0, 1] of tokens int64 ``[B, s²]``.

        Raises:
            ValueError: a token outside the codebook, or a row that is not a square.
        """
        if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= self.config.codebook):
            bad = tokens[(tokens < 0) | (tokens >= self.config.codebook)][0].item()
            raise ValueError(f"token {bad} is out of range: the codebook has entries 0 … {self.config.codebook - 1}")
        side = round(tokens.shape[1] ** 0.5)
        if side * side != tokens.shape[1]:
            raise ValueError(f"{tokens.shape[1]} tokens are not a square picture")
        z = self.codes[tokens].view(len(tokens), side, side, -1).permute(0, 3, 1, 2)
        return self.decoder(z).clamp(0, 1)
