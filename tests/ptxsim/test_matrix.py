"""mma, ldmatrix, stmatrix, movmatrix against the fragment tables of the PTX ISA, element by element."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest

from tests.ptxsim import load_ptx
from tests.ptxsim.ptx_cases import FORMATS, kernel, signed


@dataclasses.dataclass(frozen=True)
class Shape:
    """mma.m<m>n8k<k> with elements of ``bits``."""

    m: int
    k: int
    bits: int

    @property
    def per_register(self) -> int:
        return 32 // self.bits

    @property
    def registers(self) -> tuple[int, int, int]:
        """Of A, B and of C or D."""
        steps = self.k // (4 * self.per_register)
        return steps * self.m // 8, steps, self.m // 4

    def a_element(self, lane: int, register: int, i: int) -> tuple[int, int]:
        group, thread = divmod(lane, 4)
        row = group + (8 if self.m == 16 and register % 2 else 0)
        return row, (register // (self.m // 8)) * 4 * self.per_register + thread * self.per_register + i

    def b_element(self, lane: int, register: int, i: int) -> tuple[int, int]:
        group, thread = divmod(lane, 4)
        return register * 4 * self.per_register + thread * self.per_register + i, group

    def c_element(self, lane: int, register: int) -> tuple[int, int]:
        group, thread = divmod(lane, 4)
        return group + 8 * (register >> 1), thread * 2 + (register & 1)


def execute(opcode: str, shape: Shape, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """D as words [m, 8]; ``a``, ``b``: codes of the elements, ``c``: words."""
    in_a, in_b, in_c = shape.registers
    total = in_a + in_b + in_c
    words = np.zeros((32, total), np.uint32)
    for lane in range(32):
        for register in range(in_a):
            for i in range(shape.per_register):
                words[lane, register] |= np.uint32(int(a[shape.a_element(lane, register, i)]) << shape.bits * i)
        for register in range(in_b):
            for i in range(shape.per_register):
                code = int(b[shape.b_element(lane, register, i)])
                words[lane, in_a + register] |= np.uint32(code << shape.bits * i)
        for register in range(in_c):
            words[lane, in_a + in_b + register] = c[shape.c_element(lane, register)]

    def registers(first: int, count: int) -> str:
        return "{" + ", ".join(f"r{first + i}" for i in range(count)) + "}"

    body = (
        " ld.param.u64 d0, [pin]; ld.param.u64 d1, [pout]; mov.u32 r60, %tid.x;"
        f" mul.wide.u32 d2, r60, {4 * total}; add.s64 d0, d0, d2;"
        f" mul.wide.u32 d2, r60, {4 * in_c}; add.s64 d1, d1, d2;\n"
    )
    body += "".join(f" ld.global.u32 r{i}, [d0+{4 * i}];\n" for i in range(total))
    operands = [registers(30, in_c), registers(0, in_a), registers(in_a, in_b), registers(in_a + in_b, in_c)]
    body += f" {opcode} {', '.join(operands)};\n"
    body += "".join(f" st.global.u32 [d1+{4 * i}], r{30 + i};\n" for i in range(in_c))
    out = np.zeros((32, in_c), np.uint32)
    load_ptx(kernel(body)).launch("k", 1, 32, [words, out])
    result = np.zeros((shape.m, 8), np.uint32)
    for lane in range(32):
        for register in range(in_c):
            result[shape.c_element(lane, register)] = out[lane, register]
    return result


def integer_cases() -> Iterator[tuple[Shape, str, str, bool]]:
    for a in ("s8", "u8"):
        for b in ("s8", "u8"):
            for saturating in (False, True):
                yield Shape(16, 32, 8), a, b, saturating
                yield Shape(16, 16, 8), a, b, saturating
            yield Shape(8, 16, 8), a, b, False
    yield Shape(16, 64, 4), "s4", "u4", False
    yield Shape(16, 32, 4), "s4", "s4", False


@pytest.mark.parametrize(("shape", "type_a", "type_b", "saturating"), list(integer_cases()))
def test_integer_mma(shape: Shape, type_a: str, type_b: str, saturating: bool) -> None:
    """With accumulators over the whole range: they wrap around or saturate."""
    rng = np.random.default_rng(5)
    a, b = rng.integers(0, 1 << shape.bits, (shape.m, shape.k)), rng.integers(0, 1 << shape.bits, (shape.k, 8))
    c = rng.integers(0, 2**32, (shape.m, 8)).astype(np.uint32)
    c[0], c[1] = 0x7FFFFFFF, 0x80000000
    name = f"mma.sync.aligned.m{shape.m}n8k{shape.k}.row.col{'.satfinite' if saturating else ''}"
    got = execute(f"{name}.s32.{type_a}.{type_b}.s32", shape, a, b, c)

    def value(code: int, ty: str) -> int:
        return signed(int(code), shape.bits) if ty[0] == "s" else int(code)

    for i in range(shape.m):
        for j in range(8):
            total = signed(int(c[i, j]), 32)
            total += sum(value(a[i, k], type_a) * value(b[k, j], type_b) for k in range(shape.k))
            want = max(-(2**31), min(2**31 - 1, total)) if saturating else signed(total, 32)
            assert signed(int(got[i, j]), 32) == want, (i, j)


@pytest.mark.parametrize(("ty", "k"), [("f16", 16), ("f16", 8), ("bf16", 16), ("bf16", 8)])
def test_half_mma_with_single_accumulators(ty: str, k: int) -> None:
    """Rounded once, from the exact sum: within one unit in the last place of it."""
    rng, form, shape = random.Random(6), FORMATS[ty], Shape(16, k, 16)

    def codes(rows: int, columns: int) -> np.ndarray:
        values = [[form.encode(Fraction(rng.gauss(0, 1))) for _ in range(columns)] for _ in range(rows)]
        return np.array(values, np.int64)

    a, b = codes(16, k), codes(k, 8)
    c = np.random.default_rng(7).standard_normal((16, 8)).astype(np.float32)
    got = execute(f"mma.sync.aligned.m16n8k{k}.row.col.f32.{ty}.{ty}.f32", shape, a, b, c.view(np.uint32))
    for i in range(16):
        for j in range(8):
            exact = Fraction(float(c[i, j])) + sum(
                form.decode(int(a[i, x])) * form.decode(int(b[x, j])) for x in range(k)
            )
            result = got[i : i + 1, j].copy().view(np.float32)[0]
            assert abs(Fraction(float(result)) - exact) <= Fraction(float(np.spacing(np.abs(result))))


# ------------------------------------------------------------------------------------ ldmatrix and its kin
MATRIX_CASES = [(number, transposed) for number in (1, 2, 4) for transposed in (False, True)]


def row_numbers(number: int) -> list[int]:
    """Where the rows of the matrices lie among 32 rows of shared memory, in disorder."""
    return random.Random(number).sample(range(32), 8 * number)


def matrix_program(number: int, transposed: bool, more: str = "") -> str:
    """Put 32 rows of 16 bytes into shared memory, load matrices from the rows that follow in the input."""
    registers = ",".join(f"r{10 + i}" for i in range(number))
    trans = ".trans" if transposed else ""
    body = (
        " ld.param.u64 d0, [pin]; ld.param.u64 d1, [pout]; mov.u32 r0, %tid.x; mul.wide.u32 d2, r0, 16;\n"
        " add.s64 d3, d0, d2; add.s64 d5, d1, d2; ld.global.v4.u32 {r1,r2,r3,r4}, [d3]; mov.u32 r5, sm;\n"
        " shl.b32 r6, r0, 4; add.u32 r6, r5, r6; st.shared.v4.u32 [r6], {r1,r2,r3,r4}; bar.sync 0;\n"
        " mul.wide.u32 d4, r0, 4; add.s64 d4, d4, d0; ld.global.u32 r7, [d4+512]; shl.b32 r7, r7, 4;\n"
        f" add.u32 r7, r7, r5; ldmatrix.sync.aligned.m8n8.x{number}{trans}.shared.b16 {{{registers}}}, [r7];\n"
    )
    if not more:
        more = "".join(f" st.global.u32 [d5+{4 * i}], r{10 + i};\n" for i in range(number))
    return kernel(body + more, ".shared .align 16 .b8 sm[1024];\n")


def matrix_input(number: int) -> tuple[np.ndarray, np.ndarray]:
    rows = np.arange(32 * 8, dtype=np.uint16).reshape(32, 8)
    numbers = np.zeros(32, np.uint32)
    numbers[: 8 * number] = row_numbers(number)
    return rows, np.concatenate([rows.reshape(-1).view(np.uint8), numbers.view(np.uint8)])


@pytest.mark.parametrize(("number", "transposed"), MATRIX_CASES)
def test_ldmatrix(number: int, transposed: bool) -> None:
    rows, data = matrix_input(number)
    out = np.zeros((32, 4), np.uint32)
    load_ptx(matrix_program(number, transposed)).launch("k", 1, 32, [data, out])
    for lane in range(32):
        for i in range(number):
            matrix = rows[row_numbers(number)[8 * i : 8 * i + 8]]
            matrix = matrix.T if transposed else matrix
            low, high = (int(matrix[lane // 4, lane % 4 * 2 + half]) for half in (0, 1))
            assert int(out[lane, i]) == low | high << 16


@pytest.mark.parametrize(("number", "transposed"), MATRIX_CASES)
def test_stmatrix_is_the_inverse_of_ldmatrix(number: int, transposed: bool) -> None:
    rows, data = matrix_input(number)
    registers = ",".join(f"r{10 + i}" for i in range(number))
    more = (
        f" stmatrix.sync.aligned.m8n8.x{number}{'.trans' if transposed else ''}.shared.b16 [r7+512], {{{registers}}};\n"
        " bar.sync 0; ld.shared.v4.u32 {r1,r2,r3,r4}, [r6+512]; st.global.v4.u32 [d5], {r1,r2,r3,r4};\n"
    )
    out = np.zeros((32, 8), np.uint16)
    # Rows that are not stored stay uninitialised.
    load_ptx(matrix_program(number, transposed, more)).launch("k", 1, 32, [data, out], hazards="off")
    written = row_numbers(number)
    assert np.array_equal(out[written], rows[written])
    assert not np.isin(out, rows[written])[[row for row in range(32) if row not in written]].any()


def test_movmatrix_transposes() -> None:
    rows, data = matrix_input(1)
    more = " movmatrix.sync.aligned.m8n8.trans.b16 r20, r10; st.global.u32 [d5], r20;\n"
    out = np.zeros((32, 4), np.uint32)
    load_ptx(matrix_program(1, False, more)).launch("k", 1, 32, [data, out])
    assert np.array_equal(out[:, :1].copy().view(np.uint16).reshape(8, 8), rows[row_numbers(1)].T)
