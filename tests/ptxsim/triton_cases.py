"""Triton kernels that exercise what the Triton backend may use; small enough to be emulated in a moment."""

from __future__ import annotations

import pytest
import triton
import triton.language as tl
from triton.language.extra import libdevice

COMPILED_ONLY = pytest.mark.skipif(
    triton.knobs.runtime.interpret,
    reason="TRITON_INTERPRET=1: Triton interprets functions in this process instead of compiling them",
)


@triton.jit
def vector_add(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    tl.store(out + i, tl.load(x + i, mask=inside) + tl.load(y + i, mask=inside), mask=inside)


@triton.jit
def int8_gemm(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """C int32 [M, N] = A int8 [M, K] by B int8 [N, K] transposed."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), dtype=tl.int32)
    for start in range(0, K, BK):
        inside = (start + k)[None, :] < K
        left = tl.load(a + rows[:, None] * K + (start + k)[None, :], mask=(rows[:, None] < M) & inside, other=0)
        right = tl.load(b + columns[:, None] * K + (start + k)[None, :], mask=(columns[:, None] < N) & inside, other=0)
        acc = tl.dot(left, right.T, acc, out_dtype=tl.int32)
    tl.store(c + rows[:, None] * N + columns[None, :], acc, mask=(rows[:, None] < M) & (columns[None, :] < N))


@triton.jit
def split_k_gemm(a, b, partial, counter, out, scale, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """int32 partial sums by atomics; the block that comes last scales the tile and clears the workspace."""
    rows, columns, k = tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.zeros((BM, BN), dtype=tl.int32)
    for start in range(tl.program_id(1) * BK, K, tl.num_programs(1) * BK):
        left = tl.load(a + rows[:, None] * K + (start + k)[None, :], mask=rows[:, None] < M, other=0)
        right = tl.load(b + columns[:, None] * K + (start + k)[None, :], mask=columns[:, None] < N, other=0)
        acc = tl.dot(left, right.T, acc, out_dtype=tl.int32)
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    place = rows[:, None] * N + columns[None, :]
    tl.atomic_add(partial + place, acc, mask=inside, sem="relaxed")
    tl.debug_barrier()
    if tl.atomic_add(counter + tl.program_id(0), 1, sem="acq_rel", scope="gpu") == tl.num_programs(1) - 1:
        total = tl.load(partial + place, mask=inside, other=0, cache_modifier=".cg")
        tl.store(out + place, total.to(tl.float32) * scale, mask=inside)
        tl.store(partial + place, tl.zeros((BM, BN), dtype=tl.int32), mask=inside)
        tl.store(counter + tl.program_id(0), 0)


@triton.jit
def float_dot(a, b, c, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    left, right = tl.load(a + m[:, None] * BK + k[None, :]), tl.load(b + k[:, None] * BN + n[None, :])
    tl.store(c + m[:, None] * BN + n[None, :], tl.dot(left, right))


@triton.jit
def attention(q, k, v, out, n, scale, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr):
    """Softmax(q k^T scale) v with running maxima; ``scale`` in units of log2(e)."""
    m, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, D)
    query = tl.load(q + m[:, None] * D + d[None, :], mask=m[:, None] < n, other=0)
    top, total = tl.full((BM,), float("-inf"), tl.float32), tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    for start in range(0, n, BN):
        j = start + tl.arange(0, BN)
        key = tl.load(k + j[:, None] * D + d[None, :], mask=j[:, None] < n, other=0)
        scores = tl.where(j[None, :] < n, tl.dot(query, key.T) * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        p, shrink = tl.exp2(scores - higher[:, None]), tl.exp2(top - higher)
        total, top = total * shrink + tl.sum(p, 1), higher
        value = tl.load(v + j[:, None] * D + d[None, :], mask=j[:, None] < n, other=0)
        acc = acc * shrink[:, None] + tl.dot(p.to(value.dtype), value)
    tl.store(out + m[:, None] * D + d[None, :], (acc / total[:, None]).to(out.dtype.element_ty), mask=m[:, None] < n)


@triton.jit
def unpack_planes(packed, out, n, BLOCK: tl.constexpr):
    """Planes a, b, c of bytes to four: left-justified six-bit codes, the fourth from the two spare bits of each."""
    i = tl.arange(0, BLOCK)
    inside = i < n
    a = tl.load(packed + i, mask=inside)
    b = tl.load(packed + n + i, mask=inside)
    c = tl.load(packed + 2 * n + i, mask=inside)
    planes = tl.inline_asm_elementwise(
        """
        {
            .reg .b32 x, y, z;
            and.b32 $0, $4, 0xFCFCFCFC;
            and.b32 $1, $5, 0xFCFCFCFC;
            and.b32 $2, $6, 0xFCFCFCFC;
            shl.b32 x, $4, 6;
            shl.b32 y, $5, 4;
            shl.b32 z, $6, 2;
            and.b32 x, x, 0xC0C0C0C0;
            lop3.b32 x, y, 0x30303030, x, 0xEA;
            lop3.b32 $3, z, 0x0C0C0C0C, x, 0xEA;
        }
        """,
        "=&r,=&r,=&r,=&r,r,r,r",
        [a, b, c],
        dtype=(tl.int8, tl.int8, tl.int8, tl.int8),
        is_pure=True,
        pack=4,
    )
    for j in tl.static_range(4):
        tl.store(out + j * n + i, planes[j], mask=inside)


@triton.jit
def functions(x, out, n, BLOCK: tl.constexpr):
    """One row of ``out`` per function of x > 0."""
    i = tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < n, other=1.0)
    inside = i < n
    tl.store(out + 0 * n + i, tl.exp2(v), mask=inside)
    tl.store(out + 1 * n + i, tl.log2(v), mask=inside)
    tl.store(out + 2 * n + i, tl.erf(v), mask=inside)
    tl.store(out + 3 * n + i, tl.rsqrt(v), mask=inside)
    tl.store(out + 4 * n + i, tl.sqrt(v), mask=inside)
    tl.store(out + 5 * n + i, tl.sqrt_rn(v), mask=inside)
    tl.store(out + 6 * n + i, tl.div_rn(1.0, v), mask=inside)
    tl.store(out + 7 * n + i, 3.0 / v, mask=inside)
    tl.store(out + 8 * n + i, tl.exp(-v), mask=inside)
    tl.store(out + 9 * n + i, tl.log(v), mask=inside)
    tl.store(out + 10 * n + i, tl.sigmoid(v), mask=inside)
    tl.store(out + 11 * n + i, libdevice.tanh(v), mask=inside)
    tl.store(out + 12 * n + i, tl.sin(v), mask=inside)
    tl.store(out + 13 * n + i, tl.cos(v), mask=inside)
    tl.store(out + 14 * n + i, tl.floor(v) + tl.ceil(v), mask=inside)
    tl.store(out + 15 * n + i, libdevice.rint(v), mask=inside)
    tl.store(out + 16 * n + i, tl.fma(v, v, -1.0), mask=inside)


@triton.jit
def row_statistics(x, out, width, stride, BLOCK: tl.constexpr):
    """Sum, maximum, sum of squared differences from the mean, and index of the maximum of a row."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < width
    v = tl.load(x + row * stride + i, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    total = tl.sum(v, 0)
    centred = tl.where(inside, v - total / width, 0.0)
    tl.store(out + row * 4, total)
    tl.store(out + row * 4 + 1, tl.max(tl.where(inside, v, float("-inf")), 0))
    tl.store(out + row * 4 + 2, tl.sum(centred * centred, 0))
    tl.store(out + row * 4 + 3, tl.argmax(tl.where(inside, v, float("-inf")), 0).to(tl.float32))


@triton.jit
def quantize_rows(x, codes, half_out, sums, width, inverse, zero, BLOCK: tl.constexpr):
    """int8 codes by the add-and-subtract rounding, their row sums, and x in another precision."""
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    inside = i < width
    v = tl.load(x + row * width + i, mask=inside, other=0.0).to(tl.float32)
    rounded = (v * inverse + 12582912.0) - 12582912.0
    q = tl.clamp(rounded + zero, -128.0, 127.0).to(tl.int8)
    tl.store(codes + row * width + i, q, mask=inside, cache_modifier=".cg")
    tl.store(half_out + row * width + i, v.to(half_out.dtype.element_ty), mask=inside)
    tl.store(sums + row, tl.sum(tl.where(inside, q.to(tl.int32), 0), 0))


@triton.jit
def rearrange(x, out, BLOCK: tl.constexpr):
    """join, split, reshape, permute, trans, interleave of bytes, and a cumulative sum."""
    i = tl.arange(0, BLOCK)
    v = tl.load(x + i)
    even, odd = tl.split(tl.reshape(v, (BLOCK // 2, 2)))
    half = tl.arange(0, BLOCK // 2)
    tl.store(out + half, even)
    tl.store(out + BLOCK // 2 + half, odd)
    tl.store(out + BLOCK + i, tl.interleave(odd, even))
    square = tl.reshape(v, (BLOCK // 16, 16))
    tl.store(out + 2 * BLOCK + i, tl.reshape(tl.trans(square), (BLOCK,)))
    tl.store(out + 3 * BLOCK + i, tl.cumsum(v.to(tl.int32), 0).to(tl.int8))
    tl.store(out + 4 * BLOCK + i, tl.sort(v))


@triton.jit
def gather_rows(table, positions, out, width, far, BLOCK: tl.constexpr):
    """Rows picked by a device tensor; 64-bit offsets, and a volatile read."""
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    position = tl.load(positions + row).to(tl.int64)
    v = tl.load(table + position * far + i, mask=i < width, other=0, volatile=True)
    tl.store(out + row * width + i, v, mask=i < width, eviction_policy="evict_last")


@triton.jit
def atomics(cells, old, value, n, BLOCK: tl.constexpr):
    """add, max, min, or, exchange and compare-and-swap on cells that several threads share."""
    i = tl.arange(0, BLOCK)
    inside = i < n
    v = tl.load(value + i, mask=inside, other=0)
    cell = cells + i % 4
    tl.store(old + i, tl.atomic_add(cell, v, mask=inside, sem="acq_rel"), mask=inside)
    tl.atomic_max(cell + 4, v, mask=inside, sem="relaxed")
    tl.atomic_min(cell + 8, v, mask=inside, sem="release")
    tl.atomic_or(cell + 12, v, mask=inside, sem="acquire", scope="cta")
    tl.atomic_xchg(cells + 16 + i, v, mask=inside)
    tl.atomic_cas(cells + 16 + BLOCK, 0, 5)


@triton.jit
def shared_exchange(x, out, BLOCK: tl.constexpr):
    """The transposition needs shared memory and a barrier in between."""
    m = tl.arange(0, BLOCK)
    v = tl.load(x + m[:, None] * BLOCK + m[None, :])
    tl.store(out + m[:, None] * BLOCK + m[None, :], tl.trans(v) + 0)
