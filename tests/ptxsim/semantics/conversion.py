"""mov, cvt, cvta, isspacep (PTX ISA, "Data Movement and Conversion Instructions")."""

from __future__ import annotations

import numpy as np

from tests.ptxsim.ptx_types import (
    DTYPE,
    GLOBAL_BASE,
    LOCAL_WINDOW,
    PARAM_WINDOW,
    SHARED_WINDOW,
    UINT,
    WIDTH,
    WINDOW_BYTES,
    int_range,
)
from tests.ptxsim.semantics.decoder import Decoder, Execute, assign, write
from tests.ptxsim.semantics.rounding import float_result, float_source, is_float, to_odd
from tests.ptxsim.syntax import Sink, Vector

WINDOWS = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}
TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
PACKED_HALVES = ("f16x2", "bf16x2")
FP8 = ("e4m3x2", "e5m2x2", "e4m3", "e5m2")


def move(op: Decoder) -> Execute:
    """mov, also between a register and a vector of its parts."""
    ty, source = op.type(), op.operands[1]
    if isinstance(op.operands[0], Vector):
        return _unpack(op, ty, op.operands[0])
    if isinstance(source, Vector):
        return _pack(op, ty, source)
    if ty == "pred":
        p = op.predicate(1)
        return assign(op.destination(0, ty), p)
    if is_float(ty):
        a, d = op.source(1, ty).view(UINT[WIDTH[ty]]), op.destination(0, f"b{WIDTH[ty]}")
    else:
        a, d = op.source(1, ty), op.destination(0, ty)
    return assign(d, lambda: a)


def _unpack(op: Decoder, ty: str, vector: Vector) -> Execute:
    bits, machine = WIDTH[ty] // len(vector.items), op.machine
    a = op.source(1, ty)
    parts = [
        (i, machine.destination(item, f"b{bits}")) for i, item in enumerate(vector.items) if not isinstance(item, Sink)
    ]

    def execute(mask: np.ndarray | None) -> None:
        # A copy: a part may be the register itself.
        values = np.ascontiguousarray(op.broadcast(a)).view(UINT[bits]).reshape(machine.threads, -1).copy()
        for i, part in parts:
            write(part, values[:, i], mask)

    return execute


def _pack(op: Decoder, ty: str, vector: Vector) -> Execute:
    bits, dtype = WIDTH[ty] // len(vector.items), UINT[WIDTH[ty]]
    parts = [op.machine.source(item, f"b{bits}") for item in vector.items]

    def compute() -> np.ndarray:
        result = np.zeros(op.machine.threads, dtype)
        for i, part in enumerate(parts):
            result |= part.astype(dtype) << dtype(bits * i)
        return result

    return assign(op.destination(0, f"b{WIDTH[ty]}"), compute)


def convert_address(op: Decoder) -> Execute:
    """cvta: between generic addresses and those of a space."""
    to = op.flag("to")
    name = next((m for m in op.modifiers if m.split("::")[0] in (*WINDOWS, "global", "const")), None)
    if name is None:
        raise op.unsupported(": a state space is missing")
    op.flag(name)
    ty = op.type()
    base = DTYPE[ty](WINDOWS.get(name.split("::")[0], 0))
    d, a = op.destination(0, ty), op.source(1, ty)
    return assign(d, (lambda: a - base) if to else (lambda: a + base))


def is_in_space(op: Decoder) -> Execute:
    """isspacep"""
    space = op.modifiers.pop(0).split("::")[0]
    a, d = op.source(1, "u64"), op.destination(0, "pred")
    if space in WINDOWS:
        base = WINDOWS[space]
        return assign(d, lambda: (a >= base) & (a < base + WINDOW_BYTES))
    return assign(d, lambda: a >= np.uint64(GLOBAL_BASE))


# ------------------------------------------------------------------------------------ cvt
def convert(op: Decoder) -> Execute:
    """cvt. Modifiers in the order of the ISA: rounding, .ftz, .sat, destination type, source type."""
    if op.flag("pack"):
        return _convert_pack(op)
    if set(FP8) & set(op.modifiers):
        raise op.unsupported(" (fp8)")
    source = op.type()
    target = op.type()
    to_integer, rounding = op.flag(*TO_INTEGER), op.flag("rn", "rz", "rm", "rp", "rna")
    ftz, sat, relu = (bool(op.flag(name)) for name in ("ftz", "sat", "relu"))
    finite = bool(op.flag("satfinite"))
    if target in PACKED_HALVES and source == "f32":
        return _two_halves(op, target, rounding, sat, relu, finite)
    if finite:
        raise op.unsupported()
    if target == "tf32":
        return _to_tf32(op, rounding)
    if is_float(source) and is_float(target):
        x = float_source(op, 1, source, ftz)
        if to_integer:  # an integer value in a float type
            return float_result(op, target, lambda: TO_INTEGER[to_integer](x()), "rn", sat, ftz)
        if target == "f64":
            return float_result(op, target, lambda: x().astype(np.float64), "rn", sat, ftz, relu)
        return float_result(op, target, x, rounding or "rn", sat, ftz, relu)
    if is_float(source):
        if not to_integer:
            raise op.unsupported(" (float to integer needs .rni, .rzi, .rmi or .rpi)")
        return _float_to_integer(op, target, source, to_integer, ftz)
    if is_float(target):
        return _integer_to_float(op, target, source, rounding, sat)
    return _integer_to_integer(op, target, source, sat)


def _two_halves(op: Decoder, target: str, rounding: str | None, sat: bool, relu: bool, finite: bool) -> Execute:
    """d = {upper half: a, lower half: b}"""
    upper, lower = float_source(op, 1, "f32"), float_source(op, 2, "f32")
    if finite and target != "f16x2":
        raise op.unsupported()

    def compute() -> np.ndarray:
        values = np.stack(np.broadcast_arrays(lower(), upper()), -1)
        if finite:
            values = np.where(np.isnan(values), values, np.clip(values, -65504, 65504)).astype(np.float32)
        return values

    return float_result(op, target, compute, rounding, sat, False, relu)


def _to_tf32(op: Decoder, rounding: str | None) -> Execute:
    """The upper 19 bits: .rna rounds ties away from zero, .rn to even."""
    a, kept = op.source(1, "b32"), np.uint32(0xFFFFE000)
    d = op.destination(0, "b32")
    if rounding == "rna":
        return assign(d, lambda: (a + np.uint32(0x1000)) & kept)
    return assign(d, lambda: (a + np.uint32(0xFFF) + ((a >> np.uint32(13)) & np.uint32(1))) & kept)


def _float_to_integer(op: Decoder, target: str, source: str, rounding: str, ftz: bool) -> Execute:
    """Saturates, as the ISA demands of every float-to-integer cvt. NaN gives 0 below 64 bits and 0x8000... of 64 bits
    and of f64 sources."""
    x, d = float_source(op, 1, source, ftz), op.destination(0, target)
    bits, dtype = WIDTH[target], DTYPE[target]
    least, greatest = int_range(target)
    not_a_number = 1 << bits - 1 if source == "f64" or bits == 64 else 0
    if target[0] == "s" and not_a_number:
        not_a_number -= 1 << bits

    def compute() -> np.ndarray:
        values = x().astype(np.float64)
        nan = np.isnan(values)
        rounded = TO_INTEGER[rounding](np.where(nan, 0, values))
        if bits < 64:
            result = np.clip(rounded, least, greatest).astype(np.int64)
        elif target[0] == "s":
            result = np.clip(rounded, -(2.0**63), 2.0**63 - 1024).astype(np.int64)
            result = np.where(rounded >= 2.0**63, np.int64(greatest), result)
        else:
            result = np.clip(rounded, 0, 2.0**64 - 2048).astype(np.uint64)
            result = np.where(rounded >= 2.0**64, np.uint64(greatest), result)
        return (
            np.where(nan, result.dtype.type(not_a_number), result).astype(dtype) if nan.any() else result.astype(dtype)
        )

    return assign(d, compute)


def _integer_to_float(op: Decoder, target: str, source: str, rounding: str | None, sat: bool) -> Execute:
    a = op.source(1, source)
    nearest_single = target == "f32" and rounding in (None, "rn")

    def compute() -> np.ndarray:
        if target == "f64":
            return a.astype(np.float64)
        if nearest_single:
            return a.astype(np.float32)
        if WIDTH[source] < 64:
            return a.astype(np.float64)
        nearest = a.astype(np.float64)
        error = a.astype(object) - np.array([int(value) for value in nearest], object)
        return to_odd(nearest, error.astype(np.float64))

    return float_result(op, target, compute, rounding or "rn", sat)


def _integer_to_integer(op: Decoder, target: str, source: str, sat: bool) -> Execute:
    a, d, dtype = op.source(1, source), op.destination(0, target), DTYPE[target]
    if not sat:
        return assign(d, lambda: a.astype(dtype))
    least, greatest = int_range(target)
    if source == "u64":
        return assign(d, lambda: np.minimum(a, np.uint64(greatest)).astype(dtype))
    if target == "u64":
        return assign(d, lambda: np.maximum(a, 0).astype(dtype))
    return assign(d, lambda: np.clip(a.astype(np.int64), least, greatest).astype(dtype))


def _convert_pack(op: Decoder) -> Execute:
    """cvt.pack.sat: two integers, saturated, below c shifted up."""
    op.flag("sat")
    has_c = bool(op.modifiers) and op.modifiers[-1] == "b32"
    if has_c:
        op.type()
    source, target = op.type(), op.modifiers.pop()
    bits = int(target[1:])
    if (bits < 16) != has_c or source != "s32":
        raise op.unsupported()
    least, greatest = int_range(target)
    a, b = op.source(1, source), op.source(2, source)
    c = op.source(3, "b32") if has_c else None

    def field(values: np.ndarray) -> np.ndarray:
        return (np.clip(values.astype(np.int64), least, greatest) & ((1 << bits) - 1)).astype(np.uint32)

    def compute() -> np.ndarray:
        pair = (field(a) << np.uint32(bits)) | field(b)
        return pair if c is None else pair | (c << np.uint32(2 * bits))

    return assign(op.destination(0, "b32"), compute)


HANDLERS = {"mov": move, "cvta": convert_address, "isspacep": is_in_space, "cvt": convert}
