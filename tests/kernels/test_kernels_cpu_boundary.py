"""The compiled functions called as nobody should: every wrong operand is a Python exception, never a crash."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from ptq4arvg_kernels.backends.cpu import native, weights
from ptq4arvg_kernels.backends.cpu.native import maybe, view
from ptq4arvg_kernels.tables import make_kv_table, make_table
from tests.kernels.kernel_cases import instruction_sets, linear_case

pytestmark = pytest.mark.skipif(not instruction_sets(), reason=f"no CPU backend: {native.WHY_NOT}")

M, K, N, H, D, S = 4, 33, 18, 2, 16, 6
KEEP: list[torch.Tensor] = []  # operands live as long as the tests: their addresses are handed around


def _view(tensor: torch.Tensor | None) -> Any:
    if tensor is not None:
        KEEP.append(tensor)
    return maybe(tensor)


def _codes(rows: int, width: int) -> list[Any]:
    return [_view(torch.zeros(rows, width, dtype=torch.int8)), _view(torch.zeros(rows, dtype=torch.int32))]


def _layer(paired: bool = False) -> list[Any]:
    case = linear_case(M, N, K, 6, [6], period=2)
    codes, sums, qweight, bits, in_features, scale, col_sums, bias, table, positions = case.operands
    panels = weights.pack_panels(qweight, bits, in_features, paired)
    assert panels is not None
    operands = [_view(codes), _view(sums), _view(panels), bits, N, in_features]
    return operands + [_view(t) for t in (scale, col_sums, bias, table, positions)]


def _cache() -> list[Any]:
    return [_view(torch.zeros(2, H, S, D, dtype=torch.int8)) for _ in range(2)]


def _kv_tables() -> list[Any]:
    tables = [make_kv_table(torch.ones(1, H), torch.full((1, H), 128)) for _ in range(2)]
    return [_view(t) for t in (*tables, torch.zeros(S, dtype=torch.int32))]


def _arguments() -> dict[str, list[Any]]:
    """Lawful arguments of every function."""
    table = _view(make_table(0.1, 128, 8, [0, 0, 0]))
    positions = _view(torch.tensor([0, 2]))
    x = _view(torch.randn(M, K))
    row = [_view(torch.randn(K)) for _ in range(2)]
    modulation = [_view(torch.randn(2, K)) for _ in range(2)]
    index = _view(torch.tensor([0, 0, 1, 1], dtype=torch.int32))
    out = _view(torch.empty(M, N))
    out_table = _view(make_table(0.1, 128, 8, [0] * 5))
    gate = [_view(torch.randn(2, N)), index]
    qweight = torch.zeros(N, 64, dtype=torch.uint8)
    panels = torch.zeros(native.module().packed_bytes(N, K, 8, False), dtype=torch.uint8)
    heads = [_view(torch.randn(D)) for _ in range(4)]
    two = _view(torch.tensor([1, 0]))
    qkv, q = torch.randn(4, 3 * H * D), torch.randn(2, H, 2, D)
    ends = _view(torch.tensor([1, 3], dtype=torch.int32))
    append = [_view(qkv), *_cache(), two, *_kv_tables(), H]
    return {
        "quantize": [x, 0, table, positions, *_codes(M, K), 1],
        "adaln_quant": [x, 0, 1e-6, *row, *modulation, index, 1.0, table, positions, *_codes(M, K), 1],
        "pack": [_view(qweight), _view(panels), K, 8, False, 1],
        "unpack": [_view(panels), _view(qweight), K, 8, False, 1],
        "linear": [*_layer(), 0, out, 1],
        "linear_quant": [*_layer(), 0, out_table, *_codes(M, N), 1],
        "linear_swiglu": [*_layer(True), -1, out_table, *_codes(M, N // 2), 1],
        "linear_gate_residual": [*_layer(), *gate, _view(torch.randn(M, N)), out, 1],
        "qkv_append": [*append, 1, *heads, None, None, 1e-6, _view(q), 1],
        "qkv_append_l2": [*append, 2, None, None, None, None, _view(torch.ones(H)), None, 0.0, _view(q), 1],
        "qkv_append_rope": [*append, 3, *[None] * 5, _view(torch.ones(S, D // 2, 2)), 0.0, _view(q), 1],
        "attention": [_view(q), *_cache(), ends, 3, *_kv_tables(), 0.1, _view(torch.empty(4, H * D)), 1],
    }


ARGUMENTS = _arguments() if instruction_sets() else {}
VIEWS = [(name, i) for name, args in ARGUMENTS.items() for i, arg in enumerate(args) if isinstance(arg, tuple)]
NUMBERS = [(name, i) for name, args in ARGUMENTS.items() for i, arg in enumerate(args) if type(arg) is int]


def _function(name: str) -> Callable[..., Any]:
    short = {"linear_swiglu": "linear_quant", "qkv_append_l2": "qkv_append", "qkv_append_rope": "qkv_append"}
    return getattr(native.module(), short.get(name, name))


def _call(name: str, index: int, value: Any) -> Any:
    args = list(ARGUMENTS[name])
    args[index] = value
    return _function(name)(*args)


def _wrong_views(good: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    address, dtype, sizes, strides = good
    yield "null", (0, dtype, sizes, strides)
    if dtype not in (3, 4):
        yield "misaligned", (address + 1, dtype, sizes, strides)
    yield "dtype", (address, 4 if dtype != 4 else 0, sizes, strides)
    yield "unknown dtype", (address, 7, sizes, strides)
    yield "negative dtype", (address, -1, sizes, strides)
    yield "dimension more", (address, dtype, (*sizes, 1), (*strides, 1))
    yield "dimension less", (address, dtype, sizes[1:], strides[1:])
    yield "five dimensions", (address, dtype, (1,) * 5, (1,) * 5)
    yield "stride missing", (address, dtype, sizes, strides[1:])
    for d in range(len(sizes)):

        def at(values: tuple[int, ...], value: int, d: int = d) -> tuple[int, ...]:
            return (*values[:d], value, *values[d + 1 :])

        yield f"negative size {d}", (address, dtype, at(sizes, -1), strides)
        yield f"negative stride {d}", (address, dtype, sizes, at(strides, -1))
        yield f"overflow {d}", (address, dtype, at(sizes, 2**62), at(strides, 2**40))
        yield f"far beyond {d}", (address, dtype, at(sizes, 2**63 - 1), strides)
        yield f"beyond int64 {d}", (address, dtype, at(sizes, 2**64), strides)
        yield f"fraction {d}", (address, dtype, at(sizes, 1.5), strides)  # type: ignore[arg-type]
    if sizes[-1] > 1:
        yield "not contiguous", (address, dtype, sizes, (*strides[:-1], 2))
    yield "too short", (address, dtype, sizes)
    yield "negative address", (-8, dtype, sizes, strides)
    yield "no tuple", torch.zeros(1)
    yield "text", "tensor"


@pytest.mark.sanitize
@pytest.mark.parametrize("name", ARGUMENTS)
def test_lawful_arguments_pass(name: str) -> None:
    assert _function(name)(*ARGUMENTS[name]) in (native.OK, None)


@pytest.mark.sanitize
@pytest.mark.parametrize(("name", "index"), VIEWS)
def test_wrong_tensors(name: str, index: int) -> None:
    for what, wrong in _wrong_views(ARGUMENTS[name][index]):
        try:
            _call(name, index, wrong)
        except (ValueError, TypeError):
            continue
        pytest.fail(what)


@pytest.mark.parametrize(("name", "index"), VIEWS)
def test_sizes_that_do_not_fit(name: str, index: int) -> None:
    """One row or column less: memory stays valid, so what is not refused must simply be lawful (a shorter table)."""
    address, dtype, sizes, strides = ARGUMENTS[name][index]
    for d, size in enumerate(sizes):
        fewer = (*sizes[:d], size - 1, *sizes[d + 1 :])
        try:
            status = _call(name, index, (address, dtype, fewer, strides))
        except ValueError:
            continue
        assert status in (0, 1, None)


@pytest.mark.parametrize(("name", "index"), NUMBERS)
@pytest.mark.parametrize("value", [-2, 2**31, 2**40, 2**64, 0.5, "x", None])
def test_wrong_numbers(name: str, index: int, value: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        _call(name, index, value)


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("count", [0, -1])
def test_no_threads(name: str, count: int) -> None:
    with pytest.raises(ValueError, match=f"threads is {count}, expected at least 1"):
        _call(name, len(ARGUMENTS[name]) - 1, count)


@pytest.mark.parametrize("bits", [0, 5, 7, 9, 16])
@pytest.mark.parametrize(
    ("name", "index"), [("pack", 3), ("unpack", 3), ("linear", 3), ("linear_quant", 3), ("linear_gate_residual", 3)]
)
def test_unsupported_bits(name: str, index: int, bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits is {bits}, expected 6 or 8"):
        _call(name, index, bits)


@pytest.mark.parametrize("in_features", [0, 8705, 2**40, -1])
def test_unsupported_in_features(in_features: int) -> None:
    for name, index in (("pack", 2), ("unpack", 2), ("linear", 5)):
        with pytest.raises(ValueError):  # noqa: PT011 - the size of another operand may be refused first
            _call(name, index, in_features)
    with pytest.raises(ValueError, match="in_features is"):
        native.module().packed_bytes(4, in_features, 8, False)


def test_odd_pairs_and_too_many_channels() -> None:
    with pytest.raises(ValueError, match="even number of channels"):
        native.module().packed_bytes(3, 32, 8, True)
    with pytest.raises(ValueError, match="out_features is"):
        native.module().packed_bytes(2**24 + 1, 32, 8, False)


def test_too_few_and_too_many_arguments() -> None:
    for name, args in ARGUMENTS.items():
        for wrong in (args[:-1], [*args, 1], []):
            with pytest.raises(TypeError):
                _function(name)(*wrong)


def test_empty_operands_need_no_memory() -> None:
    """torch gives empty tensors a null address."""
    none = (0, 0, (0, K), (K, 1))
    codes, sums = (0, 3, (0, K), (K, 1)), (0, 5, (0,), (1,))
    table = ARGUMENTS["quantize"][2]
    assert native.module().quantize(none, 0, table, view(torch.tensor([0])), codes, sums, 1) == native.OK
