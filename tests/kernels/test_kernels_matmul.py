"""The exact integer products of the reference: all three paths, extremes included."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptq4arvg_kernels.backends.reference import matmul
from tests.kernels.kernel_cases import generator

PATHS = [matmul.int_matmul, matmul._by_float64, matmul._by_float32_chunks]


@pytest.mark.parametrize("path", PATHS)
@given(st.integers(0, 5), st.integers(1, 7), st.integers(1, 2100), st.integers(0, 1000))
def test_random_products(path: Callable, rows: int, width: int, inner: int, seed: int) -> None:
    gen = generator(seed)
    a = torch.randint(-128, 128, (rows, inner), generator=gen).to(torch.int8)
    b = torch.randint(-128, 128, (width, inner), generator=gen).to(torch.int8)
    got = path(a, b)
    assert got.dtype == torch.int32
    assert np.array_equal(got.numpy(), a.numpy().astype(np.int64) @ b.numpy().astype(np.int64).T)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("inner", [1023, 1024, 1025, 8704])
@pytest.mark.parametrize(("a", "b"), [(-128, -128), (-128, 127), (127, 127), (-128, -127)])
def test_longest_sums_of_extreme_codes(path: Callable, inner: int, a: int, b: int) -> None:
    left = torch.full((2, inner), a, dtype=torch.int8)
    right = torch.full((3, inner), b, dtype=torch.int8)
    left[1, 0] = 1  # not a round sum: it needs all the bits float32 has
    got = path(left, right)
    assert got[0].tolist() == [a * b * inner] * 3
    assert got[1].tolist() == [a * b * (inner - 1) + b] * 3


def test_wide_dtype() -> None:
    assert matmul.wide_dtype(torch.device("cpu")) == torch.float64
    assert matmul.wide_dtype(torch.device("cuda")) == torch.float64
    assert matmul.wide_dtype(torch.device("mps")) == torch.float32


def test_float_paths_serve_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta tensors stand in for devices without an int32 product."""
    taken = []
    monkeypatch.setattr(matmul, "_by_float64", lambda a, b: taken.append("float64"))
    monkeypatch.setattr(matmul, "_by_float32_chunks", lambda a, b: taken.append("float32"))
    tensor = torch.empty(2, 2, dtype=torch.int8, device="meta")
    matmul.int_matmul(tensor, tensor)
    monkeypatch.setattr(matmul, "wide_dtype", lambda device: torch.float32)
    matmul.int_matmul(tensor, tensor)
    assert taken == ["float64", "float32"]
