"""rcp, sqrt, rsqrt, sin, cos, lg2, ex2, tanh, copysign, testp.

The .approx forms are correctly rounded here; hardware is within the error that the PTX ISA states for each of them.
"""

from __future__ import annotations

import numpy as np

from tests.ptxsim.ptx_types import DTYPE
from tests.ptxsim.semantics.decoder import Decoder, Execute, assign
from tests.ptxsim.semantics.rounding import float_modifiers, float_result, float_source

FUNCTIONS = {
    "rcp": lambda x: 1.0 / x,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "sin": np.sin,
    "cos": np.cos,
    "lg2": np.log2,
    "ex2": np.exp2,
    "tanh": np.tanh,
}


def elementary(op: Decoder) -> Execute:
    """One of FUNCTIONS, in float64 and rounded once."""
    ty = op.type()
    op.flag("approx")
    rounding, ftz, sat = float_modifiers(op)
    if rounding not in (None, "rn"):
        raise op.unsupported()
    x, function = float_source(op, 1, ty, ftz), FUNCTIONS[op.base]
    return float_result(op, ty, lambda: function(x().astype(np.float64)), "rn", sat, ftz)


def copysign(op: Decoder) -> Execute:
    """The sign of a with the magnitude of b."""
    ty = op.type()
    a, b = op.source(1, ty), op.source(2, ty)
    return assign(op.destination(0, ty), lambda: np.copysign(b, a))


def number_property(op: Decoder) -> Execute:
    """testp: what kind of number a value is."""
    kind, ty = op.flag("finite", "infinite", "number", "notanumber", "normal", "subnormal"), op.type()
    a, smallest = op.source(1, ty), np.finfo(DTYPE[ty]).tiny
    test = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda v: ~np.isnan(v),
        "notanumber": np.isnan,
        "normal": lambda v: np.isfinite(v) & (np.abs(v) >= smallest),
        "subnormal": lambda v: (v != 0) & (np.abs(v) < smallest),
    }[kind]
    return assign(op.destination(0, "pred"), lambda: test(a))


HANDLERS = {**dict.fromkeys(FUNCTIONS, elementary), "copysign": copysign, "testp": number_property}
