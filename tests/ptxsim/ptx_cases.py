"""One instruction on many values, against Python integers and fractions: nothing of the emulator's own arithmetic.

Register names in the PTX of the tests: p predicates, h 16 bits, r 32 bits, d 64 bits, f floats.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from tests.ptxsim import load_ptx

HEADER = ".version 8.0\n.target sm_90\n.address_size 64\n"
REGISTERS = " .reg .pred p<16>; .reg .b16 h<16>; .reg .b32 r<64>; .reg .b64 d<32>; .reg .f32 f<16>;\n"
LETTER = {8: "h", 16: "h", 32: "r", 64: "d"}
INPUT = {
    "h": " cvt.u16.u64 h{}, d23;\n",
    "r": " cvt.u32.u64 r{}, d23;\n",
    "d": " mov.b64 d{}, d23;\n",
    "p": " setp.ne.u64 p{}, d23, 0;\n",
}
OUTPUT = {
    "h": " cvt.u64.u16 d23, {};",
    "r": " cvt.u64.u32 d23, {};",
    "d": " mov.b64 d23, {};",
    "p": " selp.u64 d23, 1, 0, {};",
}
Inputs = Sequence[tuple[str, Sequence[int]]]


def kernel(body: str, declarations: str = "") -> str:
    """PTX of a kernel k(pin, pout)."""
    parameters = ".param .u64 pin, .param .u64 pout"
    return f"{HEADER}{declarations}.visible .entry k({parameters}) {{\n{REGISTERS}{body}\n ret;\n}}\n"


def run(instructions: str, inputs: Inputs, output: str) -> list[int]:
    """Values of register ``output`` of each thread. ``inputs``: register letter and the value for every thread; the
    first is in h0, r0, d0 or p0, the second in h1 ..."""
    count = len(inputs[0][1])
    threads = -(-count // 32) * 32
    assert threads <= 1024
    data = np.zeros((len(inputs), threads), np.uint64)
    body = (
        " ld.param.u64 d20, [pin]; ld.param.u64 d21, [pout]; mov.u32 r60, %tid.x; mul.wide.u32 d22, r60, 8;\n"
        " add.s64 d20, d20, d22; add.s64 d21, d21, d22;\n"
    )
    for i, (letter, values) in enumerate(inputs):
        data[i, :count] = [value & (2**64 - 1) for value in values]
        body += f" ld.global.u64 d23, [d20+{i * threads * 8}];\n" + INPUT[letter].format(i)
    body += instructions + "\n" + OUTPUT[output[0]].format(output) + "\n st.global.u64 [d21], d23;"
    out = np.zeros(threads, np.uint64)
    load_ptx(kernel(body)).launch("k", 1, threads, [data, out])
    return out[:count].tolist()


def check(
    instructions: str,
    inputs: Inputs,
    output: str,
    expected: Callable[..., Any],
    same: Callable[[int, Any], bool] = lambda got, want: got == want,
) -> None:
    """Compare with ``expected`` of the input values of each thread."""
    for got, *values in zip(run(instructions, inputs, output), *(values for _, values in inputs), strict=True):
        want = expected(*values)
        assert same(got, want), f"{instructions} of {[hex(v) for v in values]}: got {got:#x}, expected {want!r}"


# ------------------------------------------------------------------------------------ integers
def signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def unsigned(value: int, bits: int) -> int:
    return value & ((1 << bits) - 1)


def view_as(ty: str) -> Callable[[int], int]:
    """The value of bits as s32, u16, ..."""
    bits = int(ty[1:])
    return (lambda value: signed(value, bits)) if ty[0] == "s" else (lambda value: unsigned(value, bits))


def limits(ty: str) -> tuple[int, int]:
    bits = int(ty[1:])
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if ty[0] == "s" else (0, (1 << bits) - 1)


def clamp(value: int, ty: str) -> int:
    least, greatest = limits(ty)
    return max(least, min(greatest, value))


def divide(a: int, b: int) -> int:
    """Towards zero."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def integers(rng: random.Random, bits: int, count: int = 200) -> list[int]:
    """Random, with many short ones and edges."""
    top = 1 << bits
    edges = [0, 1, 2, 3, top - 1, top - 2, top // 2, top // 2 - 1, top // 2 + 1]
    return [
        rng.choice(edges) if rng.random() < 0.3 else rng.getrandbits(rng.choice([4, bits // 2, bits]))
        for _ in range(count)
    ]


def flags(rng: random.Random, count: int = 200) -> list[int]:
    return [rng.getrandbits(1) for _ in range(count)]


# ------------------------------------------------------------------------------------ floats
NAN = "nan"


@dataclasses.dataclass(frozen=True)
class Format:
    """A binary floating-point format, its numbers as fractions, infinities and NaN as Python floats."""

    precision: int  # bits of the significand with its leading one
    exponent_bits: int

    @property
    def bits(self) -> int:
        return self.precision + self.exponent_bits

    @property
    def max_exponent(self) -> int:
        """Values are below 2 to this."""
        return 1 << self.exponent_bits - 1

    @property
    def min_exponent(self) -> int:
        """Of the last bit of subnormals."""
        return 3 - self.max_exponent - self.precision

    @property
    def infinity(self) -> int:
        return ((1 << self.exponent_bits) - 1) << self.precision - 1

    @property
    def sign(self) -> int:
        return 1 << self.bits - 1

    def decode(self, code: int) -> Fraction | float:
        exponent = code >> self.precision - 1 & ((1 << self.exponent_bits) - 1)
        fraction = code & ((1 << self.precision - 1) - 1)
        negative = bool(code & self.sign)
        if exponent == (1 << self.exponent_bits) - 1:
            return math.nan if fraction else (-math.inf if negative else math.inf)
        digits = fraction if exponent == 0 else fraction | 1 << self.precision - 1
        value = digits * Fraction(2) ** (self.min_exponent + max(exponent - 1, 0))
        return -value if negative else value

    def is_nan(self, code: int) -> bool:
        value = self.decode(code)
        return isinstance(value, float) and math.isnan(value)

    def encode(self, value: Fraction | float, mode: str = "rn") -> int | str:
        """Nearest code under a rounding mode, NAN for a NaN; zeros come out positive."""
        if isinstance(value, float):
            if math.isnan(value):
                return NAN
            if math.isinf(value):
                return self.infinity | (self.sign if value < 0 else 0)
            value = Fraction(value)
        if value == 0:
            return 0
        negative, magnitude = value < 0, abs(value)
        exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length() - self.precision - 1
        exponent = max(self.min_exponent, exponent)
        while magnitude / Fraction(2) ** exponent >= 1 << self.precision:
            exponent += 1
        scaled = magnitude / Fraction(2) ** exponent
        digits = math.floor(scaled)
        rest = scaled - digits
        digits += {
            "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and digits & 1 == 1),
            "rz": False,
            "rm": negative and rest > 0,
            "rp": not negative and rest > 0,
        }[mode]
        if digits == 1 << self.precision:
            digits, exponent = digits >> 1, exponent + 1
        if digits * Fraction(2) ** exponent >= Fraction(2) ** self.max_exponent:
            overflows = mode == "rn" or mode == ("rm" if negative else "rp")
            code = self.infinity if overflows else self.infinity - 1
        elif digits < 1 << self.precision - 1:
            code = digits
        else:
            code = (exponent - self.min_exponent + 1) << self.precision - 1 | digits - (1 << self.precision - 1)
        return code | (self.sign if negative else 0)

    def random(self, rng: random.Random, count: int = 300) -> list[int]:
        """Codes: edges, numbers near one so that rounding happens, and anything finite."""
        edges = [0, self.sign, 1, self.infinity, self.infinity - 1, 1 << self.precision - 1, self.sign | 1]
        middle = self.max_exponent - 1
        out = []
        for _ in range(count):
            kind = rng.random()
            if kind < 0.1:
                code = rng.choice(edges)
            elif kind < 0.6:
                exponent = middle + rng.randint(-4, 4)
                code = (
                    rng.getrandbits(1) << self.bits - 1
                    | exponent << self.precision - 1
                    | rng.getrandbits(self.precision - 1)
                )
            else:
                code = rng.getrandbits(self.bits)
                if code & self.infinity == self.infinity:
                    code &= ~(1 << self.precision - 1)
            out.append(code)
        return out


FORMATS = {"f32": Format(24, 8), "f16": Format(11, 5), "bf16": Format(8, 8), "f64": Format(53, 11)}


def exactly(ty: str, function: Callable[..., Any], mode: str = "rn") -> Callable[..., int | str]:
    """Reference of an operation: exact on fractions and rounded once; with an infinity or NaN by Python's floats."""
    form = FORMATS[ty]

    def reference(*codes: int) -> int | str:
        values = [form.decode(code) for code in codes]
        if not any(isinstance(value, float) for value in values):
            return form.encode(function(*values), mode)
        try:
            # A finite operand matters by its sign only, as long as it is no zero.
            result = function(*(_plain_float(value) for value in values))
        except (OverflowError, ValueError, ZeroDivisionError):
            return NAN
        return form.encode(float(result), mode)

    return reference


def _plain_float(value: Fraction | float) -> float:
    if isinstance(value, float) or abs(value) < Fraction(2) ** 1000:
        return float(value)
    return math.copysign(1.0, value)


def same_float(ty: str) -> Callable[[int, Any], bool]:
    """Equal codes, any NaN for NAN; either zero for a zero."""
    form = FORMATS[ty]

    def same(got: int, want: Any) -> bool:
        if want == NAN:
            return form.is_nan(got)
        if want & ~form.sign == 0:
            return got & ~form.sign == 0
        return got == want

    return same
