"""Integer blocks once more as fake-quantized float64 computations, from their saved state: dequantized weights, tables.

Only parameters are read from the modules under test; no operator of the package is called.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ptq4arvg.blocks import QuantBlock, QuantHead
from ptq4arvg.linear import QuantLinear
from ptq4arvg.models.rar import RAR
from ptq4arvg.nn import Condition, Norm, Window
from ptq4arvg.protocol import Modulation

__all__ = ["simulated_block", "simulated_logits"]


def fake(x: Tensor, delta: Tensor, zero_point: Tensor, bits: Tensor | int) -> Tensor:
    """Round to the grid and back, in float64; the product with the reciprocal is rounded to float32 as the law says."""
    scaled = (x.float() * (1 / delta.float())).double()
    top = 2.0 ** torch.as_tensor(bits) - 1
    codes = torch.minimum(torch.maximum(scaled.round() + zero_point, torch.zeros(())), top)
    return (codes - zero_point) * delta.double()


def fake_input(layer: QuantLinear, x: Tensor, positions: Tensor) -> Tensor:
    """x ``[…, P, K]`` on the grids of its positions."""
    group = layer.group_of_position.long()[positions]
    delta, zero, bits = (values[group][:, None] for values in (layer.delta, layer.zero_point, layer.act_bits.long()))
    return fake(x, delta, zero, bits)


def fake_linear(layer: QuantLinear, x: Tensor, positions: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.double()
    return F.linear(fake_input(layer, x, positions), layer.dequantized_weight().double(), bias)


def modulation_of(layer: QuantLinear | None, condition: Condition | None, shape: tuple[int, int]) -> Tensor | None:
    """Modulation channels per row, ``[B, P, chunks·D]``."""
    if layer is None or condition is None:
        return None
    values = condition.values.double()
    values = F.silu(values) if layer.activation == "silu" else values
    distinct = torch.cat(
        [fake_linear(layer, values[i : i + 1], condition.positions[i : i + 1]) for i in range(len(values))]
    )
    return distinct[condition.rows.long()].view(*shape, -1)


def normalized(norm: Norm, x: Tensor, spec: Modulation | None, modulation: Tensor | None) -> Tensor:
    y = x - x.mean(-1, keepdim=True) if norm.kind == "layer" else x
    y = y / (y.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    y = y if norm.weight is None else y * norm.weight.double()
    y = y if norm.bias is None else y + norm.bias.double()
    if spec is None or modulation is None:
        return y
    scale, shift = (modulation[..., i * norm.dim : (i + 1) * norm.dim] for i in (spec.scale, spec.shift))
    return y * (norm.scale_offset + scale) + shift


def gated(x: Tensor, spec: Modulation | None, modulation: Tensor | None) -> Tensor:
    if spec is None or spec.gate is None or modulation is None:
        return x
    width = x.shape[-1]
    return x * modulation[..., spec.gate * width : (spec.gate + 1) * width]


def simulated_block(block: QuantBlock, x: Tensor, condition: Condition | None, window: Window) -> Tensor:
    """x float64 ``[B, P, D]`` of a window that starts at position 0."""
    spec, positions = block.spec, window.positions
    batch, length, _ = x.shape
    modulation = modulation_of(block.adaln, condition, (batch, length))
    y = normalized(block.norm1, x, spec.modulation1, modulation)
    at = spec.attention
    qkv = fake_linear(block.qkv, y, positions).view(batch, length, 3, at.heads, at.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv
    if block.q_norm is not None and block.k_norm is not None:
        q, k = normalized(block.q_norm, q, None, None), normalized(block.k_norm, k, None, None)
    group = block.kv_group.long()[positions]
    k = fake(k, block.k_delta[group].T[..., None], block.k_zero_point[group].T[..., None], 8)
    v = fake(v, block.v_delta[group].T[..., None], block.v_zero_point[group].T[..., None], 8)
    scores = q @ k.transpose(-1, -2) * at.softmax_scale
    hidden = torch.arange(length) >= window.visible_end[:, None]
    mixed = (scores.masked_fill(hidden, -math.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)
    x = x + gated(fake_linear(block.proj, mixed, positions), spec.modulation1, modulation)
    hidden_units = fake_linear(block.fc1, normalized(block.norm2, x, spec.modulation2, modulation), positions)
    if spec.activation == "swiglu":
        first, second = hidden_units.chunk(2, -1)
        hidden_units = F.silu(first) * second
    else:
        hidden_units = F.gelu(hidden_units, approximate="tanh" if spec.activation == "gelu_tanh" else "none")
    return x + gated(fake_linear(block.fc2, hidden_units, positions), spec.modulation2, modulation)


def simulated_logits(model: RAR, tokens: Tensor, classes: Tensor) -> Tensor:
    """What ``model(tokens, classes)`` of a quantized RAR approximates, float64."""
    tokens = tokens[:, : model.config.tokens - 1]
    window = model.window(0, tokens.shape[1] + 2)
    condition = model.condition(classes, window.positions)
    x = model.embed(classes, tokens, window.positions).double()
    for block in model.blocks:
        assert isinstance(block, QuantBlock)
        x = simulated_block(block, x, condition, window)
    head = model.fused_head
    assert isinstance(head, QuantHead)
    modulation = modulation_of(head.adaln, condition, (x.shape[0], x.shape[1]))
    y = normalized(head.norm, x, head.spec.modulation, modulation)
    return fake_linear(head.linear, y, window.positions)[:, 1:]
