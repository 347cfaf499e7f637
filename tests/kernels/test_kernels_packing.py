"""Storage formats: literal layout, round trips, corruption."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ptq4arvg_kernels.packing import (
    FORMAT_VERSION,
    MAX_IN_FEATURES,
    column_sums,
    pack,
    packed_row_bytes,
    padded_head_dim,
    unpack,
)


@st.composite
def weights(draw: st.DrawFn) -> tuple[int, torch.Tensor]:
    bits = draw(st.sampled_from([6, 8]))
    top = 2 ** (bits - 1) - 1
    shape = (draw(st.integers(1, 7)), draw(st.integers(1, 131)))
    return bits, torch.from_numpy(draw(hnp.arrays("int8", shape, elements=st.integers(-top, top))))


@given(weights())
def test_round_trip(case: tuple[int, torch.Tensor]) -> None:
    bits, codes = case
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.is_contiguous()
    assert packed.shape == (codes.shape[0], packed_row_bytes(codes.shape[1], bits))
    assert torch.equal(unpack(packed, bits, codes.shape[1]), codes)


@given(weights())
def test_column_sums_are_exact(case: tuple[int, torch.Tensor]) -> None:
    sums = column_sums(case[1])
    assert sums.dtype == torch.int32
    assert sums.tolist() == [sum(row) for row in case[1].tolist()]


def test_six_bit_layout_by_hand() -> None:
    # u = w + 32 = 1, 63, 32, 0b100111 = 39; the spare bit pairs of bytes 0, 1, 2 hold u3's bits (1,0), (3,2), (5,4).
    codes = torch.tensor([[-31, 31, 0, 7]], dtype=torch.int8)
    packed = pack(codes, 6)[0].tolist()
    assert packed[:3] == [0b11_000001, 0b01_111111, 0b10_100000]
    # Padding is code 0, u = 32 = 0b100000: its bits 5,4 land in the third byte.
    assert packed[3:] == [0b00_100000, 0b00_100000, 0b10_100000] * 7


def test_eight_bit_layout_by_hand() -> None:
    packed = pack(torch.tensor([[-127, -1, 0, 127]], dtype=torch.int8), 8)[0].tolist()
    assert packed == [129, 255, 0, 127] + [0] * 28


@pytest.mark.parametrize(
    ("in_features", "bits", "expected"), [(1, 8, 32), (32, 8, 32), (33, 8, 64), (1, 6, 24), (32, 6, 24), (1024, 6, 768)]
)
def test_row_bytes(in_features: int, bits: int, expected: int) -> None:
    assert packed_row_bytes(in_features, bits) == expected


def test_longest_row() -> None:
    codes = torch.full((2, MAX_IN_FEATURES), -127, dtype=torch.int8)
    assert column_sums(codes).tolist() == [-127 * MAX_IN_FEATURES] * 2
    assert torch.equal(unpack(pack(codes, 8), 8, MAX_IN_FEATURES), codes)


@pytest.mark.parametrize(
    ("head_dim", "padded"), [(48, 48), (64, 64), (80, 80), (88, 96), (96, 96), (100, 112), (128, 128)]
)
def test_head_dim_padding(head_dim: int, padded: int) -> None:
    assert padded_head_dim(head_dim) == padded


def test_format_version() -> None:
    assert FORMAT_VERSION == 1


def test_non_contiguous_codes_and_bytes() -> None:
    codes = torch.randint(-31, 32, (40, 9), dtype=torch.int8).t()
    for bits in (6, 8):
        packed = pack(codes, bits)
        assert torch.equal(packed, pack(codes.contiguous(), bits))
        assert torch.equal(unpack(packed.t().contiguous().t(), bits, 40), codes)


def test_zeroed_bytes_are_corruption() -> None:
    packed = pack(torch.full((3, 64), 5, dtype=torch.int8), 6)
    packed[1, 24:48] = 0
    with pytest.raises(ValueError, match=r"row 1, column 32 holds -32.*corrupt"):
        unpack(packed, 6, 64)


def test_every_single_zeroed_group_is_corruption() -> None:
    codes = torch.randint(-31, 32, (1, 32), dtype=torch.int8)
    for group in range(8):
        packed = pack(codes, 6)
        packed[0, 3 * group : 3 * group + 3] = 0
        with pytest.raises(ValueError, match="corrupt"):
            unpack(packed, 6, 32)


def test_forbidden_byte_is_corruption() -> None:
    packed = pack(torch.ones(2, 40, dtype=torch.int8), 8)
    packed[1, 3] = 128
    with pytest.raises(ValueError, match=r"row 1, column 3 holds -128"):
        unpack(packed, 8, 40)


def test_non_zero_padding_is_corruption() -> None:
    for bits in (6, 8):
        packed = pack(torch.ones(2, 40, dtype=torch.int8), bits)
        with pytest.raises(ValueError, match="padding behind column 36"):
            unpack(packed, bits, 37)


@pytest.mark.parametrize(("bits", "code"), [(6, -32), (6, 32), (8, -128)])
def test_code_outside_the_symmetric_grid(bits: int, code: int) -> None:
    codes = torch.zeros(2, 5, dtype=torch.int8)
    codes[1, 4] = code
    with pytest.raises(ValueError, match=rf"code {code} at row 1, column 4"):
        pack(codes, bits)


def test_bad_arguments() -> None:
    good = torch.zeros(2, 32, dtype=torch.int8)
    with pytest.raises(ValueError, match="bits is 4"):
        pack(good, 4)
    with pytest.raises(TypeError, match="int32"):
        pack(good.int(), 8)
    with pytest.raises(ValueError, match=r"\[N, K\]"):
        pack(good[0], 8)
    with pytest.raises(ValueError, match="in_features is 0"):
        pack(good[:, :0], 8)
    with pytest.raises(ValueError, match="in_features is 8705"):
        packed_row_bytes(MAX_IN_FEATURES + 1, 8)
    with pytest.raises(TypeError, match="int8"):
        unpack(good, 8, 32)
    with pytest.raises(ValueError, match=r"expected \[N, 64\]"):
        unpack(good.view(torch.uint8), 8, 33)
    with pytest.raises(TypeError, match="int8"):
        column_sums(good.int())
    with pytest.raises(ValueError, match=r"\[N, K\]"):
        column_sums(good[0])
