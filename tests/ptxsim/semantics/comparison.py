"""setp, set, selp, slct (PTX ISA, "Comparison and Selection Instructions")."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.ptxsim.ptx_types import DTYPE, WIDTH
from tests.ptxsim.semantics.decoder import Decoder, Execute, apply, assign, write
from tests.ptxsim.semantics.rounding import float_source, is_float
from tests.ptxsim.syntax import Immediate

FUNCTIONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
UNORDERED = ("equ", "neu", "ltu", "leu", "gtu", "geu")
COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _either_nan(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.isnan(a) | np.isnan(b)


def _float_comparison(name: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """With a NaN the plain comparisons are false and the unordered ones (-u) true."""
    if name == "num":
        return lambda a, b: ~_either_nan(a, b)
    if name == "nan":
        return _either_nan
    if name == "ne":
        return lambda a, b: (a != b) & ~_either_nan(a, b)
    if name in UNORDERED:
        function = FUNCTIONS[name[:-1]]
        return lambda a, b: function(a, b) | _either_nan(a, b)
    return FUNCTIONS[name]


def compare(op: Decoder) -> Execute:
    """setp (predicates, also p|q) and set (numbers), optionally combined with another predicate."""
    name = op.flag(*FUNCTIONS, *UNORDERED, "num", "nan")
    combine, ftz = COMBINE.get(op.flag(*COMBINE) or ""), bool(op.flag("ftz"))
    ty = op.type()
    out = op.type() if op.base == "set" else None
    other = op.predicate(3) if combine else None
    if is_float(ty):
        function = _float_comparison(name)
        a, b = float_source(op, 1, ty, ftz), float_source(op, 2, ty, ftz)
    else:
        function, x, y = FUNCTIONS[name], op.source(1, ty), op.source(2, ty)
        if op.base == "setp" and combine is None:
            p, q = op.destinations("pred")
            if q is None:
                return apply(p, function, x, y)
        a, b = (lambda: x), (lambda: y)
    packed = ty.endswith("x2") and is_float(ty)

    def combined(result: np.ndarray) -> np.ndarray:
        if other is None:
            return result
        return combine(result, other()[:, None] if packed else other())

    if out is not None:
        return _set(op, out, ty, packed, lambda: combined(function(a(), b())))
    p, q = op.destinations("pred")

    def execute(mask: np.ndarray | None) -> None:
        result = function(a(), b())
        if packed:  # p of the low half, q of the high half
            result = combined(result)
            first, second = result[:, 0], result[:, 1]
        else:
            first, second = combined(result), combined(~result) if q is not None else None
        write(p, first, mask)
        if q is not None:
            write(q, second, mask)

    return execute


def _set(op: Decoder, out: str, ty: str, packed: bool, compute: Callable[[], np.ndarray]) -> Execute:
    """True is 1.0 of a float type and all ones of an integer type."""
    if packed:
        one = np.uint16({"f16x2": 0x3C00, "bf16x2": 0x3F80}.get(out, 0xFFFF))

        def halves() -> np.ndarray:
            chosen = np.where(compute(), one, np.uint16(0))
            return np.ascontiguousarray(chosen).view(np.uint32)[:, 0]

        return assign(op.destination(0, "b32"), halves)
    d, dtype = op.destination(0, out), DTYPE[out]
    if out in ("f32", "f16"):
        return assign(d, lambda: compute().astype(dtype))
    return assign(d, lambda: np.where(compute(), ~dtype(0), dtype(0)))


def select(op: Decoder) -> Execute:
    """selp: a where p holds, else b; floats as bits, so that a NaN keeps its payload."""
    ty = op.type()
    ty = f"b{WIDTH[ty]}" if is_float(ty) else ty
    a, b, d = op.source(1, ty), op.source(2, ty), op.destination(0, ty)
    if isinstance(op.operands[3], Immediate):
        return assign(d, lambda: a if op.operands[3].value else b)
    p = op.predicate(3)
    return assign(d, lambda: np.where(p(), a, b))


def select_by_sign(op: Decoder) -> Execute:
    """slct: a where c >= 0, else b."""
    type_c, ty = op.type(), op.type()
    op.flag("ftz")
    a, b, c = op.source(1, ty), op.source(2, ty), op.source(3, type_c)
    return assign(op.destination(0, ty), lambda: np.where(c >= 0, a, b))


HANDLERS = {"setp": compare, "set": compare, "selp": select, "slct": select_by_sign}
