"""The Triton backend: the portable GPU path, for NVIDIA GPUs from compute capability 8.0 on, without a CUDA toolchain.

Bit for bit the integers of the reference; float results within the tolerance of the laws.

Data. Reading an operand on the host would make every launch wait for the device and could not be captured into a graph.
So positions, row maps, groups and ends of the visible part that lie outside what they index are clamped by the kernels:
the result is wrong, but no access leaves an operand; a position without a slot appends nothing, and a NaN becomes the
lowest code of its grid. With ``PTQ4ARVG_DEBUG=1`` in the environment the reference looks at the operands of every
operator first, and raises what is wrong with them (not while a graph is captured, which cannot be interrupted).

Launches go to the current stream of the operands' device, workspaces come from torch's allocator, and nothing waits:
a decode step can be captured into a CUDA graph.

Importing this package does not import Triton; the first call does.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from ...packing import MAX_IN_FEATURES
from ...registry import Backend, OpSpec
from .. import debug
from . import support

# Operator -> module and name.
_OPERATORS = {
    "quantize": ("quantize", "quantize"),
    "adaln_quant": ("quantize", "adaln_quant"),
    "qkv_append": ("qkv", "qkv_append"),
    "attention": ("attention", "attention"),
    "linear": ("linear", "linear"),
    "linear_quant": ("linear", "linear_quant"),
    "linear_swiglu_quant": ("linear", "linear_swiglu_quant"),
    "linear_gate_residual": ("linear", "linear_gate_residual"),
}
_PLANS = {"weights": "PackedLayer", "layer": "LayerPlan", "block": "BlockPlan"}
_ROW_OPERATORS = frozenset({"quantize", "adaln_quant"})  # they hold a row in registers
_HEAD_OPERATORS = frozenset({"qkv_append", "attention"})
MAX_HEAD_DIM = 256


def _operator(module: str, name: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        if debug.enabled(args[0]):
            debug.check(name, args)
        return getattr(importlib.import_module(f".{module}", __package__), name)(*args)

    call.__name__ = name
    return call


def _plan(name: str) -> Callable[..., Any]:
    def build(*args: Any) -> Any:
        return getattr(importlib.import_module(".plans", __package__), name)(*args)

    return build


class TritonBackend(Backend):
    """Serves CUDA tensors; CPU tensors where launches are replaced (:mod:`.launch`) or Triton interprets kernels."""

    def __init__(self) -> None:
        operators = {op: _operator(*where) for op, where in _OPERATORS.items()}
        super().__init__("triton", operators | {plan: _plan(name) for plan, name in _PLANS.items()})

    def unavailable(self) -> str | None:
        return support.unavailable()

    def declines(self, op: str, spec: OpSpec) -> str | None:
        refused = support.device_refused(spec.device)
        if refused is not None:
            return refused
        if op in _ROW_OPERATORS and spec.in_features > MAX_IN_FEATURES:
            return f"rows of more than {MAX_IN_FEATURES} columns do not fit into the registers of a thread block"
        if op in _HEAD_OPERATORS and spec.head_dim > MAX_HEAD_DIM:
            return f"heads wider than {MAX_HEAD_DIM} do not fit into the registers of a thread block"
        return None


__all__ = ["TritonBackend"]
