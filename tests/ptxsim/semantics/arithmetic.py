"""add, sub, mul, mad, fma, div, rem, neg, abs, min, max, and the integer dot products (PTX ISA, "Integer Arithmetic
Instructions", "Floating Point Instructions", "Half Precision Floating Point Instructions")."""

from __future__ import annotations

import numpy as np

from tests.ptxsim.ptx_types import DTYPE, UINT, WIDTH
from tests.ptxsim.semantics.decoder import Decoder, Execute, apply, assign, join, split, write
from tests.ptxsim.semantics.rounding import (
    bits_type,
    float_modifiers,
    float_result,
    float_source,
    is_float,
    odd_fma,
    odd_sum,
    two_sum,
)

PAIRS = {"u16x2": np.uint16, "s16x2": np.int16}


def add(op: Decoder) -> Execute:
    """add, sub, and with the condition code add.cc, addc, sub.cc, subc."""
    function = np.add if op.base in ("add", "addc") else np.subtract
    ty = op.type()
    if is_float(ty):
        return _add_float(op, function, ty)
    carry_out, saturating = op.flag("cc"), op.flag("sat")
    d, a, b = op.destination(0, ty), op.source(1, ty), op.source(2, ty)
    if saturating:
        if ty != "s32":
            raise op.unsupported()
        return assign(d, lambda: np.clip(function(a.astype(np.int64), b), -(2**31), 2**31 - 1))
    if ty in PAIRS:
        return assign(d, lambda: join(function(split(a, np.uint16), split(b, np.uint16))))
    if carry_out or op.base in ("addc", "subc"):
        return _add_carry(op, function, ty, d, a, b, bool(carry_out))
    return apply(d, function, a, b)


def _add_float(op: Decoder, function: np.ufunc, ty: str) -> Execute:
    rounding, ftz, sat = float_modifiers(op)
    op.flag("noftz")
    a, b = float_source(op, 1, ty, ftz), float_source(op, 2, ty, ftz)
    if rounding in (None, "rn"):
        if ty == "f32" and not ftz and not sat:
            return apply(op.destination(0, ty), function, a(), b())
        return float_result(op, ty, lambda: function(a(), b()), "rn", sat, ftz)
    if not ty.startswith("f32"):
        raise op.unsupported()

    def compute() -> np.ndarray:
        x, y = a().astype(np.float64), b().astype(np.float64)
        return odd_sum(x, y if function is np.add else -y)

    return float_result(op, ty, compute, rounding, sat, ftz)


def _add_carry(
    op: Decoder, function: np.ufunc, ty: str, d: np.ndarray, a: np.ndarray, b: np.ndarray, carry_out: bool
) -> Execute:
    """Extended precision with the condition code (PTX ISA, "Extended-Precision Integer Arithmetic Instructions")."""
    bits, carry, carry_in = WIDTH[ty], op.machine.carry, op.base in ("addc", "subc")
    limit = (1 << bits) - 1

    def execute(mask: np.ndarray | None) -> None:
        x, y = (op.broadcast(values).astype(object) & limit for values in (a, b))
        incoming = carry.astype(object) if carry_in else 0
        total = x + y + incoming if function is np.add else x - y - incoming
        write(d, (total & limit).astype(UINT[bits]).view(d.dtype), mask)
        if carry_out:
            write(carry, ((total >> bits) & 1).astype(np.uint64), mask)

    return execute


def multiply(op: Decoder) -> Execute:
    ty = op.type()
    if not is_float(ty):
        return _multiply_integer(op, ty, False)
    rounding, ftz, sat = float_modifiers(op)
    op.flag("noftz")
    a, b = float_source(op, 1, ty, ftz), float_source(op, 2, ty, ftz)
    if rounding in (None, "rn"):
        if ty == "f32" and not ftz and not sat:
            return apply(op.destination(0, ty), np.multiply, a(), b())
        return float_result(op, ty, lambda: a() * b(), "rn", sat, ftz)
    if not ty.startswith("f32"):
        raise op.unsupported()
    return float_result(op, ty, lambda: a().astype(np.float64) * b(), rounding, sat, ftz)


def _high_product(a: np.ndarray, b: np.ndarray, ty: str) -> np.ndarray:
    bits = WIDTH[ty]
    if bits < 64:
        wide = np.int64 if ty[0] == "s" else np.uint64
        return ((a.astype(wide) * b.astype(wide)) >> wide(bits)).astype(a.dtype)
    pairs = zip(*(values.tolist() for values in np.broadcast_arrays(a, b)), strict=True)
    return np.array([(x * y >> 64) & (2**64 - 1) for x, y in pairs], np.uint64).view(a.dtype)


def _multiply_integer(op: Decoder, ty: str, accumulate: bool) -> Execute:
    """mul and mad with .lo, .hi or .wide."""
    mode = op.flag("lo", "hi", "wide")
    a, b = op.source(1, ty), op.source(2, ty)
    out = ty[0] + str(WIDTH[ty] * 2) if mode == "wide" else ty
    d = op.destination(0, out)
    c = op.source(3, out) if accumulate else None
    if mode == "lo" and c is None:
        return apply(d, np.multiply, a, b)
    if mode == "lo":
        return assign(d, lambda: a * b + c)
    if mode == "wide":
        dtype = DTYPE[out]
        if c is None:
            return assign(d, lambda: np.multiply(a, b, dtype=dtype))
        return assign(d, lambda: np.multiply(a, b, dtype=dtype) + c)
    if mode == "hi":
        return assign(d, lambda: _high_product(a, b, ty) if c is None else _high_product(a, b, ty) + c)
    raise op.unsupported()


def multiply_add(op: Decoder) -> Execute:
    """fma, mad and, with the condition code, mad.cc and madc. Float mad is fma."""
    ty = op.type()
    if not is_float(ty):
        if op.flag("sat"):
            raise op.unsupported()
        carry_out = op.flag("cc")
        if carry_out or op.base == "madc":
            return _multiply_add_carry(op, ty, bool(carry_out))
        return _multiply_integer(op, ty, True)
    rounding, ftz, sat = float_modifiers(op)
    relu = bool(op.flag("relu"))
    op.flag("noftz")
    a, b, c = (float_source(op, index, ty, ftz) for index in (1, 2, 3))
    if ty != "f64":
        return float_result(op, ty, lambda: odd_fma(a(), b(), c()), rounding or "rn", sat, ftz, relu)
    if rounding not in (None, "rn"):
        raise op.unsupported()
    return float_result(op, ty, lambda: _fma_f64(a(), b(), c()))


def _fma_f64(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Error-compensated (Dekker's product): right except in rare halfway cases."""

    def high(values: np.ndarray) -> np.ndarray:
        scaled = values * (2.0**27 + 1)
        return scaled - (scaled - values)

    product = x * y
    x_high, y_high = high(x), high(y)
    x_low, y_low = x - x_high, y - y_high
    lost = ((x_high * y_high - product) + x_high * y_low + x_low * y_high) + x_low * y_low
    total, error = two_sum(product, z)
    result = total + (error + lost)
    return np.where(np.isfinite(result), result, product + z)


def _multiply_add_carry(op: Decoder, ty: str, carry_out: bool) -> Execute:
    high, bits = op.flag("lo", "hi") == "hi", WIDTH[ty]
    limit, carry, carry_in = (1 << bits) - 1, op.machine.carry, op.base == "madc"
    sources = [op.source(index, ty) for index in (1, 2, 3)]
    d = op.destination(0, ty)

    def execute(mask: np.ndarray | None) -> None:
        a, b, c = (op.broadcast(values).astype(object) for values in sources)
        product = a * b
        total = ((product >> bits if high else product) & limit) + (c & limit)
        if carry_in:
            total = total + carry.astype(object)
        write(d, (total & limit).astype(UINT[bits]).view(d.dtype), mask)
        if carry_out:
            write(carry, (total >> bits).astype(np.uint64), mask)

    return execute


def divide(op: Decoder) -> Execute:
    """div and rem. Integers truncate towards zero; division by zero gives all ones, as GPUs do. Float .approx and .full
    are rounded correctly here."""
    ty = op.type()
    if is_float(ty):
        op.flag("approx", "full")
        rounding, ftz, sat = float_modifiers(op)
        x, y = float_source(op, 1, ty, ftz), float_source(op, 2, ty, ftz)
        if rounding not in (None, "rn"):
            raise op.unsupported()
        return float_result(op, ty, lambda: x() / y(), "rn", sat, ftz)
    d, a, b = op.destination(0, ty), op.source(1, ty), op.source(2, ty)
    remainder = op.base == "rem"

    def compute() -> np.ndarray:
        by_zero = b == 0
        divisor = np.where(by_zero, b.dtype.type(1), b)
        if ty[0] == "s":
            magnitude = np.abs(a.astype(np.int64)).view(np.uint64) // np.abs(divisor.astype(np.int64)).view(np.uint64)
            signed = magnitude.view(np.int64)
            quotient = np.where((a < 0) != (divisor < 0), -signed, signed).astype(a.dtype)
        else:
            quotient = a // divisor
        if remainder:
            return np.where(by_zero, a, a - quotient * divisor)
        return np.where(by_zero, a.dtype.type(0) - a.dtype.type(1), quotient)

    return assign(d, compute)


def negate_or_abs(op: Decoder) -> Execute:
    """neg and abs; of floats a change of the sign bit, also of a NaN."""
    negate, ty = op.base == "neg", op.type()
    if not is_float(ty):
        d, a = op.destination(0, ty), op.source(1, ty)
        return assign(d, (lambda: np.negative(a)) if negate else (lambda: np.abs(a)))
    ftz = bool(op.flag("ftz"))
    if ty == "f32x2":
        raise op.unsupported()
    if ftz and ty == "f32":
        values = float_source(op, 1, ty, ftz)
        return float_result(op, ty, (lambda: -values()) if negate else (lambda: np.abs(values())))
    untyped = bits_type(ty)
    d, a, dtype = op.destination(0, untyped), op.source(1, untyped), DTYPE[untyped]
    sign = dtype(0x80008000) if ty.endswith("x2") else dtype(1 << WIDTH[ty] - 1)
    return assign(d, (lambda: a ^ sign) if negate else (lambda: a & ~sign))


def min_or_max(op: Decoder) -> Execute:
    """min and max. Of floats, a NaN loses unless .NaN is given, and -0 is less than +0 (PTX ISA, "max")."""
    ty, greatest = op.type(), op.base == "max"
    integer_function = np.maximum if greatest else np.minimum
    if is_float(ty):
        return _min_or_max_float(op, ty, greatest)
    relu = op.flag("relu")
    if ty in PAIRS:
        dtype = PAIRS[ty]
        d, a, b = op.destination(0, "b32"), op.source(1, "b32"), op.source(2, "b32")

        def compute() -> np.ndarray:
            best = integer_function(split(a, dtype), split(b, dtype))
            return join(np.maximum(best, 0) if relu else best)

        return assign(d, compute)
    d, a, b = op.destination(0, ty), op.source(1, ty), op.source(2, ty)
    if relu:
        return assign(d, lambda: np.maximum(integer_function(a, b), 0))
    return apply(d, integer_function, a, b)


def _min_or_max_float(op: Decoder, ty: str, greatest: bool) -> Execute:
    ftz, propagate = bool(op.flag("ftz")), op.flag("NaN")
    sources = [float_source(op, index, ty, ftz) for index in range(1, len(op.operands))]
    if propagate:
        function = np.maximum if greatest else np.minimum
    else:
        function = np.fmax if greatest else np.fmin

    def compute() -> np.ndarray:
        best = sources[0]()
        for source in sources[1:]:
            x, y = best, source()
            best = function(x, y)
            zeros = (x == 0) & (y == 0)
            if zeros.any():
                best = np.where(zeros, x + y if greatest else -((-x) - y), best).astype(best.dtype)
        return best

    return float_result(op, ty, compute, "rn", False, ftz)


def dot_product(op: Decoder) -> Execute:
    """dp4a: four bytes by four bytes; dp2a: two halves by the low or high two bytes; added to c."""
    type_b, type_a = op.type(), op.type()
    half = op.flag("lo", "hi")
    out = "s32" if "s" in type_a + type_b else "u32"
    d, a, b, c = op.destination(0, out), op.source(1, "b32"), op.source(2, "b32"), op.source(3, out)
    byte = {"s": np.int8, "u": np.uint8}
    left = byte[type_a[0]] if op.base == "dp4a" else {"s": np.int16, "u": np.uint16}[type_a[0]]

    def compute() -> np.ndarray:
        x, y = split(a, left).astype(np.int64), split(b, byte[type_b[0]]).astype(np.int64)
        if op.base == "dp2a":
            y = y[:, 2:] if half == "hi" else y[:, :2]
        return ((x * y).sum(1) + c).astype(np.uint64).astype(np.uint32).view(DTYPE[out])

    return assign(d, compute)


def absolute_difference(op: Decoder) -> Execute:
    """sad: c + |a - b|"""
    ty = op.type()
    a, b, c = (op.source(index, ty) for index in (1, 2, 3))
    return assign(op.destination(0, ty), lambda: c + np.where(a < b, b - a, a - b))


HANDLERS = {
    **dict.fromkeys(("add", "sub", "addc", "subc"), add),
    **dict.fromkeys(("fma", "mad", "madc"), multiply_add),
    **dict.fromkeys(("div", "rem"), divide),
    **dict.fromkeys(("neg", "abs"), negate_or_abs),
    **dict.fromkeys(("min", "max"), min_or_max),
    **dict.fromkeys(("dp4a", "dp2a"), dot_product),
    "mul": multiply,
    "sad": absolute_difference,
}
