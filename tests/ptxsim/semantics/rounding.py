"""Floating-point operands and results with one correct rounding.

PTX ISA, "Rounding Modifiers": .rn to nearest even, .rz towards zero, .rm down, .rp up. Results are computed in float64,
exactly or rounded to odd, so that the rounding to the type of the result is the only one.
"""

from __future__ import annotations

import numpy as np

from tests.ptxsim.errors import UnsupportedInstruction
from tests.ptxsim.ptx_types import DTYPE, FLOATS
from tests.ptxsim.semantics.decoder import Decoder, Execute, Values, assign, join, split

ROUNDINGS = ("rn", "rz", "rm", "rp")
SMALLEST_NORMAL = np.float32(2.0**-126)


# ------------------------------------------------------------------------------------ exact sums
def two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rounded sum and its exact error (Knuth, The Art of Computer Programming 2, 4.2.2)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def to_odd(rounded: np.ndarray, error: np.ndarray) -> np.ndarray:
    """float64 rounded to nearest plus its error, to rounded-to-odd: any later rounding to 51 bits or fewer is correct
    (Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums", 2008)."""
    bits = np.atleast_1d(np.asarray(rounded)).view(np.int64).copy()
    error = np.atleast_1d(error)
    inexact = (error != 0) & ((bits & 1) == 0) & np.isfinite(np.atleast_1d(rounded))
    if inexact.any():
        away = np.where(bits << 1 == 0, True, (error > 0) == (bits >= 0))
        bits = np.where(inexact, np.where(away, bits + 1, bits - 1), bits)
    return bits.view(np.float64).reshape(np.shape(rounded))


def odd_sum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b of float64, rounded to odd."""
    total, error = two_sum(a, b)
    return to_odd(total, np.where(np.isfinite(total), error, 0.0))


def odd_fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a*b + c rounded to odd; a and b have at most 24 significant bits, so that their product is exact in float64."""
    return odd_sum(a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64))


# ------------------------------------------------------------------------------------ roundings
def _directed(rounded: np.ndarray, exact: np.ndarray, mode: str | None) -> np.ndarray:
    """From nearest to another rounding: one step back where nearest went the wrong way."""
    if mode in (None, "rn"):
        return rounded
    wide, one = rounded.astype(np.float64), rounded.dtype.type
    if mode == "rz":
        return np.where(np.abs(wide) > np.abs(exact), np.nextafter(rounded, one(0)), rounded)
    if mode == "rm":
        return np.where(wide > exact, np.nextafter(rounded, one(-np.inf)), rounded)
    return np.where(wide < exact, np.nextafter(rounded, one(np.inf)), rounded)


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(values: np.ndarray, mode: str | None = "rn") -> np.ndarray:
    """Bits of the nearest (or truncated) bf16; NaN becomes the canonical 0x7fff."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    if mode in (None, "rn"):
        bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    elif mode != "rz":
        raise UnsupportedInstruction(f"bf16 rounding .{mode}")
    return np.where(np.isnan(values), np.uint16(0x7FFF), (bits >> np.uint32(16)).astype(np.uint16))


def to_bf16(values: np.ndarray, mode: str | None) -> np.ndarray:
    """Bits of bf16 from float32 or float64, through a float32 rounded to odd."""
    if values.dtype == np.float64:
        single = values.astype(np.float32)
        error = values - single.astype(np.float64)
        bits = single.view(np.int32).copy()
        inexact = (error != 0) & ((bits & 1) == 0) & np.isfinite(single)
        values = np.where(inexact, np.where((error > 0) == (bits >= 0), bits + 1, bits - 1), bits).view(np.float32)
    return f32_to_bf16(values, mode)


def _flushed(values: np.ndarray, ftz: bool) -> np.ndarray:
    """.ftz: float32 subnormals become zeros of the same sign."""
    if not ftz:
        return values
    tiny = np.abs(values) < SMALLEST_NORMAL
    return np.where(tiny, np.copysign(np.float32(0), values), values) if tiny.any() else values


def saturate(values: np.ndarray) -> np.ndarray:
    """.sat: to [0, 1], NaN to +0."""
    return np.where(np.isnan(values), 0, np.clip(values, 0, 1)).astype(values.dtype)


# ------------------------------------------------------------------------------------ operands
def float_modifiers(op: Decoder) -> tuple[str | None, bool, bool]:
    """Rounding, .ftz, .sat"""
    return op.flag(*ROUNDINGS), bool(op.flag("ftz")), bool(op.flag("sat"))


def float_source(op: Decoder, index: int, ty: str, ftz: bool = False) -> Values:
    """Callable giving an operand as float32 (halves too) or float64; packed types get a last axis of 2, low part
    first."""
    if ty == "f32x2":
        pairs = op.source(index, "b64")
        return lambda: _flushed(np.ascontiguousarray(pairs).view(np.float32).reshape(-1, 2), ftz)
    if ty in ("f16x2", "bf16x2"):
        packed = op.source(index, "b32")
        if ty == "f16x2":
            return lambda: split(packed, np.float16).astype(np.float32)
        return lambda: bf16_to_f32(split(packed, np.uint16))
    values = op.source(index, ty)
    if ty == "f32":
        return lambda: _flushed(values, ftz)
    if ty == "f64":
        return lambda: values
    if ty == "f16":
        return lambda: values.astype(np.float32)
    if ty == "bf16":
        return lambda: bf16_to_f32(values)
    raise op.unsupported(f": float type .{ty}")


def float_result(
    op: Decoder,
    ty: str,
    compute: Values,
    rounding: str | None = "rn",
    sat: bool = False,
    ftz: bool = False,
    relu: bool = False,
) -> Execute:
    """Write compute() to the first operand as type ty. compute() is exact enough for one rounding."""

    def convert() -> np.ndarray:
        values = compute()
        if sat:
            values = saturate(values)
        if relu:
            values = np.where(np.isnan(values), values, np.maximum(values, 0)).astype(values.dtype)
        if ty == "f64":
            return values
        if ty in ("f32", "f32x2"):
            if values.dtype != np.float32:
                values = _directed(values.astype(np.float32), values, rounding)
            values = _flushed(values, ftz)
            return values if ty == "f32" else np.ascontiguousarray(values).view(np.uint64)[..., 0]
        if ty.startswith("bf16"):
            halves = to_bf16(values, rounding)
        else:
            halves = _directed(values.astype(np.float16), values, rounding)
        return join(halves) if ty.endswith("x2") else halves

    return assign(op.destination(0, bits_type(ty) if ty.endswith("x2") else ty), convert)


def is_float(ty: str) -> bool:
    return ty in FLOATS


def bits_type(ty: str) -> str:
    """The untyped bits of a type."""
    return f"b{8 * np.dtype(DTYPE[ty]).itemsize}"
