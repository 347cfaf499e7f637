"""Sizes of the linear layers of published generators, each pair (N, K) once, with the layers that have it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Width, feed-forward width, entries of the vocabulary.
_WIDTHS = {
    "rar_b": (768, 3072, 1024),
    "rar_l": (1024, 4096, 1024),
    "rar_xl": (1280, 5120, 1024),
    "var_d16": (1024, 4096, 4096),
    "var_d20": (1280, 5120, 4096),
    "par_xl": (1280, 3584, 16384),
}
MODELS: tuple[str, ...] = tuple(_WIDTHS)
LAYERS: tuple[str, ...] = ("qkv", "proj", "fc1", "fc2", "adaln", "head_adaln", "head", "w13", "w2")


@dataclass(frozen=True)
class LayerShape:
    """A linear layer ``[n, k]``; ``users`` are ``model.layer``, ``kind`` the layer of the first of them."""

    n: int
    k: int
    users: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.n}x{self.k}"

    @property
    def kind(self) -> str:
        return self.users[0].partition(".")[2]


def adaln_layers(d: int, hidden: int, vocabulary: int) -> dict[str, tuple[int, int]]:
    """(N, K) of every kind of linear layer of a transformer with modulation, as RAR and VAR are."""
    block = {"qkv": (3 * d, d), "proj": (d, d), "fc1": (hidden, d), "fc2": (d, hidden), "adaln": (6 * d, d)}
    return block | {"head_adaln": (2 * d, d), "head": (vocabulary, d)}


def model_layers(model: str) -> dict[str, tuple[int, int]]:
    """(N, K) of every kind of linear layer of a model.

    PAR's ``w1`` and ``w3`` are one layer here, because they run as one product (``linear_swiglu_quant``).

    Raises:
        ValueError: unknown model.
    """
    if model not in _WIDTHS:
        raise ValueError(f"unknown model {model!r}; known are {', '.join(MODELS)}")
    d, hidden, vocabulary = _WIDTHS[model]
    if model.startswith("par"):
        block = {"qkv": (3 * d, d), "proj": (d, d), "w13": (2 * hidden, d), "w2": (d, hidden)}
        return block | {"head": (vocabulary, d)}
    return adaln_layers(d, hidden, vocabulary)


def layer_shapes(models: Sequence[str] = MODELS, layers: Sequence[str] = LAYERS) -> list[LayerShape]:
    """The distinct shapes of the chosen layers, in the order of models and layers.

    Raises:
        ValueError: an unknown model or layer, or nothing is left.
    """
    for layer in layers:
        if layer not in LAYERS:
            raise ValueError(f"unknown layer {layer!r}; known are {', '.join(LAYERS)}")
    users: dict[tuple[int, int], list[str]] = {}
    for model in models:
        for layer, size in model_layers(model).items():
            if layer in layers:
                users.setdefault(size, []).append(f"{model}.{layer}")
    if not users:
        raise ValueError(f"none of the models {', '.join(models)} has a layer {' or '.join(layers)}")
    return [LayerShape(n, k, tuple(names)) for (n, k), names in users.items()]
