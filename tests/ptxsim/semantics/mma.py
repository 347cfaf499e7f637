"""mma.sync (PTX ISA, "Matrix Fragments for mma.m8n8k16" to "... mma.m16n8k64").

In all of these shapes lane 4*g + t holds, with E elements per 32-bit register: of A row g (register 2i) or g + 8
(register 2i + 1) and columns 4E*i + E*t ...; of B the same columns as rows, and column g; of C and D row g or g + 8 and
columns 2t, 2t + 1.
"""

from __future__ import annotations

import numpy as np

from tests.ptxsim.errors import PTXError, UnsupportedInstruction
from tests.ptxsim.semantics.addresses import items, whole_warps
from tests.ptxsim.semantics.decoder import Decoder, Execute
from tests.ptxsim.semantics.rounding import bf16_to_f32

ELEMENT_BITS = {"e4m3": 8, "e5m2": 8, "s8": 8, "u8": 8, "s4": 4, "u4": 4, "f16": 16, "bf16": 16, "tf32": 32}
INTEGERS = ("s8", "u8", "s4", "u4")
TF32_BITS = np.uint32(0xFFFFE000)
INT32 = (-(2**31), 2**31 - 1)


def _e4m3(code: int) -> float:
    exponent, mantissa = code >> 3 & 15, code & 7
    if code & 127 == 127:
        value = np.nan
    elif exponent == 0:
        value = mantissa / 8 * 2.0**-6
    else:
        value = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -value if code & 128 else value


FP8 = {
    "e4m3": np.array([_e4m3(code) for code in range(256)]),
    "e5m2": (np.arange(256, dtype=np.uint16) << 8).astype(np.uint16).view(np.float16).astype(np.float64),
}


def decode(data: np.ndarray, ty: str) -> np.ndarray:
    """Elements of contiguous bytes or words, along the last axis. Eight- and four-bit integers as float32: their
    products over one instruction are exact in it; the others as float64."""
    if ty == "s8":
        return data.view(np.int8).astype(np.float32)
    if ty == "u8":
        return data.view(np.uint8).astype(np.float32)
    if ty in ("s4", "u4"):
        nibbles = (data.view(np.uint32)[..., None] >> np.arange(0, 32, 4, dtype=np.uint32)) & np.uint32(15)
        nibbles = nibbles.astype(np.int32).reshape(*data.shape[:-1], -1)
        return (np.where(nibbles > 7, nibbles - 16, nibbles) if ty == "s4" else nibbles).astype(np.float32)
    if ty == "f16":
        return data.view(np.float16).astype(np.float64)
    if ty == "bf16":
        return bf16_to_f32(data.view(np.uint16)).astype(np.float64)
    if ty == "tf32":
        return (data.view(np.uint32) & TF32_BITS).view(np.float32).astype(np.float64)
    if ty in FP8:
        return FP8[ty][data.view(np.uint8)]
    raise UnsupportedInstruction(f"mma type .{ty}")


def fragment_a(registers: np.ndarray, warps: int, rows: int, ty: str) -> np.ndarray:
    """(registers, warps * 32) words to (warps, rows, K) elements."""
    groups, per_register = rows // 8, 32 // ELEMENT_BITS[ty]
    steps = len(registers) // groups
    values = decode(np.ascontiguousarray(registers), ty).reshape(steps, groups, warps, 8, 4, per_register)
    return np.ascontiguousarray(values.transpose(2, 1, 3, 0, 4, 5)).reshape(warps, rows, steps * 4 * per_register)


def fragment_b(registers: np.ndarray, warps: int, ty: str) -> np.ndarray:
    """(registers, warps * 32) words to (warps, K, 8) elements."""
    steps, per_register = len(registers), 32 // ELEMENT_BITS[ty]
    values = decode(np.ascontiguousarray(registers), ty).reshape(steps, warps, 8, 4, per_register)
    return np.ascontiguousarray(values.transpose(1, 0, 3, 4, 2)).reshape(warps, steps * 4 * per_register, 8)


def _to_matrix(registers: np.ndarray, warps: int, rows: int) -> np.ndarray:
    """(registers, warps * 32) accumulators to (warps, rows, 8)."""
    return registers.reshape(rows // 8, 2, warps, 8, 4).transpose(2, 0, 3, 4, 1).reshape(warps, rows, 8)


def _to_registers(matrix: np.ndarray, warps: int, rows: int) -> np.ndarray:
    return matrix.reshape(warps, rows // 8, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(rows // 4, warps * 32)


def _halves_to_matrix(registers: np.ndarray, warps: int, rows: int) -> np.ndarray:
    halves = np.ascontiguousarray(registers).view(np.float16).reshape(rows // 8, warps, 8, 4, 2)
    return halves.transpose(1, 0, 2, 3, 4).reshape(warps, rows, 8)


def _halves_to_registers(matrix: np.ndarray, warps: int, rows: int) -> np.ndarray:
    halves = matrix.astype(np.float16).reshape(warps, rows // 8, 8, 4, 2).transpose(1, 0, 2, 3, 4)
    return np.ascontiguousarray(halves).view(np.uint32).reshape(rows // 8, warps * 32)


def _shape(op: Decoder) -> tuple[int, int, int]:
    """M, N, K of .m16n8k32"""
    m, rest = op.modifiers.pop(0)[1:].split("n")
    n, k = rest.split("k")
    return int(m), int(n), int(k)


def mma(op: Decoder) -> Execute:
    """D = A*B + C, A by rows and B by columns. Floats are summed in float64 and rounded once. Integers wrap around
    unless .satfinite clamps."""
    op.flags("sync", "aligned")
    rows, columns, inner = _shape(op)
    layouts = op.flag("row"), op.flag("col")
    saturating = bool(op.flag("satfinite"))
    op.flag("kind::f8f6f4")
    type_d, type_a, type_b, type_c = op.modifiers[-4:]
    del op.modifiers[-4:]
    integer = type_d == "s32"
    bits = ELEMENT_BITS.get(type_a, 0)
    step = 4 * 32 // bits if bits else 0
    if (
        layouts != ("row", "col")
        or not bits
        or ELEMENT_BITS.get(type_b) != bits
        or columns != 8
        or rows not in (8, 16)
        or inner not in (step, 2 * step)
        or (rows == 8 and bits > 8)
        or integer != (type_a in INTEGERS)
    ):
        raise op.unsupported()
    machine, steps = op.machine, inner // step
    a, b, c = ([machine.source(item, "b32") for item in items(op.operands[i])] for i in (1, 2, 3))
    d = [machine.destination(item, "b32") for item in items(op.operands[0])]
    half_c, half_d = type_c == "f16", type_d == "f16"
    wanted = (steps * rows // 8, steps, rows // (8 if half_c else 4), rows // (8 if half_d else 4))
    if (len(a), len(b), len(c), len(d)) != wanted:
        got = (len(a), len(b), len(c), len(d))
        raise PTXError(f"{op.instruction.opcode}: {got} registers for A, B, C, D instead of {wanted}")

    def gather(sources: list[np.ndarray], warps: np.ndarray) -> np.ndarray:
        words = np.empty((len(sources), machine.threads), np.uint32)
        for i, source in enumerate(sources):
            words[i] = source
        if len(warps) == machine.warps:
            return words
        return words.reshape(len(sources), -1, 32)[:, warps].reshape(len(sources), -1)

    def execute(mask: np.ndarray | None) -> None:
        warps = whole_warps(op, mask)
        count = len(warps)
        left = fragment_a(gather(a, warps), count, rows, type_a)
        product = np.matmul(left, fragment_b(gather(b, warps), count, type_b))
        start = gather(c, warps)
        if integer:
            accumulators = _to_matrix(start.view(np.int32), count, rows)
            if saturating:
                result = np.clip(product.astype(np.int64) + accumulators, *INT32).astype(np.int32)
            else:
                result = product.astype(np.int32) + accumulators
            words = _to_registers(result, count, rows).view(np.uint32)
        else:
            if half_c:
                total = product + _halves_to_matrix(start, count, rows)
            else:
                total = product + _to_matrix(start.view(np.float32), count, rows)
            if half_d:
                words = _halves_to_registers(total, count, rows)
            else:
                words = _to_registers(total.astype(np.float32), count, rows).view(np.uint32)
        for destination, word in zip(d, words, strict=True):
            if count == machine.warps:
                destination[...] = word
            else:
                destination.reshape(-1, 32)[warps] = word.reshape(-1, 32)

    return execute


HANDLERS = {"mma": mma}
