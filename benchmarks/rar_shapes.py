"""The linear layers of the published RAR models."""

from __future__ import annotations

from collections.abc import Sequence

from ptq4arvg.models.rar import CONFIGS

from .random_models import size
from .shapes import LayerShape, adaln_layers

RAR_MODELS: tuple[str, ...] = tuple(CONFIGS)


def rar_layers(model: str) -> dict[str, tuple[int, int]]:
    """(N, K) of every kind of linear layer of a RAR.

    Raises:
        ValueError: unknown model.
    """
    config = size(model)
    return adaln_layers(config.dim, config.mlp_dim, config.codebook)


def rar_shapes(models: Sequence[str] = RAR_MODELS, layers: Sequence[str] = ()) -> list[LayerShape]:
    """The distinct shapes of the chosen layers (all, if none is named), in the order of models and layers.

    Raises:
        ValueError: an unknown model or layer.
    """
    users: dict[tuple[int, int], list[str]] = {}
    for model in models:
        sizes = rar_layers(model)
        for layer in layers or sizes:
            if layer not in sizes:
                raise ValueError(f"unknown layer {layer!r}; known are {', '.join(sizes)}")
            users.setdefault(sizes[layer], []).append(f"{model}.{layer}")
    return [LayerShape(n, k, tuple(found)) for (n, k), found in users.items()]


def block_weights(model: str) -> int:
    """Weights of the linear layers of a whole model, blocks and head."""
    layers = rar_layers(model)
    blocks = sum(n * k for kind, (n, k) in layers.items() if not kind.startswith("head"))
    return size(model).depth * blocks + sum(n * k for kind, (n, k) in layers.items() if kind.startswith("head"))
