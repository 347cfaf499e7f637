"""Times of single CPU kernels: `make bench-kernels`. Not tests of anything; `make test` does not collect them.

Shapes of a layer of width 1024: rows of one decode step, of a batch, and of a prefill.
"""

from __future__ import annotations

import math

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import ptq4arvg_kernels as kernels
from ptq4arvg_kernels.packing import column_sums, pack
from ptq4arvg_kernels.tables import make_kv_table, make_table

ROWS = [2, 16, 128]
IN, OUT = 1024, 4096
WIDTHS = {"W8A8": (8, 8), "W6A8": (6, 8), "W6A6": (6, 6)}
POSITION = torch.tensor([0])


@pytest.fixture(autouse=True)
def cpu():
    with kernels.use_backend("cpu", strict=True):
        yield


@pytest.mark.parametrize("activation", ["none", "gelu_tanh"])
@pytest.mark.parametrize("rows", ROWS)
def test_quantize(benchmark: BenchmarkFixture, rows: int, activation: str) -> None:
    x, table = torch.randn(rows, OUT), make_table(0.02, 128, 8, [0])
    benchmark(kernels.quantize, x, table, POSITION, activation)


@pytest.mark.parametrize("rows", ROWS)
def test_adaln_quant(benchmark: BenchmarkFixture, rows: int) -> None:
    x, table = torch.randn(rows, IN), make_table(0.02, 128, 8, [0])
    scale, shift = torch.randn(2, rows, IN)
    benchmark(kernels.adaln_quant, x, "layer", 1e-6, None, None, scale, shift, None, 1.0, table, POSITION)


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_linear(benchmark: BenchmarkFixture, rows: int, widths: str) -> None:
    w_bits, act_bits = WIDTHS[widths]
    top, half = 2 ** (w_bits - 1) - 1, 2 ** (act_bits - 1)
    weight = torch.randint(-top, top + 1, (OUT, IN), dtype=torch.int8)
    codes = torch.randint(-half, half, (rows, IN), dtype=torch.int8)
    layer = (pack(weight, w_bits), w_bits, IN, torch.full((OUT,), 0.01), column_sums(weight), torch.zeros(OUT))
    table = make_table(0.02, half, act_bits, [0])
    sums = codes.sum(1, dtype=torch.int32)
    benchmark(kernels.linear, codes, sums, *layer, table, POSITION, "none", torch.float32)


@pytest.mark.parametrize("visible", [64, 256])
@pytest.mark.parametrize("rows", ROWS)
def test_attention_decode(benchmark: BenchmarkFixture, rows: int, visible: int) -> None:
    """One query per sample: rows is the batch."""
    heads, head_dim = 16, 64
    q = torch.randn(rows, heads, 1, head_dim)
    k_cache, v_cache = torch.randint(-128, 128, (2, rows, heads, 256, head_dim), dtype=torch.int8)
    table = make_kv_table(torch.full((1, heads), 0.02), torch.full((1, heads), 128))
    group, ends = torch.zeros(256, dtype=torch.int32), torch.tensor([visible], dtype=torch.int32)
    scale = 1 / math.sqrt(head_dim)
    benchmark(kernels.attention, q, k_cache, v_cache, ends, visible, table, table, group, scale)
