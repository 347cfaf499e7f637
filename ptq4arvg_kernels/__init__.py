"""Low-bit operators for autoregressive image generators: everything that runs once per token.

Importing registers the operators ``torch.ops.ptq4arvg.*`` and the built-in backends. See :mod:`.ops` for the operators,
:mod:`.packing` for the storage formats, :mod:`.tables` for position tables and :mod:`.registry` for backend selection.
"""

from .ops import (
    OPERATORS,
    adaln_quant,
    attention,
    linear,
    linear_gate_residual,
    linear_quant,
    linear_swiglu_quant,
    qkv_append,
    quantize,
)
from .registry import BackendError, OpSpec, backends, doctor, explain, set_strict, use_backend

__all__ = [
    "OPERATORS",
    "BackendError",
    "OpSpec",
    "adaln_quant",
    "attention",
    "backends",
    "doctor",
    "explain",
    "linear",
    "linear_gate_residual",
    "linear_quant",
    "linear_swiglu_quant",
    "qkv_append",
    "quantize",
    "set_strict",
    "use_backend",
]
