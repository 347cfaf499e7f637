"""From what a user types to a model: bundled variants by name, quantized and published checkpoints, tokenizers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ptq4arvg import checkpoint
from ptq4arvg.errors import CheckpointError
from ptq4arvg.models.bundled import FASHION, VARIANTS, load_bundled, load_tokenizer
from ptq4arvg.models.rar import CONFIGS, RAR
from ptq4arvg.models.tokenizers import MaskGitVQGAN, to_uint8
from ptq4arvg.state_dict import read_state_dict

__all__ = ["config_of", "open_decoder", "open_generator", "open_original"]


def config_of(state: Mapping[str, Tensor], source: str | Path) -> str:
    """The name of the published RAR config that a state dict belongs to, told by its width and depth.

    Raises:
        CheckpointError: it is none of them.
    """
    table = state.get("cls_token")
    blocks = {match[1] for key in state if (match := re.match(r"blocks\.(\d+)\.", key))}
    if table is not None:
        for name, config in CONFIGS.items():
            if (config.dim, config.depth) == (table.shape[-1], len(blocks)):
                return name
    found = f"width {table.shape[-1]}, {len(blocks)} blocks" if table is not None else "no cls_token"
    raise CheckpointError(f"{source} is not a published RAR checkpoint ({found}); known: {', '.join(CONFIGS)}")


def open_original(model: str, weights: Path | None) -> RAR:
    """A floating-point generator.

    Args:
        model: ``"bundled"``, ``"stress"``, or the name of a published config.
        weights: the published checkpoint; needed for the latter only.

    Raises:
        ValueError: an unknown name, or a checkpoint where none belongs or none where one does.
        CheckpointError: the file does not fit.
    """
    if model in VARIANTS:
        if weights is not None:
            raise ValueError(f"{model!r} ships with its weights; drop --checkpoint {weights}")
        return load_bundled(model)
    if model not in CONFIGS:
        raise ValueError(f"unknown model {model!r}; known: {', '.join((*VARIANTS, *CONFIGS))}")
    if weights is None:
        raise ValueError(f"{model!r} needs its published weights: --checkpoint {model}.bin")
    return RAR.from_published(model, weights)


def open_generator(source: str) -> RAR:
    """A generator ready to draw: a bundled variant by name, a quantized checkpoint, or a published one (recognised by
    its shapes).

    Raises:
        CheckpointError: no such file, or a file that is neither.
    """
    if source in VARIANTS:
        return load_bundled(source)
    path = Path(source)
    if not path.is_file():
        raise CheckpointError(f"{source} is neither a file nor one of {', '.join(VARIANTS)}")
    if checkpoint.is_quantized(path):
        return checkpoint.load(path)
    return RAR.from_published(config_of(read_state_dict(path), path), path)


def open_decoder(model: RAR, tokenizer: Path | None) -> Callable[[Tensor], Tensor]:
    """A function from tokens ``[n, T]`` to pictures uint8 ``[n, C, h, w]``, fit for ``model``.

    Args:
        tokenizer: published MaskGIT-VQGAN weights; for generators of published size only, the bundled one has its own.

    Raises:
        ValueError: a tokenizer where none belongs, or none where one does.
        CheckpointError: the file does not fit.
    """
    if (model.config.codebook, model.config.grid) == (FASHION.codebook, FASHION.grid):
        if tokenizer is not None:
            raise ValueError(f"the bundled generator ships with its tokenizer; drop --tokenizer {tokenizer}")
        decode: Callable[[Tensor], Tensor] = load_tokenizer().decode_tokens
    else:
        if tokenizer is None:
            raise ValueError(
                f"a generator with {model.config.codebook} codes needs the weights of its tokenizer: "
                "--tokenizer maskgit-vqgan-imagenet-f16-256.bin"
            )
        decode = MaskGitVQGAN().load_published(tokenizer).eval().decode_tokens

    def pictures(tokens: Tensor) -> Tensor:
        with torch.inference_mode():
            return torch.cat([to_uint8(decode(part)) for part in tokens.split(16)])

    return pictures
