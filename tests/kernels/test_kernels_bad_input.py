"""Every refusal names the value and the remedy. Metadata is refused for all backends, data by the reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import ptq4arvg_kernels as kernels
from tests.kernels.kernel_cases import CacheCase, LinearCase, cache_case, linear_case, random_table

META = torch.device("meta")


@pytest.fixture(autouse=True)
def reference() -> Iterator[None]:
    with kernels.use_backend("reference", strict=True):
        yield


def _quantize(**changes: Any) -> Any:
    arguments = {"x": torch.ones(4, 6), "table": random_table(5, [8], 0), "positions": torch.tensor([0, 3])} | changes
    return kernels.quantize(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.ones(4, 6, dtype=torch.float64)}, TypeError, "x has dtype float64, expected float32 or float16"),
        ({"x": torch.ones(4)}, ValueError, r"x has 1 dimensions .*expected \[M, K\]"),
        ({"x": torch.ones(5, 6)}, ValueError, "M = 5 rows is not a multiple of P = 2"),
        ({"positions": torch.tensor([], dtype=torch.int32)}, ValueError, "positions is empty but there are M = 4"),
        ({"positions": torch.tensor([0.0, 1.0])}, TypeError, "positions has dtype float32, expected int32 or int64"),
        ({"positions": torch.tensor([[0, 1]])}, ValueError, r"expected \[P\]"),
        ({"positions": torch.tensor([0, 5])}, IndexError, "positions contains 5, valid values are 0 to 4; table has 5"),
        ({"positions": torch.tensor([-1, 0])}, IndexError, "positions contains -1"),
        ({"table": torch.ones(5, 3)}, ValueError, "table has size 3 in dimension 1"),
        ({"table": torch.ones(5, 4, dtype=torch.float16)}, TypeError, "table has dtype float16"),
        ({"table": torch.ones(5, 4)}, ValueError, r"bits\) = \[1.0, 1.0, 1.0, 1.0\].*ptq4arvg_kernels.tables"),
        ({"activation": "relu"}, ValueError, "activation is 'relu', expected one of 'none', 'silu'"),
        ({"x": torch.ones(4, 6, device=META)}, ValueError, r"table is on cpu but x is on meta.*\.to\('meta'\)"),
    ],
)
def test_quantize(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _quantize(**changes)


@pytest.mark.parametrize(
    "row",
    [
        [0.5, 2.0, 0.5, 8.0],
        [0.5, 2.0, 128.0, 8.0],
        [0.5, 2.0, -33.0, 6.0],
        [0.5, 2.1, 0.0, 8.0],
        [-0.5, -2.0, 0.0, 8.0],
    ],
    ids=["fractional zero point", "zero point too large", "zero point too small", "wrong reciprocal", "negative step"],
)
def test_lawless_table_row(row: list[float]) -> None:
    with pytest.raises(ValueError, match="table has a row"):
        _quantize(table=torch.tensor([row]).repeat(5, 1))


def test_only_the_rows_in_use_are_judged() -> None:
    table = random_table(5, [8], 0)
    table[4] = 0
    _quantize(table=table)


def _adaln(**changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "x": torch.ones(4, 6),
        "norm_kind": "layer",
        "eps": 1e-6,
        "weight": None,
        "bias": None,
        "mod_scale": torch.ones(2, 6),
        "mod_shift": torch.ones(2, 6),
        "mod_rows": torch.tensor([0, 0, 1, 1], dtype=torch.int32),
        "scale_offset": 1.0,
        "table": random_table(5, [8], 0),
        "positions": torch.tensor([0, 3]),
    }
    return kernels.adaln_quant(**arguments | changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"norm_kind": "group"}, ValueError, "norm_kind is 'group', expected one of 'layer', 'rms'"),
        ({"eps": -1.0}, ValueError, "eps is -1.0"),
        ({"weight": torch.ones(7)}, ValueError, "weight has size 7"),
        ({"bias": torch.ones(6, dtype=torch.int32)}, TypeError, "bias has dtype int32"),
        ({"mod_shift": None}, ValueError, "mod_shift is missing"),
        ({"mod_scale": None}, ValueError, "mod_scale is missing"),
        ({"mod_scale": None, "mod_shift": None}, ValueError, "mod_rows was passed without mod_scale"),
        ({"mod_shift": torch.ones(3, 6)}, ValueError, "mod_shift has size 3"),
        ({"mod_shift": torch.ones(2, 6).half()}, TypeError, "mod_shift has dtype float16, expected float32"),
        ({"mod_rows": None}, ValueError, "mod_scale has 2 rows for M = 4 rows; pass mod_rows"),
        ({"mod_rows": torch.tensor([0, 1], dtype=torch.int32)}, ValueError, "mod_rows has size 2"),
        ({"mod_rows": torch.tensor([0, 0, 1, 1])}, TypeError, "mod_rows has dtype int64, expected int32"),
        (
            {"mod_rows": torch.tensor([0, 0, 1, 2], dtype=torch.int32)},
            IndexError,
            "mod_rows contains 2, valid .* 0 to 1",
        ),
        ({"positions": torch.tensor([0, 9])}, IndexError, "adaln_quant: positions contains 9"),
    ],
)
def test_adaln_quant(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    _adaln()
    with pytest.raises(error, match=message):
        _adaln(**changes)


NAMES = (
    "codes",
    "row_sums",
    "qweight",
    "w_bits",
    "in_features",
    "w_scale",
    "col_sums",
    "bias",
    "table",
    "positions",
)


def _case() -> LinearCase:
    return linear_case(4, 6, 40, 6, [8, 6], period=2)


def _operands(**changes: Any) -> tuple[Any, ...]:
    return tuple((dict(zip(NAMES, _case().operands, strict=True)) | changes).values())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"codes": torch.ones(4, 40)}, TypeError, "codes has dtype float32, expected int8"),
        ({"codes": torch.ones(4, 39, dtype=torch.int8)}, ValueError, "codes have K = 39 .* in_features = 40"),
        ({"in_features": 0}, ValueError, "in_features is 0"),
        ({"in_features": 8705}, ValueError, "in_features is 8705, supported are 1 to 8704"),
        ({"w_bits": 4}, ValueError, "w_bits is 4, supported are 6 and 8"),
        ({"w_bits": 8}, ValueError, "qweight has 48 bytes, but in_features = 40 at 8 bits packs into 64"),
        ({"qweight": torch.zeros(6, 48)}, TypeError, "qweight has dtype float32, expected uint8"),
        ({"qweight": torch.zeros(6, 48, dtype=torch.uint8)}, ValueError, "corrupt"),
        ({"row_sums": torch.zeros(3, dtype=torch.int32)}, ValueError, "row_sums has size 3"),
        ({"row_sums": torch.zeros(4, dtype=torch.int32)}, ValueError, r"row_sums\[0\] is 0 but the codes"),
        ({"w_scale": torch.ones(5)}, ValueError, "w_scale has size 5"),
        ({"w_scale": torch.ones(6).half()}, TypeError, "w_scale has dtype float16, expected float32"),
        ({"col_sums": torch.zeros(7, dtype=torch.int32)}, ValueError, "col_sums has size 7"),
        ({"col_sums": torch.zeros(6, dtype=torch.int64)}, TypeError, "col_sums has dtype int64, expected int32"),
        ({"bias": torch.ones(6).bfloat16()}, TypeError, "bias has dtype bfloat16, expected float32"),
        ({"bias": torch.ones(5)}, ValueError, "bias has size 5"),
        ({"positions": torch.tensor([0, 1, 2])}, ValueError, "M = 4 rows is not a multiple of P = 3"),
        ({"positions": torch.tensor([0, 77])}, IndexError, "positions contains 77"),
        ({"bias": torch.ones(6, device=META)}, ValueError, "bias is on meta but codes is on cpu"),
    ],
)
def test_linear_family(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    table, residual = random_table(5, [8], 0), torch.zeros(4, 6)
    for call in (
        lambda operands: kernels.linear(*operands, "none", torch.float32),
        lambda operands: kernels.linear_quant(*operands, "none", table),
        lambda operands: kernels.linear_swiglu_quant(*operands, table),
        lambda operands: kernels.linear_gate_residual(*operands, None, None, residual),
    ):
        call(_operands())
        with pytest.raises(error, match=message):
            call(_operands(**changes))


def test_codes_outside_the_grid_of_their_position() -> None:
    case = linear_case(2, 6, 40, 6, [6], period=2)
    case.codes[1, 7] = 77
    with pytest.raises(ValueError, match=r"row 1 holds codes from .* to 77, but the grid of its position is -32 to 31"):
        kernels.linear(case.codes, case.codes.sum(1, dtype=torch.int32), *case.operands[2:], "none", torch.float32)


def test_linear_options() -> None:
    operands = _operands()
    with pytest.raises(TypeError, match=r"out_dtype is torch\.float64"):
        kernels.linear(*operands, "none", torch.float64)
    with pytest.raises(ValueError, match="activation is 'gelu'"):
        torch.ops.ptq4arvg.linear(*operands, "gelu", torch.float32)
    with pytest.raises(ValueError, match="out_table has size 3"):
        kernels.linear_quant(*operands, "none", torch.zeros(5, 3))
    with pytest.raises(IndexError, match="out_table has 1 rows"):
        kernels.linear_quant(*operands, "none", random_table(1, [8], 0))
    odd = linear_case(2, 5, 40, 8, [8])
    with pytest.raises(ValueError, match=r"N = 5 rows; \[w1; w3\]"):
        kernels.linear_swiglu_quant(*odd.operands, random_table(5, [8], 0))


@pytest.mark.parametrize(
    ("gate", "rows", "residual", "error", "message"),
    [
        (None, None, torch.zeros(4, 5), ValueError, "residual has size 5"),
        (None, None, torch.zeros(4, 6, dtype=torch.int8), TypeError, "residual has dtype int8"),
        (torch.zeros(2, 6), None, torch.zeros(4, 6), ValueError, "gate has 2 rows for M = 4 rows; pass gate_rows"),
        (torch.zeros(4, 7), None, torch.zeros(4, 6), ValueError, "gate has size 7"),
        (None, torch.zeros(4, dtype=torch.int32), torch.zeros(4, 6), ValueError, "gate_rows was passed without gate"),
        (
            torch.zeros(2, 6),
            torch.full((4,), 2, dtype=torch.int32),
            torch.zeros(4, 6),
            IndexError,
            "gate_rows contains 2",
        ),
    ],
)
def test_gate_residual(gate: Any, rows: Any, residual: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kernels.linear_gate_residual(*_operands(), gate, rows, residual)


def _append(case: CacheCase, **changes: Any) -> Any:
    k_cache, v_cache = case.caches()
    arguments: dict[str, Any] = {
        "qkv": torch.ones(4, 3 * 2 * 24),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "positions": torch.tensor([0, 3]),
        "k_table": case.k_table,
        "v_table": case.v_table,
        "kv_group": case.kv_group,
        "num_heads": 2,
        "qk_kind": case.qk_kind,
    }
    return kernels.qkv_append(**arguments | case.options | changes)


SKEWED = torch.zeros(2, 2, 32, 7, dtype=torch.int8).transpose(2, 3)


@pytest.mark.parametrize(
    ("kind", "changes", "error", "message"),
    [
        ("none", {"qkv": torch.ones(4, 143)}, ValueError, r"qkv has 143 columns, not a positive multiple .* = 6"),
        ("none", {"num_heads": 0}, ValueError, r"not a positive multiple"),
        ("none", {"qkv": torch.ones(6, 144)}, ValueError, r"batch size 2, but M = 6 rows at P = 2 .* are 3 sequences"),
        (
            "none",
            {"k_cache": torch.zeros(2, 2, 7, 24, dtype=torch.int8)},
            ValueError,
            "k_cache has size 24 .* expected 32",
        ),
        (
            "none",
            {"v_cache": torch.zeros(2, 2, 6, 32, dtype=torch.int8)},
            ValueError,
            "v_cache has size 6 .* expected 7",
        ),
        ("none", {"k_cache": torch.zeros(2, 2, 7, 32)}, TypeError, "k_cache has dtype float32, expected int8"),
        ("none", {"k_cache": SKEWED}, ValueError, r"k_cache has strides .* must be dense"),
        ("none", {"positions": torch.tensor([0, 7])}, IndexError, "positions contains 7, .* the cache has 7 slots"),
        ("none", {"positions": torch.tensor([0, -2])}, IndexError, "positions contains -2"),
        ("none", {"positions": torch.tensor([3, 3])}, ValueError, r"positions \[3, 3\] contains a position twice"),
        ("none", {"kv_group": torch.zeros(2, dtype=torch.int32)}, IndexError, "kv_group has 2 rows"),
        ("none", {"kv_group": torch.full((7,), 2, dtype=torch.int32)}, IndexError, "kv_group contains 2"),
        (
            "none",
            {"kv_group": torch.zeros(7, dtype=torch.int64)},
            TypeError,
            "kv_group has dtype int64, expected int32",
        ),
        ("none", {"k_table": torch.ones(2, 3, 4)}, ValueError, "k_table has size 3"),
        ("none", {"v_table": torch.ones(2, 2, 4)}, ValueError, "v_table has a row"),
        ("none", {"v_table": torch.ones(1, 2, 4)}, ValueError, "v_table has size 1 in dimension 0"),
        ("none", {"qk_kind": "rms"}, ValueError, "qk_kind is 'rms', expected one of"),
        ("none", {"rope": torch.ones(7, 12, 2)}, ValueError, "rope has no meaning for qk_kind 'none'"),
        ("none", {"q_weight": torch.ones(24)}, ValueError, "q_weight has no meaning"),
        ("layer_norm", {"eps": 0.0}, ValueError, "eps is 0.0; qk_kind 'layer_norm' needs"),
        ("layer_norm", {"k_bias": torch.ones(25)}, ValueError, "k_bias has size 25"),
        ("l2", {"q_scale": None}, ValueError, "qk_kind 'l2' needs q_scale"),
        ("l2", {"q_scale": torch.ones(3)}, ValueError, "q_scale has size 3"),
        ("rope", {"rope": None}, ValueError, "qk_kind 'rope' needs rope"),
        ("rope", {"rope": torch.ones(7, 24, 2)}, ValueError, "rope has size 24"),
        ("rope", {"rope": torch.ones(3, 12, 2)}, IndexError, "positions contains 3, .* rope has 3 rows"),
    ],
)
def test_qkv_append(kind: str, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    case = cache_case(2, 2, 24, 7, kind)
    _append(case)
    with pytest.raises(error, match=message):
        _append(case, **changes)


def test_rope_needs_an_even_head_dim() -> None:
    case = cache_case(1, 1, 23, 4)
    with pytest.raises(ValueError, match="head dimension is 23; it must be even"):
        kernels.qkv_append(
            torch.ones(1, 69), *case.caches(), torch.tensor([0]), *case.tables(), 1, "rope", rope=torch.ones(4, 11, 2)
        )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.ones(2, 2, 2, 24, dtype=torch.float64)}, TypeError, "q has dtype float64"),
        ({"q": torch.ones(2, 3, 2, 24)}, ValueError, "k_cache has size 2 in dimension 1"),
        ({"q": torch.ones(2, 2, 2, 40)}, ValueError, "k_cache has size 32 .* expected 48"),
        ({"visible_end": torch.tensor([3, 5])}, TypeError, "visible_end has dtype int64, expected int32"),
        ({"visible_end": torch.tensor([3], dtype=torch.int32)}, ValueError, "visible_end has size 1"),
        ({"visible_end": torch.tensor([3, 6], dtype=torch.int32)}, IndexError, "visible_end contains 6, .* 1 to 5"),
        ({"visible_end": torch.tensor([0, 5], dtype=torch.int32)}, IndexError, "contains 0, .* sees at least one slot"),
        ({"span": 0}, ValueError, "span is 0, expected 1 to S = 7"),
        ({"span": 8}, ValueError, "span is 8, expected 1 to S = 7"),
        ({"kv_group": torch.zeros(4, dtype=torch.int32)}, ValueError, "span is 5 but kv_group .* 4 slots only"),
        ({"kv_group": torch.full((7,), -1, dtype=torch.int32)}, IndexError, "kv_group contains -1"),
        ({"k_table": torch.ones(2, 2, 4)}, ValueError, "k_table has a row"),
        ({"k_table": torch.ones(2, 2, 4).double()}, TypeError, "k_table has dtype float64"),
    ],
)
def test_attention(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    case = cache_case(2, 2, 24, 7)
    k_cache, v_cache = case.caches()
    arguments: dict[str, Any] = {
        "q": torch.ones(2, 2, 2, 24),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "visible_end": torch.tensor([3, 5], dtype=torch.int32),
        "span": 5,
        "k_table": case.k_table,
        "v_table": case.v_table,
        "kv_group": case.kv_group,
        "softmax_scale": 0.2,
    }
    kernels.attention(**arguments)
    with pytest.raises(error, match=message):
        kernels.attention(**arguments | changes)
