"""torch.library.opcheck, fake tensors and full-graph compilation for every operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import ptq4arvg_kernels as kernels
from tests.kernels.kernel_cases import cache_case, generator, linear_case, random_table


def _arguments() -> dict[str, tuple[Any, ...]]:
    """Two calls of every operator, with and without the optional operands; full argument lists in schema order."""
    gen = generator(0)
    table = random_table(5, [8, 6], seed=1)
    positions = torch.tensor([2, 0], dtype=torch.int32)
    x = torch.randn(6, 20, generator=gen)
    modulation = torch.randn(3, 40, generator=gen)
    rows = torch.tensor([0, 0, 1, 1, 2, 2], dtype=torch.int32)
    weight, bias = torch.randn(2, 20, generator=gen)
    case = linear_case(6, 10, 40, 6, [8, 6], period=2)
    plain = linear_case(6, 10, 40, 8, [8], period=2, bias=False)
    gate = torch.randn(3, 30, generator=gen)[:, 10:20]
    residual = torch.randn(6, 10, generator=gen)
    calls: dict[str, tuple[Any, ...]] = {
        "quantize": (x, table, positions, "none"),
        "quantize-half": (x.half(), table, positions, "gelu_tanh"),
        "adaln_quant": (
            x,
            "layer",
            1e-6,
            weight,
            bias,
            modulation[:, :20],
            modulation[:, 20:],
            rows,
            1.0,
            table,
            positions,
        ),
        "adaln_quant-plain": (x.bfloat16(), "rms", 1e-5, *[None] * 5, 1.0, table, positions),
        "linear": (*case.operands, "gelu_erf", torch.float16),
        "linear-plain": (*plain.operands, "none", torch.float32),
        "linear_quant": (*case.operands, "gelu_tanh", table),
        "linear_swiglu_quant": (*plain.operands, table),
        "linear_gate_residual": (*case.operands, gate, rows, residual),
        "linear_gate_residual-plain": (*plain.operands, None, None, residual.bfloat16()),
    }
    options = ("q_weight", "q_bias", "k_weight", "k_bias", "q_scale", "rope")
    for kind in ("none", "layer_norm", "l2", "rope"):
        cache = cache_case(3, 2, 24, 7, kind)
        qkv = torch.randn(6, 3 * 2 * 24, generator=gen)
        chosen = [cache.options.get(name) for name in options]
        calls[f"qkv_append-{kind}"] = (
            qkv,
            *cache.caches(),
            positions,
            *cache.tables(),
            2,
            kind,
            *chosen,
            cache.options.get("eps", 0.0),
        )
    cache = cache_case(3, 2, 24, 7)
    q = torch.randn(3, 2, 2, 24, generator=gen)
    ends = torch.tensor([3, 5], dtype=torch.int32)
    calls["attention"] = (q, *cache.caches(), ends, 5, *cache.tables(), 0.2)
    calls["attention-half"] = (q.half(), *cache.caches(), ends, 7, *cache.tables(), 0.2)
    return calls


CALLS = _arguments()


def _fresh(name: str) -> tuple[Any, ...]:
    """Arguments whose caches are copies, so that tests do not see each other's writes."""
    return tuple(
        value.clone() if isinstance(value, torch.Tensor) and value.dtype == torch.int8 else value
        for value in CALLS[name]
    )


def _tensors(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def _wrapper(name: str) -> Callable[..., Any]:
    return getattr(kernels, name.split("-")[0])


def test_every_operator_is_covered() -> None:
    assert {name.split("-")[0] for name in CALLS} == set(kernels.OPERATORS)


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str) -> None:
    operator = getattr(torch.ops.ptq4arvg, name.split("-")[0]).default
    torch.library.opcheck(operator, _fresh(name))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", CALLS)
def test_full_graph(name: str, compiler: str) -> None:
    torch._dynamo.reset()
    wrapper = _wrapper(name)
    expected_arguments, arguments = _fresh(name), _fresh(name)
    expected = wrapper(*expected_arguments)
    got = torch.compile(wrapper, fullgraph=True, backend=compiler)(*arguments)
    for a, b in zip(_tensors(got), _tensors(expected), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(arguments, expected_arguments, strict=True):
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b)  # caches, too, were written the same


def test_decode_step_compiles_once_for_every_span() -> None:
    """A whole step: quantize, linear, append, attend; the growing span must not recompile it."""
    torch._dynamo.reset()
    cache = cache_case(1, 2, 16, 12)
    k_cache, v_cache = cache.caches()
    layer = linear_case(1, 96, 32, 6, [8], period=1)
    table = random_table(12, [8], seed=1)

    def step(x: torch.Tensor, position: torch.Tensor, span: int) -> torch.Tensor:
        codes, sums = kernels.quantize(x, table, position)
        qkv = kernels.linear(codes, sums, *layer.operands[2:8], table, position, "none", torch.float32)
        q = kernels.qkv_append(qkv, k_cache, v_cache, position, *cache.tables(), 2, "none")
        return kernels.attention(q, k_cache, v_cache, (position + 1).to(torch.int32), span, *cache.tables(), 0.25)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    x = torch.randn(12, 32, generator=generator(1))
    got = [compiled(x[t : t + 1], torch.tensor([t]), t + 1) for t in range(12)]
    assert counter.frame_count <= 3, counter.frame_count  # span 1 is special, then 2, then any
    k_cache.fill_(99), v_cache.fill_(99)
    for t in range(12):
        assert torch.equal(step(x[t : t + 1], torch.tensor([t]), t + 1), got[t])


@pytest.mark.parametrize("name", CALLS)
def test_fake_tensors_have_the_real_metadata(name: str) -> None:
    arguments = _fresh(name)
    expected = _tensors(_wrapper(name)(*arguments))
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in arguments]
        got = _tensors(_wrapper(name)(*fake))
    for a, b in zip(got, expected, strict=True):
        assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)


def test_fake_tensors_are_checked_too() -> None:
    with FakeTensorMode(), pytest.raises(ValueError, match="M = 3 rows is not a multiple of P = 2"):
        kernels.quantize(torch.empty(3, 4), torch.empty(5, 4), torch.empty(2, dtype=torch.int64))


def test_results_do_not_alias_inputs() -> None:
    for name in CALLS:
        arguments = _fresh(name)
        inputs = {value.untyped_storage().data_ptr() for value in arguments if isinstance(value, torch.Tensor)}
        for result in _tensors(_wrapper(name)(*arguments)):
            assert result.untyped_storage().data_ptr() not in inputs, name


def test_inference_mode() -> None:
    with torch.inference_mode():
        for name in CALLS:
            for result in _tensors(_wrapper(name)(*_fresh(name))):
                assert result.numel() > 0
