"""Position tables: layout, expansion, refusals."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptq4arvg_kernels.tables import half_range, make_kv_table, make_table, row_parameters


def test_table_by_hand() -> None:
    table = make_table([0.5, 0.25], [0, 200], [6, 8], [0, 1, 1, 0])
    assert table.dtype == torch.float32
    assert table.tolist() == [[0.5, 2, -32, 6], [0.25, 4, 72, 8], [0.25, 4, 72, 8], [0.5, 2, -32, 6]]


def test_scalars_broadcast() -> None:
    assert make_table(0.5, 128, 8, [0, 0]).tolist() == [[0.5, 2, 0, 8]] * 2
    assert make_table([1.0, 2.0], 32, 6, [1]).tolist() == [[2, 0.5, 0, 6]]


@given(st.floats(1e-20, 1e20))
def test_reciprocal_is_the_float32_quotient(delta: float) -> None:
    table = make_table(delta, 0, 8, [0])
    assert table[0, 1].item() == np.float32(1) / np.float32(delta)


def test_half_range() -> None:
    assert half_range(torch.tensor([6.0, 8.0])).tolist() == [32, 128]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0.0], [0], 8, [0]), ValueError, "delta contains 0.0"),
        (([-1.0], [0], 8, [0]), ValueError, "delta contains -1.0"),
        (([float("nan")], [0], 8, [0]), ValueError, "delta contains nan"),
        (([float("inf")], [0], 8, [0]), ValueError, "delta contains inf"),
        (([1e-42], [0], 8, [0]), ValueError, "overflows float32"),
        (([1.0], [256], 8, [0]), ValueError, "zero_point contains 256"),
        (([1.0], [64], 6, [0]), ValueError, "from 0 to 63"),
        (([1.0], [-1], 6, [0]), ValueError, "zero_point contains -1"),
        (([1.0], [1.5], 6, [0]), ValueError, "zero_point contains 1.5"),
        (([1.0], [0], 4, [0]), ValueError, "bits contains 4"),
        (([1.0], [0], 6.5, [0]), ValueError, "bits contains 6.5"),
        (([1.0], [0], 8, [1]), IndexError, "contains 1, valid groups are 0 to 0"),
        (([1.0], [0], 8, [0, -1]), IndexError, "contains -1"),
        (([1.0], [0], 8, [0.0]), ValueError, "1-D integer"),
        (([1.0, 1.0, 1.0], [0, 0], 8, [0]), ValueError, "zero_point has 2 entries for 3 groups"),
    ],
)
def test_make_table_refuses(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_table(*arguments)


def test_kv_table() -> None:
    table = make_kv_table(torch.tensor([[0.5, 0.25]]), torch.tensor([[128, 0]]))
    assert table.tolist() == [[[0.5, 2, 0, 8], [0.25, 4, -128, 8]]]
    with pytest.raises(ValueError, match="groups, heads"):
        make_kv_table(torch.ones(2), torch.zeros(2))
    with pytest.raises(ValueError, match="zero_point contains 256"):
        make_kv_table(torch.ones(1, 1), torch.full((1, 1), 256))


@given(st.integers(0, 5), st.integers(1, 4), st.sampled_from([torch.int32, torch.int64]))
def test_row_parameters(batch: int, period: int, dtype: torch.dtype) -> None:
    table = make_table(torch.arange(1.0, 7.0), 0, 8, torch.arange(6))
    positions = torch.tensor([5, 0, 3, 3][:period], dtype=dtype)
    rows = row_parameters(table, positions, batch * period)
    assert rows.shape == (batch * period, 4)
    for i in range(batch * period):
        assert torch.equal(rows[i], table[int(positions[i % period])])


def test_row_parameters_refuses() -> None:
    table = make_table(1.0, 0, 8, [0, 0])
    with pytest.raises(ValueError, match="M = 3 rows is not a multiple of P = 2"):
        row_parameters(table, torch.tensor([0, 1]), 3)
    with pytest.raises(ValueError, match="positions is empty"):
        row_parameters(table, torch.tensor([], dtype=torch.int32), 3)
    with pytest.raises(TypeError, match="float64"):
        row_parameters(table.double(), torch.tensor([0]), 1)
    assert row_parameters(table, torch.tensor([], dtype=torch.int32), 0).shape == (0, 4)
