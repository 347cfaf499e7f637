"""A model that computes the same function but has the channel outliers of a large one.

Published generators have activation channels whose range exceeds that of their neighbours by orders of magnitude and
whose mean is far from zero; small trained models hardly do. Any norm → Linear pair can be given such channels without
changing the function: the norm hands over ``x' = G ⊙ (x + o)`` and the linear undoes it with ``W' = W / G`` and
``b' = b − W o``. With the lognormal gains (σ = 1.5) and offsets of four standard deviations used here, a quantizer that
does not treat outliers wastes most of its codes.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from ptq4arvg.nn import Norm
from ptq4arvg.protocol import FoldPair, GeneratorProtocol, ordinary_positions

__all__ = ["channel_std", "stress"]

Model = TypeVar("Model", bound=nn.Module)

YARDSTICK_SEQUENCES = 16


def stress(model: Model, seed: int, sigma: float = 1.5, offset: float = 4.0) -> Model:
    """A copy of ``model`` with outlier channels in every norm → Linear pair, exactly equivalent in floating point.

    Every channel of a pair gets a gain ``exp(sigma·n)`` with standard normal n and an offset of ``±offset`` times its
    standard deviation, measured by :func:`channel_std`. The arithmetic is float64; parameters return to their own
    dtype, and logits change by that rounding only (below 1e-4 for float32 parameters of the bundled sizes).

    Args:
        model: speaks the generator protocol; in its published form (every ``scale_offset`` is 1).
        seed: of the gains and signs.
        sigma: standard deviation of the logarithm of the gains.
        offset: size of the offsets in standard deviations.

    Returns:
        A model of the same class with the same state-dict keys and shapes.

    Raises:
        ValueError: the model has been folded already, or one of its norms leaves no place to put gains or offsets
            without adding parameters.
    """
    assert isinstance(model, GeneratorProtocol)
    yardstick = channel_std(model)
    result = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for pair in result.fold_pairs():
            width = len(yardstick[pair.norm])
            gain = torch.exp(sigma * torch.randn(width, generator=generator, dtype=torch.float64))
            sign = torch.randint(0, 2, (width,), generator=generator) * 2 - 1
            _fold(result, pair, gain, sign * offset * yardstick[pair.norm])
    return result


@torch.no_grad()
def channel_std(model: nn.Module) -> dict[str, Tensor]:
    """Standard deviation ``[D]`` of every channel that a foldable norm hands over, by the norm's path.

    Measured over 16 sequences of the model's own sampling (fixed seed, classes in turn, both guidance branches), sinks
    excluded: they would dominate the deviation without being what a typical token looks like. The pass runs in float64,
    so that the sampled sequences, and with them the stressed weights, do not depend on the machine's floating-point
    kernels. A constant channel gets the mean deviation of the others, so that it too is offset.
    """
    assert isinstance(model, GeneratorProtocol)
    wide = copy.deepcopy(model).double().eval()
    ordinary = ordinary_positions(wide)
    seen: dict[str, Tensor] = {}

    def watch(path: str) -> torch.utils.hooks.RemovableHandle:
        def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[path] = output[:, ordinary].flatten(0, 1).std(0)

        return wide.get_submodule(path).register_forward_hook(hook)

    classes = torch.arange(YARDSTICK_SEQUENCES) % wide.conditioning.classes
    sequences = wide.sample_calibration(classes, seed=0)
    handles = [watch(pair.norm) for pair in wide.fold_pairs()]
    try:
        wide.calibration_forward(dict(sequences.inputs))
    finally:
        for handle in handles:
            handle.remove()
    return {path: torch.where(std > 0, std, std.mean()) for path, std in seen.items()}


def _fold(model: nn.Module, pair: FoldPair, gain: Tensor, offset: Tensor) -> None:
    """Make the norm of ``pair`` hand over ``gain ⊙ (x + offset)`` and its linears expect it."""
    norm = model.get_submodule(pair.norm)
    if not isinstance(norm, Norm):
        raise ValueError(f"{pair.norm} is a {type(norm).__name__}, not a ptq4arvg Norm, and cannot be folded into")
    if norm.scale_offset != 1.0:
        raise ValueError(
            f"{pair.norm} has scale_offset {norm.scale_offset}: the model has been folded before; stress its original"
        )
    modulation = pair.modulation
    if modulation is None and norm.bias is None:
        raise ValueError(
            f"{pair.norm} has neither a bias nor a modulation, so there is no parameter that could hold an offset"
        )
    if norm.weight is not None:
        # The gain goes into the affine, before the modulation, whose scale then multiplies it; only the shift needs it
        # again.
        _write(norm.weight, norm.weight.double() * gain)
        if norm.bias is not None:
            _write(norm.bias, norm.bias.double() * gain)
    if modulation is None:
        assert norm.bias is not None
        _write(norm.bias, norm.bias.double() + gain * offset)
    else:
        layer = _linear(model, modulation.linear)
        _scale_rows(layer, modulation.shift, gain, gain * offset)
        if norm.weight is None:
            # (1 + γ) G = 1 + γ'  with  γ' = G γ + (G − 1).
            _scale_rows(layer, modulation.scale, gain, gain - 1)
    for path in pair.linears:
        linear = _linear(model, path)
        if linear.bias is None:
            raise ValueError(f"{path} has no bias, so there is no parameter that could take the offset back out")
        weight = linear.weight.double()
        _write(linear.bias, linear.bias.double() - weight @ offset)
        _write(linear.weight, weight / gain)


def _linear(model: nn.Module, path: str) -> nn.Linear:
    layer = model.get_submodule(path)
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"{path} is a {type(layer).__name__}, not a floating-point linear; stress the original model")
    return layer


def _scale_rows(layer: nn.Linear, chunk: int, gain: Tensor, addend: Tensor) -> None:
    """Multiply the outputs of one D-wide chunk of a linear by ``gain`` and add ``addend``."""
    rows = slice(chunk * len(gain), (chunk + 1) * len(gain))
    _write(layer.weight[rows], layer.weight[rows].double() * gain[:, None])
    _write(layer.bias[rows], layer.bias[rows].double() * gain + addend)


def _write(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value.to(parameter.dtype))
