"""Generators of published sizes with random weights: what a speed measurement needs, without calibrating anything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ptq4arvg.linear import QuantLinear
from ptq4arvg.models.rar import CONFIGS, RAR, RARConfig
from ptq4arvg.pipeline import FORMAT_VERSION, assemble
from ptq4arvg.protocol import AttentionSpec
from ptq4arvg.recipes import named_recipe

SINKS = 2  # the first positions, which keep 8-bit codes


def random_generator(config: RARConfig, seed: int = 0) -> RAR:
    """A floating-point RAR of that size; modulations are drawn as well, so that every operand matters."""
    generator = torch.Generator().manual_seed(seed)
    model = RAR(config).initialize(generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adaLN_modulation" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model.eval().requires_grad_(False)


def random_quantized(config: RARConfig, recipe: str, seed: int = 0) -> Any:
    """An integer RAR of that size with random codes and steps that keep activations in range; made layer by layer.

    It can be saved; prepare it (:func:`ptq4arvg.blocks.prepare`), or load it from its file, before timing it.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = named_recipe(recipe)
    with torch.device("meta"):
        model = RAR(config)
    specs = model.linear_specs()
    shapes = {path: model.get_parameter(f"{path}.weight").shape for path in specs}
    for name, parameter in list(model.named_parameters()):
        if any(name.startswith(f"{path}.") for path in specs):
            continue
        owner, _, key = name.rpartition(".")
        value = (
            torch.ones(parameter.shape) if "norm" in name else 0.02 * torch.randn(parameter.shape, generator=generator)
        )
        setattr(model.get_submodule(owner), key, torch.nn.Parameter(value.zero_() if key == "bias" else value))

    def make(path: str) -> QuantLinear:
        spec, (out_features, in_features) = specs[path], shapes[path]
        w_bits, act_bits = chosen.weight_bits[spec.role], chosen.act_bits[spec.role]
        top = 2 ** (w_bits - 1) - 1
        codes = (torch.randn(out_features, in_features, generator=generator) * top / 4).round().clamp(-top, top)
        bits = torch.full((spec.groups,), act_bits)
        if spec.role != "adaln" and spec.groups > SINKS:
            bits[:SINKS] = chosen.sink_bits
        half = 2.0 ** (bits.double() - 1)
        return QuantLinear.from_codes(
            codes.to(torch.int8),
            torch.full((out_features,), 0.08 / top),
            torch.zeros(out_features),
            w_bits,
            (3.0 / half).float(),
            half.long(),
            bits,
            torch.tensor(spec.group_of_position),
            spec.activation,
        )

    def kv(attention: AttentionSpec, operand: str) -> tuple[Tensor, Tensor]:
        shape = (2, attention.heads)
        return torch.full(shape, 0.03), torch.full(shape, 128)

    result = assemble(model, make, kv)
    result.quantization = {
        "format_version": FORMAT_VERSION,
        "family": RAR.family,
        "config": result.config_dict(),
        "recipe": chosen.to_dict(),
        "weight_bits": max(chosen.weight_bits.values()),
        "act_bits": max(chosen.act_bits.values()),
        "integer": True,
        "calibration": {},
        "scaling": {},
    }
    return result


def size(name: str) -> RARConfig:
    """The published configuration called ``name``.

    Raises:
        ValueError: unknown name.
    """
    if name not in CONFIGS:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(CONFIGS)}")
    return CONFIGS[name]
