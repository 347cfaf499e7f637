"""How tensors and options are handed to the compiled modules: addresses and numbers, no tensor of torch's own."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..plans import NormOperands

View: TypeAlias = tuple[int, int, tuple[int, ...], tuple[int, ...]]

# Numbers of csrc/views.h (Element) and csrc/types.h (the enumerations).
ELEMENTS = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.int8: 3,
    torch.uint8: 4,
    torch.int32: 5,
    torch.int64: 6,
}
ACTIVATIONS = {"none": 0, "silu": 1, "gelu_erf": 2, "gelu_tanh": 3}
SWIGLU = -1  # in place of an activation
NORMS = {"layer": 0, "rms": 1}
QK_KINDS = {"none": 0, "layer_norm": 1, "l2": 2, "rope": 3}


def view(tensor: Tensor) -> View:
    """What a compiled module is told of a tensor: address, dtype, sizes, strides (in elements)."""
    return tensor.data_ptr(), ELEMENTS[tensor.dtype], tuple(tensor.shape), tensor.stride()


def maybe(tensor: Tensor | None) -> View | None:
    """:func:`view` of an optional operand."""
    return None if tensor is None else view(tensor)


def dense(tensor: Tensor | None) -> View | None:
    """:func:`maybe` of an operand that a plan keeps.

    Raises:
        ValueError: it is not contiguous.
    """
    if tensor is not None and not tensor.is_contiguous():
        raise ValueError("an operand of a plan is not contiguous; pass tensor.contiguous() and keep it")
    return maybe(tensor)


def norm_views(norm: NormOperands) -> dict[str, Any]:
    """What the plan of a compiled module is told of a norm."""
    return {
        "kind": NORMS[norm.kind],
        "eps": norm.eps,
        "weight": dense(norm.weight),
        "bias": dense(norm.bias),
        "offset": norm.scale_offset,
        "scale": norm.scale,
        "shift": norm.shift,
        "gate": norm.gate,
    }
