"""Integer, logic and conversion instructions against Python integers, written from the text of the PTX ISA."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from tests.ptxsim.ptx_cases import (
    LETTER,
    check,
    clamp,
    divide,
    flags,
    integers,
    limits,
    signed,
    unsigned,
    view_as,
)

WIDTHS = [16, 32, 64]
TYPES = ["u16", "s16", "u32", "s32", "u64", "s64"]
BINARY = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "min": min,
    "max": max,
    "mul.lo": lambda x, y: x * y,
    "div": divide,
    "rem": lambda x, y: x - y * divide(x, y),
}
LOGIC = {"and": lambda x, y: x & y, "or": lambda x, y: x | y, "xor": lambda x, y: x ^ y}
COMPARISONS = {
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y,
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
}


@pytest.fixture
def rng() -> random.Random:
    return random.Random(1)


def words(rng: random.Random, count: int = 3) -> list[tuple[str, list[int]]]:
    """32-bit inputs r0, r1, ..."""
    return [("r", integers(rng, 32)) for _ in range(count)]


@pytest.mark.parametrize("ty", TYPES)
@pytest.mark.parametrize("name", BINARY)
def test_binary_operation(rng: random.Random, name: str, ty: str) -> None:
    bits, view = int(ty[1:]), view_as(ty)
    letter = LETTER[bits]
    b = integers(rng, bits)
    if name in ("div", "rem"):
        b = [value or 1 for value in b]
    check(
        f" {name}.{ty} {letter}9, {letter}0, {letter}1;",
        [(letter, integers(rng, bits)), (letter, b)],
        f"{letter}9",
        lambda x, y: unsigned(BINARY[name](view(x), view(y)), bits),
    )


@pytest.mark.parametrize("ty", TYPES)
def test_high_products_and_multiply_add(rng: random.Random, ty: str) -> None:
    bits, view = int(ty[1:]), view_as(ty)
    letter = LETTER[bits]
    inputs = [(letter, integers(rng, bits)) for _ in range(3)]
    out = f"{letter}9"
    check(
        f" mul.hi.{ty} {out}, {letter}0, {letter}1;",
        inputs[:2],
        out,
        lambda x, y: unsigned(view(x) * view(y) >> bits, bits),
    )
    check(
        f" mad.lo.{ty} {out}, {letter}0, {letter}1, {letter}2;",
        inputs,
        out,
        lambda x, y, z: unsigned(view(x) * view(y) + view(z), bits),
    )


@pytest.mark.parametrize("ty", ["u16", "s16", "u32", "s32"])
def test_wide_products(rng: random.Random, ty: str) -> None:
    bits, view = int(ty[1:]), view_as(ty)
    letter, wide = LETTER[bits], LETTER[2 * bits]
    inputs = [(letter, integers(rng, bits)), (letter, integers(rng, bits)), (wide, integers(rng, 2 * bits))]
    check(
        f" mul.wide.{ty} {wide}9, {letter}0, {letter}1;",
        inputs[:2],
        f"{wide}9",
        lambda x, y: unsigned(view(x) * view(y), 2 * bits),
    )
    check(
        f" mad.wide.{ty} {wide}9, {letter}0, {letter}1, {wide}2;",
        inputs,
        f"{wide}9",
        lambda x, y, z: unsigned(view(x) * view(y) + z, 2 * bits),
    )


@pytest.mark.parametrize("ty", TYPES)
def test_shift_counts_are_clamped(rng: random.Random, ty: str) -> None:
    bits, view = int(ty[1:]), view_as(ty)
    letter = LETTER[bits]
    counts = [rng.choice([0, 1, 5, bits - 1, bits, bits + 3, 255]) for _ in range(200)]
    inputs = [(letter, integers(rng, bits)), ("r", counts)]
    most = bits - 1 if ty[0] == "s" else bits
    check(
        f" shr.{ty} {letter}9, {letter}0, r1;",
        inputs,
        f"{letter}9",
        lambda x, s: unsigned(view(x) >> min(s, most), bits),
    )
    check(
        f" shl.b{bits} {letter}9, {letter}0, r1;",
        inputs,
        f"{letter}9",
        lambda x, s: unsigned(x << s, bits) if s < bits else 0,
    )


@pytest.mark.parametrize("ty", TYPES)
@pytest.mark.parametrize("name", COMPARISONS)
def test_comparison(rng: random.Random, name: str, ty: str) -> None:
    bits, view = int(ty[1:]), view_as(ty)
    letter = LETTER[bits]
    inputs = [(letter, integers(rng, bits)), (letter, integers(rng, bits))]
    check(
        f" setp.{name}.{ty} p9, {letter}0, {letter}1;",
        inputs,
        "p9",
        lambda x, y: int(COMPARISONS[name](view(x), view(y))),
    )


@pytest.mark.parametrize("ty", ["u32", "s32", "u64", "s64"])
def test_bit_field_extract_and_highest_bit(rng: random.Random, ty: str) -> None:
    bits, view = int(ty[1:]), view_as(ty)
    letter = LETTER[bits]
    a = integers(rng, bits)
    positions = [rng.choice([0, 3, 17, 31, 40, 63, 70, 255]) for _ in a]
    lengths = [rng.choice([0, 1, 8, 16, 31, 32, 64, 200]) for _ in a]

    def extract(x: int, position: int, length: int) -> int:
        sign = 0
        if ty[0] == "s" and length:
            sign = x >> min(position + length - 1, bits - 1) & 1
        taken = min(length, max(bits - position, 0))
        return sum((x >> (position + k) & 1 if k < taken else sign) << k for k in range(bits))

    def find(x: int) -> int:
        value = view(x)
        value = ~value if value < 0 else value
        return value.bit_length() - 1 if value else 0xFFFFFFFF

    check(
        f" bfe.{ty} {letter}9, {letter}0, r1, r2;",
        [(letter, a), ("r", positions), ("r", lengths)],
        f"{letter}9",
        extract,
    )
    check(f" bfind.{ty} r9, {letter}0;", [(letter, a)], "r9", find)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("name", LOGIC)
def test_logic(rng: random.Random, name: str, bits: int) -> None:
    letter = LETTER[bits]
    inputs = [(letter, integers(rng, bits)), (letter, integers(rng, bits))]
    check(
        f" {name}.b{bits} {letter}9, {letter}0, {letter}1;",
        inputs,
        f"{letter}9",
        lambda x, y: unsigned(LOGIC[name](x, y), bits),
    )


@pytest.mark.parametrize("bits", WIDTHS)
def test_not_abs_neg_and_selp(rng: random.Random, bits: int) -> None:
    letter = LETTER[bits]
    a, b = integers(rng, bits), integers(rng, bits)
    out, one = f"{letter}9", [(letter, a)]
    check(f" not.b{bits} {out}, {letter}0;", one, out, lambda x: unsigned(~x, bits))
    check(f" abs.s{bits} {out}, {letter}0;", one, out, lambda x: unsigned(abs(signed(x, bits)), bits))
    check(f" neg.s{bits} {out}, {letter}0;", one, out, lambda x: unsigned(-x, bits))
    inputs = [(letter, a), (letter, b), ("p", flags(rng))]
    check(f" selp.b{bits} {out}, {letter}0, {letter}1, p2;", inputs, out, lambda x, y, p: unsigned(x if p else y, bits))


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_counts_and_insert(rng: random.Random, bits: int) -> None:
    letter = LETTER[bits]
    a, b = integers(rng, bits), integers(rng, bits)
    out, one = f"{letter}9", [(letter, a)]
    check(f" popc.b{bits} r9, {letter}0;", one, "r9", lambda x: unsigned(x, bits).bit_count())
    check(f" clz.b{bits} r9, {letter}0;", one, "r9", lambda x: bits - unsigned(x, bits).bit_length())
    check(f" brev.b{bits} {out}, {letter}0;", one, out, lambda x: int(format(unsigned(x, bits), f"0{bits}b")[::-1], 2))

    def insert(x: int, y: int, position: int, length: int) -> int:
        for k in range(length):
            if position + k < bits:
                y = y & ~(1 << position + k) | (x >> k & 1) << position + k
        return unsigned(y, bits)

    positions = [rng.choice([0, 3, 17, 31, 40, 63]) for _ in a]
    lengths = [rng.choice([0, 1, 8, 16, 31, 32, 64]) for _ in a]
    inputs = [(letter, a), (letter, b), ("r", positions), ("r", lengths)]
    check(f" bfi.b{bits} {out}, {letter}0, {letter}1, r2, r3;", inputs, out, insert)


@pytest.mark.parametrize("table", [0x00, 0xC0, 0x96, 0xE8, 0xCA, 0x1D, 0xF8, 0xEA, 0x80, 0xFE, 0xFF, 0x3C, 0x6A, 0xA8])
def test_lop3_is_its_truth_table(rng: random.Random, table: int) -> None:
    def reference(x: int, y: int, z: int) -> int:
        rows = [(x >> k & 1) * 4 + (y >> k & 1) * 2 + (z >> k & 1) for k in range(32)]
        return sum((table >> row & 1) << k for k, row in enumerate(rows))

    check(f" lop3.b32 r9, r0, r1, r2, {table};", words(rng), "r9", reference)


def test_lop3_with_a_predicate(rng: random.Random) -> None:
    inputs = [*words(rng), ("p", flags(rng))]
    for combine, function in (("or", lambda r, p: r or p), ("and", lambda r, p: r and p)):
        check(
            f" lop3.{combine}.b32 r8|p9, r0, r1, r2, 0x80, p3;",
            inputs,
            "p9",
            lambda x, y, z, p, function=function: int(function((x & y & z) != 0, bool(p))),
        )


def permute(x: int, y: int, selector: int) -> int:
    source = [(x >> 8 * i & 255) for i in range(4)] + [(y >> 8 * i & 255) for i in range(4)]
    result = 0
    for i in range(4):
        number = selector >> 4 * i & 15
        byte = source[number & 7]
        if number & 8:
            byte = 255 if byte & 128 else 0
        result |= byte << 8 * i
    return result


def test_prmt_by_register(rng: random.Random) -> None:
    check(" prmt.b32 r9, r0, r1, r2;", words(rng), "r9", permute)


@pytest.mark.parametrize(
    "selector", [0x3210, 0x7531, 0x7770, 0x7773, 0xBA98, 0x8888, 0x5410, 0x7632, 0x4321, 0x7771, 0xFFF3]
)
def test_prmt_by_constant(rng: random.Random, selector: int) -> None:
    check(f" prmt.b32 r9, r0, r1, {selector};", words(rng, 2), "r9", lambda x, y: permute(x, y, selector))
    check(f" prmt.b32 r9, r0, 0, {selector};", words(rng, 1), "r9", lambda x: permute(x, 0, selector))


@pytest.mark.parametrize(
    ("mode", "selectors"),
    [
        ("f4e", [0x3210, 0x4321, 0x5432, 0x6543]),
        ("b4e", [0x5670, 0x6701, 0x7012, 0x0123]),
        ("rc8", [0, 0x1111, 0x2222, 0x3333]),
        ("ecl", [0x3210, 0x3211, 0x3222, 0x3333]),
        ("ecr", [0, 0x1110, 0x2210, 0x3210]),
        ("rc16", [0x1010, 0x3232, 0x1010, 0x3232]),
    ],
)
def test_prmt_by_mode(rng: random.Random, mode: str, selectors: list[int]) -> None:
    check(f" prmt.b32.{mode} r9, r0, r1, r2;", words(rng), "r9", lambda x, y, z: permute(x, y, selectors[z & 3]))


@pytest.mark.parametrize("direction", ["l", "r"])
@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shift(rng: random.Random, direction: str, mode: str) -> None:
    def reference(x: int, y: int, count: int) -> int:
        count = count & 31 if mode == "wrap" else min(count, 32)
        pair = y << 32 | x
        return unsigned(pair >> (32 - count if direction == "l" else count), 32)

    counts = [rng.choice([0, 1, 8, 31, 32, 33, 60]) for _ in range(200)]
    check(f" shf.{direction}.{mode}.b32 r9, r0, r1, r2;", [*words(rng, 2), ("r", counts)], "r9", reference)


@pytest.mark.parametrize("clamped", [True, False])
def test_bit_mask(rng: random.Random, clamped: bool) -> None:
    def reference(position: int, length: int) -> int:
        position, length = (min(v, 32) if clamped else v & 31 for v in (position, length))
        return unsigned(((1 << length) - 1) << position, 32)

    inputs = [("r", [rng.choice([0, 1, 7, 16, 31, 32, 40]) for _ in range(200)]) for _ in range(2)]
    check(f" bmsk.{'clamp' if clamped else 'wrap'}.b32 r9, r0, r1;", inputs, "r9", reference)


@pytest.mark.parametrize("left", ["u", "s"])
@pytest.mark.parametrize("right", ["u", "s"])
def test_integer_dot_products(rng: random.Random, left: str, right: str) -> None:
    def part(word: int, k: int, kind: str, bits: int) -> int:
        return (signed if kind == "s" else unsigned)(word >> bits * k, bits)

    def dp4a(x: int, y: int, z: int) -> int:
        return unsigned(z + sum(part(x, k, left, 8) * part(y, k, right, 8) for k in range(4)), 32)

    check(f" dp4a.{left}32.{right}32 r9, r0, r1, r2;", words(rng), "r9", dp4a)
    for half, first in (("lo", 0), ("hi", 2)):

        def dp2a(x: int, y: int, z: int, first: int = first) -> int:
            return unsigned(z + sum(part(x, k, left, 16) * part(y, k + first, right, 8) for k in range(2)), 32)

        check(f" dp2a.{half}.{left}32.{right}32 r9, r0, r1, r2;", words(rng), "r9", dp2a)


@pytest.mark.parametrize(
    ("instructions", "output", "count", "expected"),
    [
        (" sad.s32 r9, r0, r1, r2;", "r9", 3, lambda x, y, z: unsigned(z + abs(signed(x, 32) - signed(y, 32)), 32)),
        (" add.sat.s32 r9, r0, r1;", "r9", 2, lambda x, y: unsigned(clamp(signed(x, 32) + signed(y, 32), "s32"), 32)),
        (" add.cc.u32 r9, r0, r1; addc.u32 r9, 0, 0;", "r9", 2, lambda x, y: (x + y) >> 32),
        (" sub.cc.u32 r9, r0, r1; subc.u32 r9, 5, 1;", "r9", 2, lambda x, y: 4 - (x < y)),
        (
            " mad.lo.cc.u32 r8, r0, r1, r2; madc.hi.u32 r9, r0, r1, 0;",
            "r9",
            3,
            lambda x, y, z: unsigned((x * y + z) >> 32, 32),
        ),
        (" set.lt.u32.s32 r9, r0, r1;", "r9", 2, lambda x, y: 0xFFFFFFFF if signed(x, 32) < signed(y, 32) else 0),
        (" slct.b32.s32 r9, r0, r1, r2;", "r9", 3, lambda x, y, z: x if signed(z, 32) >= 0 else y),
        (" mov.b32 {h3, h4}, r0; mov.b32 r9, {h4, h3};", "r9", 1, lambda x: unsigned(x << 16 | x >> 16, 32)),
        (
            " mov.b64 d9, {r0, r1}; mov.b64 {_, r8}, d9; cvt.u64.u32 d8, r8; add.u64 d9, d9, d8;",
            "d9",
            2,
            lambda x, y: unsigned((y << 32 | x) + y, 64),
        ),
        (" cnot.b32 r9, r0;", "r9", 1, lambda x: int(x == 0)),
        (
            " max.s16x2 r9, r0, r1;",
            "r9",
            2,
            lambda x, y: (
                unsigned(max(signed(x, 16), signed(y, 16)), 16)
                | unsigned(max(signed(x >> 16, 16), signed(y >> 16, 16)), 16) << 16
            ),
        ),
    ],
)
def test_instruction(
    rng: random.Random, instructions: str, output: str, count: int, expected: Callable[..., int]
) -> None:
    check(instructions, words(rng, count), output, expected)


def test_comparisons_combine_with_a_predicate(rng: random.Random) -> None:
    inputs = [*words(rng, 2), ("p", flags(rng))]
    check(
        " setp.lt.and.s32 p9|p8, r0, r1, !p2; selp.u32 r9, 2, 0, p9; @p8 add.u32 r9, r9, 1;",
        inputs,
        "r9",
        lambda x, y, p: 0 if p else (2 if signed(x, 32) < signed(y, 32) else 1),
    )
    check(" setp.hi.or.u32 p9, r0, r1, p2;", inputs, "p9", lambda x, y, p: int(x > y or p == 1))


# ------------------------------------------------------------------------------------ conversions
INTEGER_TYPES = [f"{kind}{bits}" for bits in (8, 16, 32, 64) for kind in "us"]


@pytest.mark.parametrize("source", INTEGER_TYPES)
@pytest.mark.parametrize("target", INTEGER_TYPES)
def test_integer_conversion_truncates_extends_and_saturates(rng: random.Random, source: str, target: str) -> None:
    letter, out = LETTER[int(source[1:])], LETTER[int(target[1:])] + "9"
    register = max(int(target[1:]), 16)
    view, inputs = view_as(source), [(letter, integers(rng, 64))]
    check(
        f" cvt.{target}.{source} {out}, {letter}0;", inputs, out, lambda v: unsigned(view_as(target)(view(v)), register)
    )
    (least, greatest), (low, high) = limits(source), limits(target)
    if not low <= least <= greatest <= high:  # else .sat is not allowed
        check(
            f" cvt.sat.{target}.{source} {out}, {letter}0;",
            inputs,
            out,
            lambda v: unsigned(clamp(view(v), target), register),
        )


@pytest.mark.parametrize("target", ["s8", "u8", "s16"])
def test_packing_conversion_saturates(rng: random.Random, target: str) -> None:
    bits = int(target[1:])
    near = [unsigned(rng.randint(-300, 300), 32) for _ in range(100)]
    a, b, c = near + integers(rng, 32, 100), integers(rng, 32), integers(rng, 32)

    def field(value: int) -> int:
        return unsigned(clamp(signed(value, 32), target), bits)

    if bits == 16:
        inputs = [("r", a), ("r", b)]
        check(" cvt.pack.sat.s16.s32 r9, r0, r1;", inputs, "r9", lambda x, y: field(x) << 16 | field(y))
    else:
        inputs = [("r", a), ("r", b), ("r", c)]
        check(
            f" cvt.pack.sat.{target}.s32.b32 r9, r0, r1, r2;",
            inputs,
            "r9",
            lambda x, y, z: unsigned(z << 16 | field(x) << 8 | field(y), 32),
        )
