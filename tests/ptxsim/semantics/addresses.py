"""Address operands, state spaces and the modifiers of memory instructions."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.ptxsim.errors import ExecError, PTXError
from tests.ptxsim.ptx_types import DTYPE, LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, WIDTH
from tests.ptxsim.semantics.decoder import Decoder, Values
from tests.ptxsim.syntax import Address, Immediate, Symbol, Vector

SPACES = ("global", "shared", "local", "const", "param")
# Hints and orders change no value here: there are no caches, and memory is sequentially consistent.
CACHE = (
    *("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "unified"),
    *(f"L1::{hint}" for hint in ("evict_normal", "evict_unchanged", "evict_first", "evict_last", "no_allocate")),
    *(f"L2::{hint}" for hint in ("64B", "128B", "256B", "cache_hint", "evict_last", "evict_normal", "evict_first")),
)
ORDER = ("weak", "relaxed", "acquire", "release", "acq_rel", "volatile", "mmio")
SCOPE = ("cta", "gpu", "sys", "cluster")


def take_space(op: Decoder) -> str:
    """Take hints, order, scope and space; the space, or generic."""
    op.flags(*CACHE, *ORDER, *SCOPE)
    space = "generic"
    for modifier in list(op.modifiers):
        if modifier == "shared::cluster":
            raise op.unsupported()
        if modifier.split("::")[0] in SPACES:
            op.flag(modifier)
            space = modifier.split("::")[0]
    return space


def vector_length(op: Decoder) -> int:
    """Take .v2, .v4 or .v8."""
    vector = op.flag("v2", "v4", "v8")
    return int(vector[1]) if vector else 1


def vector_items(operand: Any, count: int) -> list[Any]:
    if count == 1:
        return operand.items if isinstance(operand, Vector) and len(operand.items) == 1 else [operand]
    if not isinstance(operand, Vector) or len(operand.items) != count:
        raise PTXError(f"vector operand of {count} elements expected")
    return operand.items


def items(operand: Any) -> list[Any]:
    """Of a vector or a single register."""
    return operand.items if isinstance(operand, Vector) else [operand]


def address(op: Decoder, operand: Any, space: str) -> Values:
    """Callable giving the addresses, one or one per thread."""
    if not isinstance(operand, Address):
        raise PTXError("address operand expected")
    base = operand.base
    if isinstance(base, (Symbol, Immediate)):
        value = base.value if isinstance(base, Immediate) else 0
        if isinstance(base, Symbol):
            home, value = op.machine.symbol(base)
            value += base.offset
            if space == "generic":
                value += {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "kparam": PARAM_WINDOW}.get(home, 0)
        constant = np.array([value + operand.offset], np.uint64)
        return lambda: constant
    bits = WIDTH[base.ty]
    ty = f"u{bits}"
    values, offset = op.machine.source(base, ty), DTYPE[ty](operand.offset & ((1 << bits) - 1))
    return (lambda: values) if operand.offset == 0 else (lambda: values + offset)


def resolve_param(op: Decoder, operand: Any, space: str) -> str:
    """.param is the parameter block of a kernel, and local memory for variables of call sequences."""
    if space != "param":
        return space
    return op.machine.symbol(operand.base)[0] if isinstance(operand.base, Symbol) else "kparam"


def whole_warps(op: Decoder, mask: np.ndarray | None) -> np.ndarray:
    """Indices of the active warps; every lane of each must take part."""
    if mask is None:
        return np.arange(op.machine.warps)
    lanes = mask.reshape(-1, 32)
    active = lanes.any(1)
    torn = np.flatnonzero(active & ~lanes.all(1))
    if len(torn):
        message = ".aligned instruction executed by only a part of the lanes of a warp"
        op.machine.fault(op.instruction, int(torn[0]) * 32, message, ExecError)
    return np.flatnonzero(active)
