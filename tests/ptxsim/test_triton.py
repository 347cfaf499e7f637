"""What Triton's compiler emits executes: compiled ahead of time, against numpy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ptq4arvg_kernels.backends.triton.launch import Launch
from tests.ptxsim import triton_cases as cases
from tests.ptxsim.triton_launcher import EmulatedDevice, LaunchRecord

pytestmark = cases.COMPILED_ONLY

ARCHITECTURES = [80, 90]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def run(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: dict[str, Any],
    constants: dict[str, Any],
    warps: int = 4,
    stages: int = 3,
    capability: int = 80,
    **options: Any,
) -> LaunchRecord:
    device = EmulatedDevice(capability, **options)
    device(Launch(kernel, grid, arguments, constants, warps, stages))
    return device.records[-1]


def random_codes(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def product(a: Tensor, b: Tensor) -> np.ndarray:
    return a.numpy().astype(np.int64) @ b.numpy().astype(np.int64).T


def check_gemm(
    capability: int, tile: tuple[int, int, int], stages: int, shape: tuple[int, int, int], warps: int
) -> None:
    (m, n, k), (bm, bn, bk) = shape, tile
    a, b = random_codes(m, k), random_codes(n, k, seed=1)
    a[:, :3], b[0] = -128, -128
    c = torch.full((m, n), 77, dtype=torch.int32)
    record = run(
        cases.int8_gemm,
        (-(-m // bm), -(-n // bn)),
        {"a": a, "b": b, "c": c, "M": m, "N": n, "K": k},
        {"BM": bm, "BN": bn, "BK": bk},
        warps,
        stages,
        capability,
    )
    assert np.array_equal(c.numpy(), product(a, b))
    assert record.result.classes["mma"] > 0


@pytest.mark.parametrize(
    ("tile", "stages"),
    [((16, 64, 128), 2), ((32, 64, 128), 3), ((64, 128, 128), 4), ((128, 128, 64), 3), ((16, 128, 64), 1)],
)
def test_int8_dot(tile: tuple[int, int, int], stages: int) -> None:
    """Several blocks and ragged edges; several trips through the pipeline."""
    check_gemm(80, tile, stages, (tile[0] + 5, tile[1] + 7, 3 * tile[2] + 16), 4)


@pytest.mark.parametrize("tile", [(16, 64, 128), (64, 128, 128), (64, 64, 64), (64, 64, 32)])
def test_int8_dot_on_sm_90(tile: tuple[int, int, int]) -> None:
    """mma for 16 rows, else wgmma, with the swizzle of each width of the K tile."""
    check_gemm(90, tile, 3, (tile[0] + 5, tile[1] + 7, 3 * tile[2] + 16), 4)


def test_unaligned_depth_of_int8_dot() -> None:
    """A K that is not divisible by 16 loads byte by byte; promised otherwise, it would fault."""
    check_gemm(80, (16, 64, 64), 3, (3, 65, 77), 4)


@pytest.mark.slow
@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("rows", [16, 32, 64, 128])
@pytest.mark.parametrize("columns", [64, 128])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("warps", [4, 8])
def test_int8_dot_of_all_tiles(capability: int, rows: int, columns: int, stages: int, warps: int) -> None:
    check_gemm(capability, (rows, columns, 64), stages, (rows - 3, columns + 1, 5 * 64), warps)


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_split_k_with_a_last_block(capability: int) -> None:
    """Atomic partial sums in any order are exact, the last block sees them all, and the workspace is clean again."""
    m, n, k = 13, 96, 512
    a, b = random_codes(m, k), random_codes(n, k, seed=1)
    partial, counter = torch.zeros(m, n, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    out = torch.zeros(m, n)
    arguments = {
        "a": a,
        "b": b,
        "partial": partial,
        "counter": counter,
        "out": out,
        "scale": 0.5,
        "M": m,
        "N": n,
        "K": k,
    }
    for _ in range(2):
        out.zero_()
        run(cases.split_k_gemm, (2, 3), arguments, {"BM": 16, "BN": 64, "BK": 64}, capability=capability)
        assert np.array_equal(out.numpy(), product(a, b).astype(np.float32) * 0.5)
        assert not partial.any()
        assert not counter.any()


@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_float_dot(capability: int, dtype: torch.dtype) -> None:
    """float32 goes through tf32."""
    gen = torch.Generator().manual_seed(2)
    a, b = torch.randn(64, 32, generator=gen).to(dtype), torch.randn(32, 64, generator=gen).to(dtype)
    c = torch.zeros(64, 64)
    run(cases.float_dot, (1,), {"a": a, "b": b, "c": c}, {"BM": 64, "BN": 64, "BK": 32}, capability=capability)
    exact = a.double() @ b.double()
    slack = (a.double().abs() @ b.double().abs()) * (2.0**-10 if dtype == torch.float32 else 2.0**-22)
    assert ((c.double() - exact).abs() <= slack).all()


@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "width"), [(torch.float16, 64), (torch.bfloat16, 128), (torch.float16, 32)])
def test_attention(capability: int, dtype: torch.dtype, width: int) -> None:
    count, gen = 150, torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(count, width, generator=gen).to(dtype) for _ in range(3))
    out = torch.zeros_like(q)
    scale = math.log2(math.e) / math.sqrt(width)
    arguments = {"q": q, "k": k, "v": v, "out": out, "n": count, "scale": scale}
    run(cases.attention, (3,), arguments, {"BM": 64, "BN": 64, "D": width}, capability=capability)
    exact = torch.nn.functional.scaled_dot_product_attention(q.double()[None], k.double()[None], v.double()[None])[0]
    assert (out.double() - exact).abs().max() < (2e-2 if dtype == torch.bfloat16 else 2e-3)


def test_inline_assembly_on_packed_bytes() -> None:
    codes = torch.randint(0, 64, (4, 200), generator=torch.Generator().manual_seed(4)).to(torch.uint8)
    spare = torch.stack([codes[3] >> 4, codes[3] >> 2 & 3, codes[3] & 3])
    packed = (codes[:3] << 2 | spare).contiguous()
    out = torch.zeros(4, 200, dtype=torch.int8)
    run(cases.unpack_planes, (1,), {"packed": packed, "out": out, "n": 200}, {"BLOCK": 256})
    assert torch.equal(out.view(torch.uint8), codes << 2)


# Name, exact value, and the error allowed in units in the last place of float32.
FUNCTIONS: list[tuple[str, Callable[[np.ndarray], np.ndarray], float]] = [
    ("exp2", np.exp2, 1),
    ("log2", np.log2, 1),
    ("erf", np.vectorize(math.erf), 2),
    ("rsqrt", lambda x: 1 / np.sqrt(x), 1),
    ("sqrt", np.sqrt, 1),
    ("sqrt_rn", np.sqrt, 0.5),
    ("div_rn", lambda x: 1 / x, 0.5),
    ("quotient", lambda x: 3 / x, 1),
    ("exp", lambda x: np.exp(-x), 12),  # the argument of ex2 is rounded
    ("log", np.log, 4),
    ("sigmoid", lambda x: 1 / (1 + np.exp(-x)), 4),
    ("tanh", np.tanh, 3),
    ("sin", np.sin, 2),
    ("cos", np.cos, 2),
    ("floor + ceil", lambda x: np.floor(x) + np.ceil(x), 0),
    ("rint", np.rint, 0),
    ("fma", lambda x: x * x - 1, 0.5),
]


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_elementary_functions(capability: int) -> None:
    x = torch.rand(333, generator=torch.Generator().manual_seed(5)) * 10 + 0.01
    out = torch.zeros(len(FUNCTIONS), len(x))
    run(cases.functions, (1,), {"x": x, "out": out, "n": len(x)}, {"BLOCK": 512}, capability=capability)
    for row, (name, function, allowed) in zip(out.numpy(), FUNCTIONS, strict=True):
        exact = function(x.double().numpy())
        ulp = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
        # A thousandth for the rounding of the yardstick itself.
        assert (np.abs(row - exact) <= (allowed + 1e-3) * ulp).all(), (name, (np.abs(row - exact) / ulp).max())


@pytest.mark.parametrize(
    ("width", "block", "warps"),
    [(768, 1024, 4), (1408, 2048, 8), (8704, 16384, 16), (8704, 16384, 4)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_row_statistics(width: int, block: int, warps: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, width + 8, generator=torch.Generator().manual_seed(6)).to(dtype)
    out = torch.zeros(2, 4)
    arguments = {"x": x, "out": out, "width": width, "stride": width + 8}
    run(cases.row_statistics, (2,), arguments, {"BLOCK": block}, warps)
    rows = x[:, :width].double()
    centred = rows - rows.mean(1, keepdim=True)
    assert torch.allclose(out[:, 0].double(), rows.sum(1), rtol=0, atol=1e-6 * float(rows.abs().sum(1).max()))
    assert torch.equal(out[:, 1].double(), rows.max(1).values)
    assert torch.allclose(out[:, 2].double(), (centred * centred).sum(1), rtol=1e-5)
    top = out[:, 3].long()
    assert torch.equal(rows.gather(1, top[:, None])[:, 0], rows.max(1).values)


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_quantization_and_conversions(source: torch.dtype, target: torch.dtype) -> None:
    """Codes round half to even and saturate; every pair of precisions rounds as torch does."""
    x = (torch.randn(3, 700, generator=torch.Generator().manual_seed(7)) * 4).to(source)
    x[0, :8] = torch.tensor([0.25, 0.75, -0.25, 1.25, 100.0, -100.0, 0.0, -0.75])
    codes, half, sums = (
        torch.zeros(3, 700, dtype=torch.int8),
        torch.zeros(3, 700).to(target),
        torch.zeros(3, dtype=torch.int32),
    )
    arguments = {"x": x, "codes": codes, "half_out": half, "sums": sums, "width": 700, "inverse": 2.0, "zero": 3.0}
    run(cases.quantize_rows, (3,), arguments, {"BLOCK": 1024})
    want = np.clip(np.rint(x.double().numpy() * 2) + 3, -128, 127)
    assert np.array_equal(codes.numpy(), want)
    assert np.array_equal(sums.numpy(), want.sum(1))
    assert torch.equal(half, x.float().to(target))


def test_rearrangements_of_bytes() -> None:
    x = random_codes(256)
    out = torch.zeros(5, 256, dtype=torch.int8)
    run(cases.rearrange, (1,), {"x": x, "out": out}, {"BLOCK": 256})
    v = x.numpy()
    assert np.array_equal(out[0], np.concatenate([v[::2], v[1::2]]))
    assert np.array_equal(out[1], np.stack([v[1::2], v[::2]], 1).reshape(-1))
    assert np.array_equal(out[2], v.reshape(16, 16).T.reshape(-1))
    assert np.array_equal(out[3], np.cumsum(v.astype(np.int64)).astype(np.int8))
    assert np.array_equal(out[4], np.sort(v))


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_rows_by_a_table_of_positions(index: torch.dtype) -> None:
    table, positions = torch.randn(9, 100), torch.tensor([8, 0, 3, 3], dtype=index)
    out = torch.zeros(4, 100)
    arguments = {"table": table, "positions": positions, "out": out, "width": 100, "far": 100}
    run(cases.gather_rows, (4,), arguments, {"BLOCK": 128})
    assert torch.equal(out, table[positions.long()])


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_atomics(capability: int) -> None:
    count, block = 100, 128
    values = torch.randint(-1000, 1000, (count,), generator=torch.Generator().manual_seed(8)).to(torch.int32)
    cells, old = torch.zeros(16 + block + 1, dtype=torch.int32), torch.zeros(count, dtype=torch.int32)
    arguments = {"cells": cells, "old": old, "value": values, "n": count}
    run(cases.atomics, (1,), arguments, {"BLOCK": block}, capability=capability)
    groups = [values[i::4].numpy() for i in range(4)]
    assert cells[:4].tolist() == [group.sum() for group in groups]
    assert cells[4:8].tolist() == [max(group.max(), 0) for group in groups]
    assert cells[8:12].tolist() == [min(group.min(), 0) for group in groups]
    assert cells[12:16].tolist() == [np.bitwise_or.reduce(group) for group in groups]
    assert torch.equal(cells[16 : 16 + count], values)
    assert cells[16 + count :].tolist() == [0] * (block - count) + [5]
    for i, group in enumerate(groups):  # threads take their turns in order
        assert np.array_equal(old[i::4].numpy(), np.cumsum(group) - group)
