"""The CUDA backend: hand-written kernels (csrc/cuda) for NVIDIA GPUs from compute capability 8.0 on.

Bit for bit the integers of the reference; float results within the tolerance of the laws. Data is treated as the Triton
backend treats it: nobody waits for the device to look at it, kernels clamp indices that lead out of an operand, a
position without a slot appends nothing, a NaN becomes the lowest code of its grid; ``PTQ4ARVG_DEBUG=1`` lets the
reference look at the operands of every operator first.

Launches go to the current stream of the operands' device, workspaces come from torch's allocator, and nothing waits:
a decode step can be captured into a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from ...registry import Backend, OpSpec
from .. import debug
from . import attention, linear, native, operators, plans, support

_PLANS = frozenset({"weights", "layer", "block"})
MAX_ROW_WIDTH = 12288  # of csrc/cuda/rows_params.h
MAX_HEAD_DIM = 256
# Operator -> module.
_OPERATORS = {
    "quantize": operators,
    "adaln_quant": operators,
    "qkv_append": operators,
    "attention": attention,
    "linear": linear,
    "linear_quant": linear,
    "linear_swiglu_quant": linear,
    "linear_gate_residual": linear,
}


def _operator(module: ModuleType, name: str) -> Callable[..., Any]:
    implementation = getattr(module, name)

    def call(*args: Any) -> Any:
        if debug.enabled(args[0]):
            debug.check(name, args)
        return implementation(*args)

    call.__name__ = name
    return call


class CudaBackend(Backend):
    """Serves CUDA tensors; CPU tensors where launches are replaced (:func:`.native.replace`)."""

    def __init__(self) -> None:
        super().__init__(
            "cuda",
            {name: _operator(module, name) for name, module in _OPERATORS.items()}
            | {"weights": plans.PackedLayer, "layer": plans.LayerPlan, "block": plans.BlockPlan},
        )

    def unavailable(self) -> str | None:
        return support.unavailable()

    def details(self) -> str:
        return f"available, {support.build()}"

    def declines(self, op: str, spec: OpSpec) -> str | None:
        refused = support.device_refused(spec.device, native.replaced())
        if refused is not None:
            return refused
        if op == "adaln_quant" and spec.in_features > MAX_ROW_WIDTH:
            return f"rows of more than {MAX_ROW_WIDTH} columns do not fit into the registers of a thread block"
        if op in ("qkv_append", "attention") and spec.head_dim > MAX_HEAD_DIM:
            return f"heads wider than {MAX_HEAD_DIM} do not fit into the registers of a warp"
        if op in _PLANS and spec.in_features % linear.ROW_ALIGN:
            return f"plans copy rows of codes {linear.ROW_ALIGN} bytes at a time, so K must be a multiple of that"
        return None


__all__ = ["CudaBackend"]
