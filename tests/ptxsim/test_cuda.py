"""CUDA kernels compiled by nvcc: right results, and planted bugs are caught."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pytest

from tests.ptxsim import HazardError, MemFault, Module, Pointer, PTXError, Result, Struct
from tests.ptxsim.conftest import Cuda

ARCHITECTURES = [80, 90]
ONE_WARP_AT_A_TIME = ["warp_serial", "warp_reverse", "random"]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("count", [1, 1000, 5555])
def test_vector_add(cuda: Cuda, rng: np.random.Generator, arch: int, count: int) -> None:
    a, b, c = rng.random(count, dtype=np.float32), rng.random(count, dtype=np.float32), np.zeros(count, np.float32)
    cuda("vecadd", arch).launch("vecadd", -(-count // 256), 256, [a, b, c, count])
    assert np.array_equal(c, a + b)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_vector_add_by_four(cuda: Cuda, rng: np.random.Generator, arch: int) -> None:
    a, b, c = rng.random(4000, dtype=np.float32), rng.random(4000, dtype=np.float32), np.zeros(4000, np.float32)
    cuda("vecadd", arch).launch("vecadd4", 3, 96, [a, b, c, 1000])
    assert np.array_equal(c, a + b)


def gemm(
    module: Module, rows: int, columns: int, inner: int, kernel: str = "gemm_s8", **options: Any
) -> tuple[np.ndarray, np.ndarray, Result]:
    """Result and reference of C = half(fma(acc * sa, sb, bias))."""
    rng = np.random.default_rng(1)
    a = rng.integers(-128, 128, (rows, inner)).astype(np.int8)
    b = rng.integers(-128, 128, (columns, inner)).astype(np.int8)
    scale_a, scale_b = (rng.random(size, dtype=np.float32) * np.float32(0.01) for size in (rows, columns))
    bias, c = rng.random(columns, dtype=np.float32), np.full((rows, columns), np.nan, np.float16)
    grid = (-(-columns // 64), -(-rows // 64))
    args = [a, b, scale_a, scale_b, bias, c, rows, columns, inner]
    result = module.launch(kernel, grid, 128, args, **options)
    product = (a.astype(np.int32) @ b.astype(np.int32).T).astype(np.float32) * scale_a[:, None]
    # The product with sb is exact in float64.
    expected = (product.astype(np.float64) * scale_b + bias).astype(np.float32).astype(np.float16)
    return c, expected, result


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("shape", [(64, 64, 64), (1, 64, 128), (77, 130, 208), (5, 3, 16), (128, 64, 512)])
def test_int8_gemm(cuda: Cuda, arch: int, shape: tuple[int, int, int]) -> None:
    got, expected, _ = gemm(cuda("gemm_s8", arch), *shape)
    assert np.array_equal(got, expected)


@pytest.mark.parametrize("schedule", ONE_WARP_AT_A_TIME)
def test_int8_gemm_one_warp_at_a_time(cuda: Cuda, schedule: str) -> None:
    got, expected, _ = gemm(cuda("gemm_s8"), 77, 130, 144, schedule=schedule)
    assert np.array_equal(got, expected)


def test_int8_gemm_in_two_processes(cuda: Cuda) -> None:
    got, expected, _ = gemm(cuda("gemm_s8"), 77, 130, 208, workers=2)
    assert np.array_equal(got, expected)


def test_swizzle_shows_in_the_bank_conflicts(cuda: Cuda) -> None:
    assert gemm(cuda("gemm_s8"), 64, 64, 256)[2].metrics()["bank_conflict_factor"] == 1.0
    got, expected, result = gemm(cuda("gemm_s8"), 64, 64, 256, "gemm_unswizzled")
    assert np.array_equal(got, expected)
    assert result.metrics()["ldmatrix_bank_conflict_factor"] == 4.0


@pytest.mark.parametrize(
    ("bug", "error", "message"),
    [
        (1, HazardError, "race-RAW"),  # no barrier after the wait
        (2, HazardError, "cp.async-pending"),  # no wait
        (3, MemFault, "out-of-bounds global"),  # no guard for the rows of A
        (5, HazardError, "race-WAR"),  # no barrier at the end of the loop
        (6, MemFault, "misaligned"),  # ldmatrix from an address not divisible by 16
    ],
)
def test_planted_bug_is_an_error(cuda: Cuda, bug: int, error: type[PTXError], message: str) -> None:
    with pytest.raises(error, match=message):
        gemm(cuda("gemm_s8"), 77, 130, 256, f"gemm_bug{bug}")


def test_wrong_fragment_addresses_give_wrong_numbers(cuda: Cuda) -> None:
    got, expected, _ = gemm(cuda("gemm_s8"), 77, 130, 256, "gemm_bug4")
    assert not np.array_equal(got, expected)


@pytest.mark.parametrize("bug", [1, 2])
def test_missing_synchronisation_gives_wrong_numbers_one_warp_at_a_time(cuda: Cuda, bug: int) -> None:
    got, expected, _ = gemm(cuda("gemm_s8"), 77, 130, 256, f"gemm_bug{bug}", hazards="off", schedule="warp_serial")
    assert not np.array_equal(got, expected)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("rows", "width", "threads"), [(3, 1000, 128), (2, 37, 64), (4, 513, 96)])
def test_softmax_with_dynamic_shared_memory(
    cuda: Cuda, rng: np.random.Generator, arch: int, rows: int, width: int, threads: int
) -> None:
    x = (rng.standard_normal((rows, width)) * 3).astype(np.float16)
    y, codes, scales = np.zeros_like(x), np.zeros(x.shape, np.int8), np.zeros(rows, np.float32)
    module = cuda("softmax", arch)
    module.launch("softmax_q", rows, threads, [x, y, codes, scales, width], shared_bytes=4 * width)
    exponentials = np.exp(x.astype(np.float64) - x.max(1, keepdims=True))
    exact = exponentials / exponentials.sum(1, keepdims=True)
    top = exact.max(1, keepdims=True)
    assert np.abs(y - exact).max() < 1e-3
    assert np.allclose(scales, top[:, 0] / 127, rtol=1e-5)
    assert np.abs(codes - exact / top * 127).max() < 0.5 + 1e-3


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_histogram_with_atomics(cuda: Cuda, rng: np.random.Generator, arch: int) -> None:
    x, counts = rng.integers(0, 256, 5000).astype(np.uint8), np.zeros(16, np.int32)
    cuda("softmax", arch).launch("hist", 3, 128, [x, counts, 5000])
    assert np.array_equal(counts, np.bincount(x & 15, minlength=16))


def test_source_lines_are_known(cuda: Cuda) -> None:
    instructions = cuda("vecadd").kernels["vecadd"].instructions
    assert any(instruction.source and instruction.source[0] == "vecadd.cu" for instruction in instructions)


# ------------------------------------------------------------------------------------ wide.cu
def signed(value: int, bits: int = 32) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> bits - 1 else value


def divided(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def wide_integer(v: int) -> int:
    """What the kernel ``wide`` computes of an int, in Python."""
    u = v & 0xFFFFFFFF
    bits = f"{u:032b}"
    r = signed(signed(v * (u & 15) + (4, -5, 6)[(u & 15) % 3]) + 9)
    r = (r + 3, r * 5, r ^ 77, r - v, r << 2, divided(r, 3), -r)[u % 7]
    r += divided(v * 1000003, 1 + (u & 255)) + u % 97

    def byte(word: int, i: int) -> int:
        return word >> 8 * i & 255

    inverted = ~u & 0xFFFFFFFF
    permuted = byte(inverted, 1) | byte(u, 0) << 8 | byte(inverted, 3) << 16 | byte(u, 2) << 24
    dot = 5 + sum(signed(byte(u, i), 8) * signed(byte(0x01FF7F80, i), 8) for i in range(4))
    funnel = (inverted << 32 | u) >> (v & 31) & 0xFFFFFFFF
    # C adds the int and unsigned terms modulo 2^32.
    counts = u.bit_count() + (32 - u.bit_length()) + (u & -u).bit_length() + int(bits[::-1], 2)
    r += (dot + permuted + funnel + counts) & 0xFFFFFFFF
    bytes_added = sum((byte(u, i) + byte(0x01020304, i) & 255) << 8 * i for i in range(4))
    r += ((1, 2, 3, 5, 8, 13, 21, 34)[u & 7] + bytes_added) & 0xFFFFFFFF
    high = (v * 12345 >> 32) + signed(u * 54321 >> 32)
    r += signed(signed(u >> 3, 8) + max(min(v, 100), -100) + signed(abs(v)) + high)
    return signed(r, 64)


def wide_float(h: float) -> float:
    """What the kernel ``wide`` computes of a float, in double precision but for the steps in halves."""

    def half(value: float) -> float:
        return float(np.float16(np.float32(value)))

    bits = int(np.float32(h).view(np.uint32))
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16
    bf16 = float(np.array([bits], np.uint32).view(np.float32)[0])
    total = math.exp(h) + math.log(abs(h) + 1) + math.sin(h) + math.tanh(h) + (h * h + 1) ** -0.5 + math.erf(h)
    total += (abs(h) + 0.5) ** 1.7 + math.fmod(h, float(np.float32(0.7))) + 1.5
    total += half(half(h) * 2 + 1) + half(half(h) + 0.5) * half(half(2 * h) + 0.5)
    return total + bf16 + math.floor(h) + math.ceil(h) + math.trunc(h) + round(h) + math.sqrt(abs(h))


def test_broad_instruction_coverage(cuda: Cuda) -> None:
    """Switch, struct by value, local arrays, constants, printf, assert, 64-bit division, intrinsics."""
    rng, count = np.random.default_rng(3), 500
    x = rng.integers(-(2**31), 2**31, count).astype(np.int32)
    x[:5] = [0, -1, 1, 2**31 - 1, -(2**31)]
    f = (rng.standard_normal(count) * 3).astype(np.float32)
    integers, floats = np.zeros(count, np.int64), np.zeros(count, np.float32)
    struct_p = struct.pack("<if3hxx", 9, 1.5, 4, -5, 6)
    cuda("wide").launch("wide", 4, 128, [x, f, integers, floats, struct_p, count])
    assert integers.tolist() == [wide_integer(int(v)) for v in x]
    exact = np.array([wide_float(float(h)) for h in f])
    assert (np.abs(floats - exact) <= 1e-5 * np.maximum(1, np.abs(exact))).all()


@pytest.mark.parametrize("schedule", ["lockstep", *ONE_WARP_AT_A_TIME])
def test_nested_divergence(cuda: Cuda, schedule: str) -> None:
    x = np.random.default_rng(4).integers(0, 60, 128).astype(np.int32)
    out = np.zeros(128, np.int32)
    cuda("wide").launch("div_loop", 1, 128, [x, out, 128], schedule=schedule)

    def loop(thread: int) -> int:
        total = 0
        for k in range(x[thread]):
            if k == 7:
                continue
            for j in range(k & 3):
                total += j * k
                if total > 500:
                    return total
            if (k ^ thread) % 11 == 10:
                break
        return total

    sums = np.array([loop(thread) for thread in range(128)]).reshape(4, 32).sum(1)
    odd = (x & 1).reshape(4, 32).sum(1)
    assert np.array_equal(
        out.reshape(4, 32), np.broadcast_to((sums + odd)[:, None], (4, 32)) + np.flatnonzero(x & 1).max()
    )


def test_pointers_inside_a_struct(cuda: Cuda) -> None:
    """Two pointers into one array, one into another; the array is one buffer, and windows hold."""
    data = np.arange(64, dtype=np.int32)
    out = np.zeros(16, np.int32)
    raw = struct.pack("<QQQi4x", 0, 0, 0, 16)
    pointers = {0: Pointer(data, 0, 64), 8: Pointer(data, 128, 64), 16: Pointer(out)}
    cuda("struct").launch("add_struct", 1, 32, [Struct(raw, pointers)])
    assert np.array_equal(out, data[:16] + data[32:48])
    with pytest.raises(MemFault, match="out-of-bounds global"):
        cuda("struct").launch("add_struct", 1, 32, [Struct(raw, pointers | {8: Pointer(data, 128, 60)})])
