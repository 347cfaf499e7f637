"""Bad data: what the CPU kernels refuse is explained in the words of the reference, and nothing was written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import ptq4arvg_kernels as kernels
from ptq4arvg_kernels.backends.cpu import operators
from tests.kernels.kernel_cases import cache_case, generator, linear_case, random_table

NAN, INF = float("nan"), float("inf")


def _spoil(tensor: torch.Tensor, index: Any, value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


def _quantize(x: float = 1.0, positions: tuple[int, int] = (0, 2), row: tuple[int, float] | None = None) -> Any:
    table = random_table(3, [8, 6], 0)
    if row is not None:
        table[2, row[0]] = row[1]
    values = _spoil(torch.randn(4, 37, generator=generator(0)), (3, 36), x)
    return kernels.quantize(values, table, torch.tensor(positions), "none")


def _adaln(x: float = 1.0, scale: float = 1.0, index: int = 1) -> Any:
    gen = generator(0)
    values = _spoil(torch.randn(4, 37, generator=gen), (3, 36), x)
    modulation = _spoil(torch.randn(2, 37, generator=gen), (1, 5), scale)
    rows = torch.tensor([0, 0, 1, index], dtype=torch.int32)
    table, positions = random_table(3, [8, 6], 0), torch.tensor([1])
    return kernels.adaln_quant(values, "rms", 1e-6, None, None, modulation, modulation, rows, 1.0, table, positions)


def _linear(kind: str, **changes: Any) -> Any:
    case = linear_case(6, 18, 37, 6, [8, 6], period=2)
    names = (
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
    operands = dict(zip(names, case.operands, strict=True))
    for name, (index, value) in changes.items():
        operands[name] = _spoil(operands[name], index, value)
    layer = list(operands.values())
    out_table = random_table(5, [8], 1)
    if kind == "linear":
        return kernels.linear(*layer, "silu", torch.float32)
    if kind == "quant":
        return kernels.linear_quant(*layer, "gelu_erf", out_table)
    if kind == "swiglu":
        return kernels.linear_swiglu_quant(*layer, out_table)
    rows = torch.tensor([0, 1, 2, 0, 1, changes.get("gate", (0, 2))[1]], dtype=torch.int32)
    return kernels.linear_gate_residual(*layer, torch.ones(3, 18), rows, torch.ones(6, 18))


def _gate_row(value: int) -> Any:
    case = linear_case(6, 18, 37, 6, [8, 6], period=2)
    rows = torch.tensor([0, 1, 2, 0, 1, value], dtype=torch.int32)
    return kernels.linear_gate_residual(*case.operands, torch.ones(3, 18), rows, torch.ones(6, 18))


def _append(
    column: int | None = None, value: float = NAN, positions: tuple[int, ...] = (3, 1), group: int = 0, row: Any = None
) -> Any:
    case = cache_case(2, 2, 20, 6, "rope")
    qkv = torch.randn(4, 120, generator=generator(0))
    if column is not None:
        qkv[2, column] = value
    caches, tables = case.caches(), [t.clone() for t in case.tables()]
    tables[2][3] = group
    if row is not None:
        tables[row[0]][1, 1, row[1]] = row[2]
    try:
        return kernels.qkv_append(
            qkv, *caches, torch.tensor(positions), *tables, 2, "rope", rope=case.options["rope"], eps=0.0
        )
    finally:
        if any((column is not None, len(set(positions)) < 2, min(positions) < 0, max(positions) > 5)):
            assert all((cache == 99).all() for cache in caches)


def _attention(end: int = 5, span: int = 5, group: int = 0) -> Any:
    case = cache_case(1, 2, 20, 6)
    tables = [t.clone() for t in case.tables()]
    tables[2][4] = group
    q = torch.randn(1, 2, 2, 20, generator=generator(0))
    return kernels.attention(q, *case.caches(), torch.tensor([1, end], dtype=torch.int32), span, *tables, 0.2)


BAD: dict[str, Callable[[], Any]] = {
    **{f"quantize {v}": lambda v=v: _quantize(x=v) for v in (NAN, INF, -INF)},
    "quantize position": lambda: _quantize(positions=(0, 3)),
    "quantize negative position": lambda: _quantize(positions=(-1, 0)),
    **{f"quantize table {c} {v}": lambda c=c, v=v: _quantize(row=(c, v)) for c, v in
       [(0, 0.0), (0, NAN), (0, INF), (1, 3.0), (2, 0.5), (2, 128.0), (2, NAN), (3, 7.0), (3, NAN)]},
    "adaln x": lambda: _adaln(x=NAN),
    "adaln modulation": lambda: _adaln(scale=INF),
    "adaln row": lambda: _adaln(index=2),
    "adaln negative row": lambda: _adaln(index=-1),
    **{f"{kind} code": lambda kind=kind: _linear(kind, codes=((5, 36), 32)) for kind in
       ("linear", "quant", "swiglu", "gate")},
    "low code": lambda: _linear("linear", codes=((1, 0), -33)),
    "row sum": lambda: _linear("linear", row_sums=(4, 10**6)),
    "linear position": lambda: _linear("quant", positions=(1, 5)),
    "linear table": lambda: _linear("linear", table=((slice(None), 1), 2.0)),
    "quant scale": lambda: _linear("quant", w_scale=(17, NAN)),
    "swiglu scale": lambda: _linear("swiglu", w_scale=(17, INF)),
    "gate row": lambda: _gate_row(3),
    "append key": lambda: _append(45),
    "append value": lambda: _append(119, INF),
    "append twice": lambda: _append(positions=(3, 3)),
    "append position": lambda: _append(positions=(3, 6)),
    "append negative": lambda: _append(positions=(-1, 3)),
    "append group": lambda: _append(group=2),
    "append bits": lambda: _append(row=(0, 3, 6.0)),
    "attention end": lambda: _attention(end=6),
    "attention nothing": lambda: _attention(end=0),
    "attention group": lambda: _attention(group=-1),
}  # fmt: skip


@pytest.mark.sanitize
@pytest.mark.parametrize("name", BAD)
def test_same_refusal_as_the_reference(backend: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PTQ4ARVG_DEBUG", "1")  # backends of other devices look at data only when asked to
    with (
        kernels.use_backend("reference", strict=True),
        pytest.raises((ValueError, IndexError)) as expected,
    ):
        BAD[name]()
    with pytest.raises(type(expected.value)) as caught:
        BAD[name]()
    assert str(caught.value) == str(expected.value)


@pytest.mark.sanitize
def test_queries_may_be_anything(backend: str) -> None:
    """Queries are not quantized: a NaN among them is no error, and stays with its own head."""
    case = cache_case(1, 2, 20, 6)
    qkv = torch.randn(1, 120, generator=generator(0))
    qkv[0, 3] = NAN
    q = kernels.qkv_append(qkv, *case.caches(), torch.tensor([1]), *case.tables(), 2, "none")
    assert q[0, 0, 0].isnan().sum() == 1
    assert not q[0, 1].isnan().any()


def test_disagreement_with_the_reference_is_a_bug_report() -> None:
    def content_with_everything() -> None: ...

    with pytest.raises(RuntimeError, match=r"content_with_everything: the CPU kernels refused .* nothing wrong"):
        operators._explain(content_with_everything)
