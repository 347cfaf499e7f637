"""MaskGIT-VQGAN, the tokenizer of RAR: 256×256 images to 16×16 tokens and back (method.md §2.1).

A convolutional VQGAN without attention. State-dict keys and shapes are those of the published
``maskgit-vqgan-imagenet-f16-256`` file.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptq4arvg.state_dict import load_strict, read_state_dict

__all__ = ["MaskGitVQGAN", "MaskGitVQGANConfig", "to_uint8"]

NORM_GROUPS = 32
NORM_EPS = 1e-6


@dataclass(frozen=True)
class MaskGitVQGANConfig:
    """Widths and depths; the defaults are the published model.

    Attributes:
        channels: width of the level with the full resolution.
        multipliers: width of each level, finest first, in units of ``channels``. Each level but the first halves the
            resolution.
        res_blocks: residual blocks per level, and between encoder or decoder and the codes.
        codebook_size: number V of codes.
        code_dim: width of a code.
        image_channels: colours.
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: int = 2
    codebook_size: int = 1024
    code_dim: int = 256
    image_channels: int = 3

    def __post_init__(self) -> None:
        if not self.multipliers:
            raise ValueError("multipliers must name at least one level")
        for name in ("channels", "res_blocks", "codebook_size", "code_dim", "image_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for width in self.widths:
            if width < 1 or width % NORM_GROUPS:
                raise ValueError(
                    f"every level's width must be a positive multiple of {NORM_GROUPS} (GroupNorm), got {width} "
                    f"from channels={self.channels}, multipliers={self.multipliers}"
                )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.channels * multiplier for multiplier in self.multipliers)

    @property
    def pixels_per_token(self) -> int:
        """Edge of the square of pixels that one token stands for; 16 in the published model."""
        return 2 ** (len(self.multipliers) - 1)


def conv3x3(inputs: int, outputs: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


def group_norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, width, eps=NORM_EPS)


class ResnetBlock(nn.Module):
    """``h = conv2(silu(norm2(conv1(silu(norm1(x))))))``; returns ``x + h``.

    Where the width changes it returns ``h + nin_shortcut(h)`` instead: the shortcut reads the block's output and ``x``
    is not added at all. It looks like a slip, but the published weights were trained with it.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = group_norm(inputs)
        self.conv1 = conv3x3(inputs, outputs, bias=False)
        self.norm2 = group_norm(outputs)
        self.conv2 = conv3x3(outputs, outputs, bias=False)
        self.nin_shortcut = nn.Conv2d(outputs, outputs, 1, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(h))


def res_blocks(inputs: int, outputs: int, count: int) -> nn.ModuleList:
    return nn.ModuleList(ResnetBlock(inputs if i == 0 else outputs, outputs) for i in range(count))


class DownLevel(nn.Module):
    """Residual blocks, then, except at the coarsest level, the mean of each 2×2 pixels."""

    def __init__(self, inputs: int, outputs: int, blocks: int, downsample: bool) -> None:
        super().__init__()
        self.block = res_blocks(inputs, outputs, blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return F.avg_pool2d(x, 2) if self.downsample else x


class UpLevel(nn.Module):
    """Residual blocks, then, except at the finest level, every pixel doubled in both directions and a convolution."""

    def __init__(self, inputs: int, outputs: int, blocks: int, upsample: bool) -> None:
        super().__init__()
        self.block = res_blocks(inputs, outputs, blocks)
        self.upsample_conv = conv3x3(outputs, outputs) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return (
            x if self.upsample_conv is None else self.upsample_conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        )


class Encoder(nn.Module):
    """Images ``[B, 3, H, W]`` to latents ``[B, code_dim, h, w]``."""

    def __init__(self, config: MaskGitVQGANConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = conv3x3(config.image_channels, config.channels, bias=False)
        self.down = nn.ModuleList(
            DownLevel(inputs, outputs, config.res_blocks, downsample=level < len(widths) - 1)
            for level, (inputs, outputs) in enumerate(zip((config.channels, *widths), widths, strict=False))
        )
        self.mid = res_blocks(widths[-1], widths[-1], config.res_blocks)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.code_dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        for level in self.down:
            x = level(x)
        for block in self.mid:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Latents ``[B, code_dim, h, w]`` to images ``[B, 3, H, W]``, not yet clamped."""

    def __init__(self, config: MaskGitVQGANConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = conv3x3(config.code_dim, widths[-1])
        self.mid = res_blocks(widths[-1], widths[-1], config.res_blocks)
        # up[i] is the level of widths[i], so the coarsest is last in the state dict and first in the computation.
        self.up = nn.ModuleList(
            UpLevel(inputs, outputs, config.res_blocks, upsample=level > 0)
            for level, (inputs, outputs) in enumerate(zip((*widths[1:], widths[-1]), widths, strict=True))
        )
        self.norm_out = group_norm(widths[0])
        self.conv_out = conv3x3(widths[0], config.image_channels)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.conv_in(latents)
        for block in self.mid:
            x = block(x)
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Codebook(nn.Module):
    """The codes, and the search for the nearest."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, dim)

    def nearest(self, latents: Tensor) -> Tensor:
        """Latents ``[B, dim, h, w]`` to int64 ``[B, h, w]``, the codes at the least Euclidean distance."""
        z = latents.movedim(1, -1).float()
        codes = self.embedding.weight.float()
        # |z − e|² without |z|², which is the same for all codes and would only cost precision.
        return (codes.square().sum(-1) - 2 * z @ codes.T).argmin(-1)


class MaskGitVQGAN(nn.Module):
    """Tokenizer of the RAR family.

    Args:
        config: None for the published model.
    """

    def __init__(self, config: MaskGitVQGANConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or MaskGitVQGANConfig()
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Codebook(config.codebook_size, config.code_dim)

    def load_published(self, path: str | os.PathLike[str]) -> MaskGitVQGAN:
        """Fill this model from a ``.bin``, ``.pt``, ``.pth`` or ``.safetensors`` file and return it.

        Raises:
            CheckpointError: the file cannot be read or does not fit; the model is then unchanged.
        """
        load_strict(self, read_state_dict(path), path)
        return self

    @torch.no_grad()
    def decode_tokens(self, tokens: Tensor) -> Tensor:
        """Turn token ids into images.

        Args:
            tokens: int64 or int32 ``[B, h, w]``, or ``[B, h·w]`` for a square of h = w.

        Returns:
            float32 ``[B, 3, 16·h, 16·w]`` (published model), clamped to [0, 1].

        Raises:
            ValueError: another dtype or shape, or an id outside the codebook.
        """
        grid = self._token_grid(tokens)
        latents = self.quantize.embedding(grid).movedim(-1, 1)
        images: Tensor = self.decoder(latents)
        return images.float().clamp(0.0, 1.0)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Turn images into token ids.

        Args:
            images: floating point ``[B, 3, H, W]`` in [0, 1]; H and W are multiples of ``config.pixels_per_token``.

        Returns:
            int64 ``[B, h, w]``.

        Raises:
            ValueError: another dtype or shape.
        """
        edge, channels = self.config.pixels_per_token, self.config.image_channels
        if not images.is_floating_point():
            raise ValueError(f"images must be floating point in [0, 1], got {images.dtype}")
        if images.dim() != 4 or images.shape[1] != channels:
            raise ValueError(f"images must be [B, {channels}, H, W], got {list(images.shape)}")
        if images.numel() == 0 or images.shape[2] % edge or images.shape[3] % edge:
            raise ValueError(
                f"height and width must be multiples of {edge} and nothing empty, got {list(images.shape)}"
            )
        return self.quantize.nearest(self.encoder(images.to(self.encoder.conv_in.weight.dtype)))

    def _token_grid(self, tokens: Tensor) -> Tensor:
        """Check token ids and give them their shape ``[B, h, w]``."""
        if tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"tokens must be int64 or int32, got {tokens.dtype}")
        if tokens.dim() not in (2, 3) or tokens.numel() == 0:
            raise ValueError(f"tokens must be [B, h, w] or [B, h·w] and not empty, got {list(tokens.shape)}")
        if tokens.dim() == 2:
            edge = math.isqrt(tokens.shape[1])
            if edge * edge != tokens.shape[1]:
                raise ValueError(f"{tokens.shape[1]} tokens form no square; pass them as [B, h, w]")
            tokens = tokens.reshape(-1, edge, edge)
        size = self.config.codebook_size
        for value in (int(tokens.min()), int(tokens.max())):
            if not 0 <= value < size:
                raise ValueError(f"token id {value} is outside the codebook, whose ids are 0 to {size - 1}")
        return tokens


def to_uint8(images: Tensor) -> Tensor:
    """Convert images in [0, 1] to bytes as the published evaluation does: clamp, times 255, fraction dropped.

    Args:
        images: floating point, any shape.

    Returns:
        uint8 of the same shape.

    Raises:
        ValueError: not floating point, or NaN among the values.
    """
    if not images.is_floating_point():
        raise ValueError(f"images must be floating point in [0, 1], got {images.dtype}")
    if bool(images.isnan().any()):
        raise ValueError(
            f"{int(images.isnan().sum())} of {images.numel()} values are NaN; the model that made them overflowed"
        )
    return (images.float().clamp(0.0, 1.0) * 255.0).to(torch.uint8)
