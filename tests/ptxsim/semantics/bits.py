"""Logic, shifts and bit fields (PTX ISA, "Logic and Shift Instructions", and the bit instructions among "Integer
Arithmetic Instructions")."""

from __future__ import annotations

import numpy as np

from tests.ptxsim.ptx_types import DTYPE, UINT, WIDTH
from tests.ptxsim.semantics.decoder import Decoder, Execute, Values, apply, assign, write
from tests.ptxsim.syntax import Register

U32, U64 = np.uint32, np.uint64
ALL_ONES = U64(2**64 - 1)
BITS_OF_BYTE = np.array([byte.bit_count() for byte in range(256)], np.uint8)


def _low_mask(count: np.ndarray) -> np.ndarray:
    """``count`` ones, uint64; counts from 64 up give all."""
    return np.where(count >= 64, ALL_ONES, (U64(1) << np.minimum(count, 63).astype(U64)) - U64(1))


def logic(op: Decoder) -> Execute:
    """and, or, xor, not, cnot; of predicates too."""
    ty, base = op.type(), op.base
    d = op.destination(0, ty)
    if ty == "pred":
        p = op.predicate(1)
        if base == "not":
            return assign(d, lambda: ~p())
        q, function = op.predicate(2), {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[base]
        return assign(d, lambda: function(p(), q()))
    a = op.source(1, ty)
    if base == "not":
        return assign(d, lambda: ~a)
    if base == "cnot":
        return assign(d, lambda: (a == 0).astype(a.dtype))
    return apply(d, {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[base], a, op.source(2, ty))


def shift(op: Decoder) -> Execute:
    """shl, shr; counts are clamped to the width (PTX ISA, "shl")."""
    ty = op.type()
    bits, dtype, left = WIDTH[ty], DTYPE[ty], op.base == "shl"
    d, a = op.destination(0, ty), op.source(1, ty)
    operand = op.operands[2]
    count = op.source(2, f"u{WIDTH[operand.ty] if isinstance(operand, Register) else 32}")
    if len(count) == 1 and int(count[0]) < bits:
        return apply(d, np.left_shift if left else np.right_shift, a, count.astype(dtype))

    def compute() -> np.ndarray:
        beyond = count >= bits
        inside = np.where(beyond, 0, count).astype(dtype)
        if left:
            return np.where(beyond, dtype(0), a << inside)
        fill = np.where(a < 0, dtype(-1), dtype(0)) if ty[0] == "s" else dtype(0)
        return np.where(beyond, fill, a >> inside)

    return assign(d, compute)


def funnel_shift(op: Decoder) -> Execute:
    """shf: 32 bits of the pair b:a."""
    left, clamp = op.flag("l", "r") == "l", op.flag("clamp", "wrap") == "clamp"
    op.type()
    d, a, b, c = op.destination(0, "b32"), op.source(1, "b32"), op.source(2, "b32"), op.source(3, "u32")

    def compute() -> np.ndarray:
        count = (np.minimum(c, 32) if clamp else c & U32(31)).astype(U64)
        pair = (b.astype(U64) << U64(32)) | a
        return ((pair >> (U64(32) - count) if left else pair >> count) & U64(0xFFFFFFFF)).astype(U32)

    return assign(d, compute)


# The tables that compilers emit most, as (a, b, c) -> result.
KNOWN_TABLES = {
    0xC0: lambda a, b, c: a & b,
    0xFC: lambda a, b, c: a | b,
    0x3C: lambda a, b, c: a ^ b,
    0x80: lambda a, b, c: a & b & c,
    0xFE: lambda a, b, c: a | b | c,
    0x96: lambda a, b, c: a ^ b ^ c,
    0xEA: lambda a, b, c: (a & b) | c,
    0xF8: lambda a, b, c: a | (b & c),
    0xCA: lambda a, b, c: (a & b) | (~a & c),
    0xA8: lambda a, b, c: (a | b) & c,
    0xE0: lambda a, b, c: a & (b | c),
}


def lookup_table(op: Decoder) -> Execute:
    """lop3: any function of three bits, its truth table an immediate; with .or/.and also a predicate of the result."""
    op.type()
    combine = op.flag("or", "and")
    a, b, c = (op.source(index, "b32") for index in (1, 2, 3))
    table = op.operands[4].value & 255
    d, second = op.destinations("b32")

    def general(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        result = np.zeros(np.broadcast(a, b, c).shape, U32)
        for row in range(8):
            if table >> row & 1:
                result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        return result

    function = KNOWN_TABLES.get(table, general)
    if second is None:
        return assign(d, lambda: function(a, b, c))
    p = op.predicate(5)

    def execute(mask: np.ndarray | None) -> None:
        result = function(a, b, c)
        flag = (result != 0) | p() if combine == "or" else (result != 0) & p()
        write(d, result, mask)
        write(second, flag, mask)

    return execute


# Byte numbers that each selector value picks, lowest first (PTX ISA, "prmt").
PERMUTE_MODES = {
    "f4e": [[(n + i) & 7 for i in range(4)] for n in range(4)],
    "b4e": [[(n - i) & 7 for i in range(4)] for n in range(4)],
    "rc8": [[n] * 4 for n in range(4)],
    "ecl": [[max(i, n) for i in range(4)] for n in range(4)],
    "ecr": [[min(i, n) for i in range(4)] for n in range(4)],
    "rc16": [[2 * (n & 1), 2 * (n & 1) + 1] * 2 for n in range(4)],
}


def permute(op: Decoder) -> Execute:
    """prmt: four bytes out of the eight of b:a; selector bit 3 spreads the sign of the byte instead."""
    mode = op.flag(*PERMUTE_MODES)
    op.type()
    d, a, b, c = op.destination(0, "b32"), op.source(1, "b32"), op.source(2, "b32"), op.source(3, "b32")
    if mode is None and len(c) == 1:
        return assign(d, _constant_permute(a, b, int(c[0])))
    numbers = None if mode is None else np.array(PERMUTE_MODES[mode], U64)

    def compute() -> np.ndarray:
        pair = (b.astype(U64) << U64(32)) | a
        result = np.zeros(1, U64)
        for i in range(4):
            if numbers is None:
                number = ((c >> U32(4 * i)) & U32(15)).astype(U64)
            else:
                number = numbers[c & U32(3), i]
            byte = (pair >> ((number & U64(7)) * U64(8))) & U64(255)
            byte = np.where(number & U64(8), np.where(byte & U64(128), U64(255), U64(0)), byte)
            result = result | (byte << U64(8 * i))
        return result.astype(U32)

    return assign(d, compute)


def _constant_permute(a: np.ndarray, b: np.ndarray, selector: int) -> Values:
    numbers = [(selector >> 4 * i) & 15 for i in range(4)]
    if numbers == [0, 1, 2, 3]:
        return lambda: a
    if numbers[1:] == [7, 7, 7] and numbers[0] < 8 and len(b) == 1 and b[0] >> 24 == 0:
        # One byte and zeros: how LLVM takes bytes out of a word.
        word, count = (a if numbers[0] < 4 else b), U32(8 * (numbers[0] & 3))
        return lambda: (word >> count) & U32(255)

    def compute() -> np.ndarray:
        result = np.zeros(1, U32)
        for i, number in enumerate(numbers):
            byte = (a if (number & 7) < 4 else b) >> U32(8 * (number & 3))
            byte = np.where(byte & U32(0x80), U32(255), U32(0)) if number & 8 else byte & U32(255)
            result = result | (byte << U32(8 * i))
        return result

    return compute


def extract(op: Decoder) -> Execute:
    """bfe: c bits of a from position b; of signed types the sign of the last bit taken fills the rest."""
    ty = op.type()
    bits = WIDTH[ty]
    d, a, b, c = op.destination(0, ty), op.source(1, ty), op.source(2, "u32"), op.source(3, "u32")

    def compute() -> np.ndarray:
        position, count = (b & U32(255)).astype(np.int64), (c & U32(255)).astype(np.int64)
        value = a.view(UINT[bits]).astype(U64)
        moved = np.where(position >= 64, U64(0), value >> np.minimum(position, 63).astype(U64))
        result = moved & _low_mask(count)
        if ty[0] == "s":
            last = np.maximum(np.minimum(position + count - 1, bits - 1), 0)
            sign = (value >> last.astype(U64)) & U64(1)
            taken = np.minimum(count, np.maximum(bits - position, 0))
            result = np.where(sign != 0, result | ~_low_mask(taken), result)
            result = np.where(count == 0, U64(0), result)
        return result.astype(UINT[bits]).view(DTYPE[ty])

    return assign(d, compute)


def insert(op: Decoder) -> Execute:
    """bfi: the low d bits of a over those of b from position c."""
    ty = op.type()
    bits = WIDTH[ty]
    out, a, b = op.destination(0, ty), op.source(1, ty), op.source(2, ty)
    c, d = op.source(3, "u32"), op.source(4, "u32")

    def compute() -> np.ndarray:
        position, count = (np.minimum(values & U32(255), 64).astype(U64) for values in (c, d))
        outside, steps = position >= bits, np.minimum(position, 63)
        field = np.where(outside, U64(0), _low_mask(count) << steps) & U64((1 << bits) - 1)
        value = np.where(outside, U64(0), a.astype(U64) << steps)
        return ((b.astype(U64) & ~field) | (value & field)).astype(UINT[bits])

    return assign(out, compute)


def _highest_bit(values: np.ndarray) -> np.ndarray:
    """Number of the highest bit set, -1 for 0."""
    values = values.astype(U64)
    zero, number = values == 0, np.zeros(values.shape, np.int64)
    for step in (32, 16, 8, 4, 2, 1):
        high = values >= U64(1 << step)
        number += np.where(high, step, 0)
        values = np.where(high, values >> U64(step), values)
    return np.where(zero, -1, number)


def count_bits(op: Decoder) -> Execute:
    """popc, clz, bfind (highest bit that differs from the sign), brev."""
    shift_amount, ty = op.flag("shiftamt"), op.type()
    bits = WIDTH[ty]
    a = op.source(1, ty)
    d, value = op.destination(0, ty if op.base == "brev" else "u32"), a.view(UINT[bits])
    if op.base == "popc":
        return assign(d, lambda: BITS_OF_BYTE[value.view(np.uint8).reshape(-1, bits // 8)].sum(1))
    if op.base == "clz":
        return assign(d, lambda: bits - 1 - _highest_bit(value))

    def find() -> np.ndarray:
        number = _highest_bit(np.where(a < 0, ~a, a).view(UINT[bits]) if ty[0] == "s" else value)
        return np.where(number < 0, 0xFFFFFFFF, bits - 1 - number if shift_amount else number)

    def reverse() -> np.ndarray:
        result, source = np.zeros(value.shape, U64), value.astype(U64)
        for i in range(bits):
            result |= ((source >> U64(i)) & U64(1)) << U64(bits - 1 - i)
        return result.astype(UINT[bits])

    return assign(d, find if op.base == "bfind" else reverse)


def mask_bits(op: Decoder) -> Execute:
    """bmsk: b ones from position a."""
    clamp = op.flag("clamp", "wrap") == "clamp"
    op.type()
    a, b, d = op.source(1, "u32"), op.source(2, "u32"), op.destination(0, "b32")

    def compute() -> np.ndarray:
        position, count = ((np.minimum(v, 32) if clamp else v & U32(31)).astype(U64) for v in (a, b))
        return ((_low_mask(count) << position) & U64(0xFFFFFFFF)).astype(U32)

    return assign(d, compute)


HANDLERS = {
    **dict.fromkeys(("and", "or", "xor", "not", "cnot"), logic),
    **dict.fromkeys(("shl", "shr"), shift),
    **dict.fromkeys(("popc", "clz", "bfind", "brev"), count_bits),
    "shf": funnel_shift,
    "lop3": lookup_table,
    "prmt": permute,
    "bfe": extract,
    "bfi": insert,
    "bmsk": mask_bits,
}
