"""Activation functions."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .matmul import wide_dtype


def activate(values: Tensor, activation: str) -> Tensor:
    """Apply ``"none"``, ``"silu"``, ``"gelu_erf"`` or ``"gelu_tanh"`` to float32 values; returns float32.

    Evaluated in float64 (where the device has it) and rounded once: torch's float32 versions differ in the last bit
    between the vectorized body and the tail of a loop, and the truth must not depend on where a row sits in its batch.
    """
    if activation == "none":
        return values
    wide = values.to(wide_dtype(values.device))
    if activation == "silu":
        return F.silu(wide).to(torch.float32)
    if activation == "gelu_erf":
        return F.gelu(wide).to(torch.float32)
    if activation == "gelu_tanh":
        return F.gelu(wide, approximate="tanh").to(torch.float32)
    raise ValueError(f"unknown activation {activation!r}")
