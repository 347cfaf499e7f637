"""The reference backend: plain torch, exact integers, any device, every operator. The truth for all other backends.

It favours being checkable over being fast: it reads the data it is given and raises on what the faster backends cannot
afford to look for (positions outside a table, non-finite values to quantize, codes outside their grid, row sums that
belong to other codes, corrupt weights). On an accelerator each of these checks synchronises, so the reference cannot be
captured into a graph.
"""

from ...registry import Backend
from .attention import attention, qkv_append
from .linear import linear, linear_gate_residual, linear_quant, linear_swiglu_quant
from .quantize import adaln_quant, quantize


class ReferenceBackend(Backend):
    """Serves every operator on every device and never declines."""

    def __init__(self) -> None:
        super().__init__(
            "reference",
            {
                "quantize": quantize,
                "adaln_quant": adaln_quant,
                "linear": linear,
                "linear_quant": linear_quant,
                "linear_swiglu_quant": linear_swiglu_quant,
                "linear_gate_residual": linear_gate_residual,
                "qkv_append": qkv_append,
                "attention": attention,
            },
        )


__all__ = [
    "ReferenceBackend",
    "adaln_quant",
    "attention",
    "linear",
    "linear_gate_residual",
    "linear_quant",
    "linear_swiglu_quant",
    "qkv_append",
    "quantize",
]
