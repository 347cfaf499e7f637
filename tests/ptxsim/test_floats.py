"""Floating-point instructions against exact fractions rounded once."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from fractions import Fraction

import pytest

from tests.ptxsim.ptx_cases import (
    FORMATS,
    LETTER,
    NAN,
    check,
    clamp,
    exactly,
    integers,
    same_float,
    signed,
    unsigned,
    view_as,
)

F32 = FORMATS["f32"]
MODES = ["rn", "rz", "rm", "rp"]
BINARY = {"add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y}
ROUND = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}


@pytest.fixture
def rng() -> random.Random:
    return random.Random(2)


def singles(rng: random.Random, count: int) -> list[tuple[str, list[int]]]:
    return [("r", F32.random(rng)) for _ in range(count)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", BINARY)
def test_single_arithmetic_in_every_rounding(rng: random.Random, name: str, mode: str) -> None:
    check(
        f" {name}.{mode}.f32 r9, r0, r1;", singles(rng, 2), "r9", exactly("f32", BINARY[name], mode), same_float("f32")
    )


@pytest.mark.parametrize("mode", MODES)
def test_fma_rounds_once(rng: random.Random, mode: str) -> None:
    reference = exactly("f32", lambda x, y, z: x * y + z, mode)
    check(f" fma.{mode}.f32 r9, r0, r1, r2;", singles(rng, 3), "r9", reference, same_float("f32"))


def test_fma_of_cancelling_products(rng: random.Random) -> None:
    """Where a product in double precision and a second rounding would show."""
    x = [0x3F800001 + rng.getrandbits(22) for _ in range(300)]
    y = [0x3F800001 + rng.getrandbits(22) for _ in range(300)]
    z = []
    for a, b in zip(x, y, strict=True):
        scale = 1 if rng.random() < 0.5 else Fraction(2) ** rng.choice([-24, -25, 24, 25])
        z.append(F32.encode(-F32.decode(a) * F32.decode(b) * scale))
    reference = exactly("f32", lambda p, q, r: p * q + r)
    check(" fma.rn.f32 r9, r0, r1, r2;", [("r", x), ("r", y), ("r", z)], "r9", reference, same_float("f32"))


def test_division_and_reciprocal(rng: random.Random) -> None:
    divisors = [code if code & 0x7FFFFFFF else 0x3F800000 for code in F32.random(rng)]
    inputs = [("r", F32.random(rng)), ("r", divisors)]
    check(" div.rn.f32 r9, r0, r1;", inputs, "r9", exactly("f32", lambda x, y: x / y), same_float("f32"))
    check(" rcp.rn.f32 r9, r0;", inputs[1:], "r9", exactly("f32", lambda x: 1 / x), same_float("f32"))


def test_square_root_is_correctly_rounded(rng: random.Random) -> None:
    def root(code: int) -> int | str:
        value = F32.decode(code)
        if isinstance(value, float):
            return NAN if not value > 0 else F32.infinity
        if value < 0:
            return NAN
        scaled = value * 4**300  # enough digits that the integer root decides the rounding
        low = Fraction(math.isqrt(scaled.numerator // scaled.denominator), 2**300)
        exact = low * low == value
        return F32.encode(low if exact else low + Fraction(1, 2**301))

    check(" sqrt.rn.f32 r9, r0;", singles(rng, 1), "r9", root, same_float("f32"))


@pytest.mark.parametrize("ty", ["f16", "bf16"])
def test_half_arithmetic(rng: random.Random, ty: str) -> None:
    inputs = [("h", FORMATS[ty].random(rng)) for _ in range(3)]
    reference = exactly(ty, lambda x, y, z: x * y + z)
    check(f" fma.rn.{ty} h9, h0, h1, h2;", inputs, "h9", reference, same_float(ty))
    for name, function in BINARY.items():
        check(f" {name}.rn.{ty} h9, h0, h1;", inputs[:2], "h9", exactly(ty, function), same_float(ty))


@pytest.mark.parametrize("ty", ["f16", "bf16"])
@pytest.mark.parametrize("half", [0, 1])
def test_packed_half_arithmetic(rng: random.Random, ty: str, half: int) -> None:
    inputs = [("h", FORMATS[ty].random(rng)) for _ in range(3)]
    pack = " mov.b32 r5, {h0, h1}; mov.b32 r6, {h1, h2};"
    unpack = f" mov.b32 {{h8, h9}}, r7; mov.b16 h10, h{8 + half};"

    def of_half(reference: Callable[..., int | str]) -> Callable[..., int | str]:
        return lambda a, b, c: reference(*((a, b), (b, c))[half])

    product = of_half(exactly(ty, lambda x, y: x * y))
    check(f"{pack} mul.rn.{ty}x2 r7, r5, r6;{unpack}", inputs, "h10", product, same_float(ty))
    fused = of_half(exactly(ty, lambda x, y: x * y + x))
    check(f"{pack} fma.rn.{ty}x2 r7, r5, r6, r5;{unpack}", inputs, "h10", fused, same_float(ty))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("half", [0, 1])
def test_packed_single_arithmetic(rng: random.Random, half: int, mode: str) -> None:
    pack = " mov.b64 d5, {r0, r1}; mov.b64 d6, {r1, r2};"
    unpack = f" mov.b64 {{r8, r9}}, d7; mov.b32 r10, r{8 + half};"
    for name, function in BINARY.items():
        reference = exactly("f32", function, mode)
        check(
            f"{pack} {name}.{mode}.f32x2 d7, d5, d6;{unpack}",
            singles(rng, 3),
            "r10",
            lambda a, b, c, reference=reference: reference(*((a, b), (b, c))[half]),
            same_float("f32"),
        )
    fused = exactly("f32", lambda x, y: x * y + x, mode)
    check(
        f"{pack} fma.{mode}.f32x2 d7, d5, d6, d5;{unpack}",
        singles(rng, 3),
        "r10",
        lambda a, b, c: fused(*((a, b), (b, c))[half]),
        same_float("f32"),
    )


@pytest.mark.parametrize("ty", ["f16", "bf16"])
def test_half_conversions(rng: random.Random, ty: str) -> None:
    half = FORMATS[ty]
    for mode in ("rn", "rz"):
        check(
            f" cvt.{mode}.{ty}.f32 h9, r0;",
            singles(rng, 1),
            "h9",
            lambda code, mode=mode: half.encode(F32.decode(code), mode),
            same_float(ty),
        )
    same = same_float(ty)
    check(
        f" cvt.rn.{ty}x2.f32 r9, r0, r1;",
        singles(rng, 2),
        "r9",
        lambda upper, lower: (half.encode(F32.decode(upper)), half.encode(F32.decode(lower))),
        lambda got, want: same(got >> 16, want[0]) and same(got & 65535, want[1]),
    )
    codes = [("h", half.random(rng))]
    check(f" cvt.f32.{ty} r9, h0;", codes, "r9", lambda code: F32.encode(half.decode(code)), same_float("f32"))
    words = [("r", integers(rng, 32))]
    check(f" cvt.rn.{ty}.s32 h9, r0;", words, "h9", lambda v: half.encode(Fraction(signed(v, 32))), same_float(ty))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("source", ["s32", "u32", "s64", "u64", "s16", "u8"])
def test_integer_to_single(rng: random.Random, source: str, mode: str) -> None:
    letter, view = LETTER[int(source[1:])], view_as(source)
    check(
        f" cvt.{mode}.f32.{source} r9, {letter}0;",
        [(letter, integers(rng, 64))],
        "r9",
        lambda value: F32.encode(Fraction(view(value)), mode),
    )


def to_integer(rounding: str, target: str, ty: str = "f32") -> Callable[[int], int]:
    """Saturating; NaN gives 0 in less than 64 bits."""
    bits = int(target[1:])

    def reference(code: int) -> int:
        value = FORMATS[ty].decode(code)
        if isinstance(value, float) and math.isnan(value):
            return 0 if bits < 64 else 1 << 63
        if isinstance(value, float):
            result = clamp(2**70 if value > 0 else -(2**70), target)
        else:
            result = clamp(ROUND[rounding](value), target)
        return unsigned(result, max(bits, 16))

    return reference


def values_around_integers(rng: random.Random) -> list[int]:
    near = [F32.encode(Fraction(rng.randint(-(2**20), 2**20), rng.choice([1, 2, 4, 4096]))) for _ in range(200)]
    edges = [0x7FC00000, 0x4EFFFFFF, 0x4F000000, 0xCF000000, 0x5F000000, 0x5F800000]
    return near + F32.random(rng) + [*edges, 0x43000000, 0xC3008000, 0xC2FF0000, 0x42FE8000]


@pytest.mark.parametrize("rounding", ROUND)
@pytest.mark.parametrize("target", ["s8", "u8", "s16", "s32", "u32", "s64", "u64"])
def test_single_to_integer_saturates(rng: random.Random, target: str, rounding: str) -> None:
    out = LETTER[int(target[1:])] + "9"
    for sat in ("", ".sat"):
        check(
            f" cvt.{rounding}{sat}.{target}.f32 {out}, r0;",
            [("r", values_around_integers(rng))],
            out,
            to_integer(rounding, target),
        )


def test_further_conversions(rng: random.Random) -> None:
    values = [("r", values_around_integers(rng))]
    byte = to_integer("rni", "s8")
    check(" cvt.rni.sat.s8.f32 r9, r0;", values, "r9", lambda code: unsigned(signed(byte(code), 16), 32))
    check(" cvt.rzi.s32.f16 r9, h0;", [("h", FORMATS["f16"].random(rng))], "r9", to_integer("rzi", "s32", "f16"))

    def to_even(code: int) -> int | str:
        value = F32.decode(code)
        return F32.encode(value if isinstance(value, float) else Fraction(round(value)))

    check(" cvt.rni.f32.f32 r9, r0;", values, "r9", to_even, same_float("f32"))

    def saturated(code: int) -> int | str:
        value = F32.decode(code)
        if isinstance(value, float):
            return F32.encode(1.0 if value > 0 else 0.0)
        return F32.encode(max(Fraction(0), min(Fraction(1), value)))

    check(" cvt.sat.f32.f32 r9, r0;", values, "r9", saturated, same_float("f32"))
    double = FORMATS["f64"]
    check(" cvt.f64.f32 d9, r0;", values, "d9", lambda code: double.encode(F32.decode(code)), same_float("f64"))
    doubles = [("d", double.random(rng))]
    check(" cvt.rn.f32.f64 r9, d0;", doubles, "r9", lambda code: F32.encode(double.decode(code)), same_float("f32"))


SPECIAL_X = [0x7FC00000, 0, 0x80000000, 0, 0x3F800000]
SPECIAL_Y = [0x3F800000, 0x80000000, 0, 0x7FFFFFFF, 0x7FC00000]


def with_specials(rng: random.Random) -> list[tuple[str, list[int]]]:
    return [("r", SPECIAL_X + F32.random(rng)), ("r", SPECIAL_Y + F32.random(rng))]


@pytest.mark.parametrize("greatest", [True, False])
@pytest.mark.parametrize("propagate", [True, False])
def test_min_and_max_of_nan_and_signed_zeros(rng: random.Random, greatest: bool, propagate: bool) -> None:
    def reference(p: int, q: int) -> int | str:
        if F32.is_nan(p) or F32.is_nan(q):
            if propagate or (F32.is_nan(p) and F32.is_nan(q)):
                return NAN
            return q if F32.is_nan(p) else p
        x, y = F32.decode(p), F32.decode(q)
        if x == y == 0:
            return p & q if greatest else p | q
        return p if (x > y) == greatest or x == y else q

    name = "max" if greatest else "min"
    check(
        f" {name}{'.NaN' if propagate else ''}.f32 r9, r0, r1;",
        with_specials(rng),
        "r9",
        reference,
        lambda got, want: F32.is_nan(got) if want == NAN else got == want,
    )


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("lt", lambda x, y: x < y),
        ("gt", lambda x, y: x > y),
        ("eq", lambda x, y: x == y),
        ("ne", lambda x, y: x != y),
        ("ge", lambda x, y: x >= y),
        ("le", lambda x, y: x <= y),
    ],
)
def test_ordered_and_unordered_comparisons(rng: random.Random, name: str, function: Callable[..., bool]) -> None:
    def nan(p: int, q: int) -> bool:
        return F32.is_nan(p) or F32.is_nan(q)

    def holds(p: int, q: int) -> bool:
        return function(F32.decode(p), F32.decode(q))

    inputs = with_specials(rng)
    check(f" setp.{name}.f32 p9, r0, r1;", inputs, "p9", lambda p, q: int(not nan(p, q) and holds(p, q)))
    check(f" setp.{name}u.f32 p9, r0, r1;", inputs, "p9", lambda p, q: int(nan(p, q) or holds(p, q)))
    check(" setp.nan.f32 p9, r0, r1;", inputs, "p9", lambda p, q: int(nan(p, q)))


def test_sign_operations_keep_nan_payloads(rng: random.Random) -> None:
    values = [("r", [0x7FC00123, *F32.random(rng)])]
    check(" abs.f32 r9, r0; neg.f32 r9, r9;", values, "r9", lambda code: code | 1 << 31)
    check(" selp.f32 r9, r0, 0f00000000, 1;", values, "r9", lambda code: code)


def test_flush_to_zero() -> None:
    inputs = [("r", [1, 0x007FFFFF, 0x00800000]), ("r", [0, 0x3F800000, 0x80000001])]
    expected = {1: 0, 0x007FFFFF: 0x3F800000, 0x00800000: 0x00800000}
    check(" add.ftz.f32 r9, r0, r1;", inputs, "r9", lambda x, y: expected[x])


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("ex2", lambda x: 2.0**x),
        ("lg2", math.log2),
        ("rcp", lambda x: 1 / x),
        ("rsqrt", lambda x: x**-0.5),
        ("sqrt", math.sqrt),
        ("sin", math.sin),
        ("cos", math.cos),
        ("tanh", math.tanh),
    ],
)
def test_elementary_functions(rng: random.Random, name: str, function: Callable[[float], float]) -> None:
    values = [F32.encode(Fraction(rng.random() * 50 + 0.01)) for _ in range(100)]
    ftz = "" if name == "tanh" else ".ftz"
    check(
        f" {name}.approx{ftz}.f32 r9, r0;",
        [("r", values)],
        "r9",
        lambda code: function(float(F32.decode(code))),
        lambda got, want: abs(float(F32.decode(got)) - want) <= 2**-23 * abs(want),
    )
