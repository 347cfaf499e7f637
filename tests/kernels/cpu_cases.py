"""Calls of every operator on the CPU, on shapes of a kind, for comparisons bit for bit between ways to run them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

import ptq4arvg_kernels as kernels
from ptq4arvg_kernels.backends.cpu import native
from tests.kernels.kernel_cases import cache_case, generator, linear_case, random_table

Results = tuple[Tensor, ...]
Call = Callable[[], Results]

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
WIDTHS = {"W8A8": (8, [8]), "W6A8": (6, [8]), "W6A6": (6, [6]), "W6A6-sinks": (6, [8, 6, 6])}
ACTIVATIONS = ("none", "silu", "gelu_erf", "gelu_tanh")

# (batch, positions, width, out_features, heads, head_dim). "whole" fills its vectors; "many" runs in several tasks.
SHAPES = {
    "one": (1, 1, 1, 2, 1, 1),
    "few": (2, 2, 33, 18, 2, 20),
    "whole": (2, 4, 64, 64, 2, 64),
    "odd": (3, 5, 179, 62, 3, 50),
    "many": (2, 48, 391, 134, 6, 64),
}


@contextmanager
def running(instruction_set: str) -> Iterator[None]:
    """Use an instruction set of the CPU backend, and that backend."""
    module = native.module()
    before = module.instruction_set()
    assert module.select(instruction_set)
    try:
        with kernels.use_backend("cpu", strict=True):
            yield
    finally:
        module.select(before)


@contextmanager
def threads(count: int, gomp: bool = True) -> Iterator[None]:
    """Let calls use so many threads, of torch's own team or of the team that serves where there is none."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    native.module().set_thread_team(gomp)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        native.module().set_thread_team(True)


def _quantizing(shape: str) -> dict[str, Call]:
    batch, period, width, *_ = SHAPES[shape]
    rows, gen = batch * period, generator(1)
    table, positions = random_table(period + 2, [8, 6], 2), torch.randperm(period + 2, generator=gen)[:period]
    x = 2 * torch.randn(rows, width, generator=gen)
    vectors = torch.randn(2, width, generator=gen).unbind(0)
    chunks = torch.randn(batch, 3 * width, generator=gen)
    index = (torch.arange(rows) // period).to(torch.int32)
    calls: dict[str, Call] = {}
    for name, dtype in DTYPES.items():
        for activation in ACTIVATIONS:
            calls[f"quantize-{activation}-{name}"] = lambda a=activation, d=dtype: kernels.quantize(
                x.to(d), table, positions, a
            )
        scale, shift = chunks.to(dtype)[:, :width], chunks.to(dtype)[:, 2 * width :]
        for kind in ("layer", "rms"):
            calls[f"adaln_quant-{kind}-{name}"] = lambda k=kind, d=dtype, s=scale, t=shift: kernels.adaln_quant(
                x.to(d), k, 1e-6, *vectors, s, t, index, 1.0, table, positions
            )
            calls[f"adaln_quant-{kind}-{name}-bare"] = lambda k=kind, d=dtype: kernels.adaln_quant(
                x.to(d), k, 1e-6, None, None, None, None, None, 1.0, table, positions
            )
    return calls


def _linear(shape: str) -> dict[str, Call]:
    batch, period, width, out_features, *_ = SHAPES[shape]
    rows, gen = batch * period, generator(3)
    calls: dict[str, Call] = {}
    for name, (w_bits, act_bits) in WIDTHS.items():
        case = linear_case(rows, out_features, width, w_bits, act_bits, seed=4, period=period)
        out_table = random_table(period + 3, [8, 6], 5, step=0.05)
        wide_gate = torch.randn(batch, 2 * out_features, generator=gen)
        index = (torch.arange(rows) // period).to(torch.int32)
        residual = torch.randn(rows, out_features, generator=gen)
        for activation in ACTIVATIONS:
            calls[f"linear-{name}-{activation}"] = lambda c=case, a=activation: tuple(
                kernels.linear(*c.operands, a, dtype) for dtype in DTYPES.values()
            )
            calls[f"linear_quant-{name}-{activation}"] = lambda c=case, a=activation, t=out_table: kernels.linear_quant(
                *c.operands, a, t
            )
        calls[f"linear_swiglu_quant-{name}"] = lambda c=case, t=out_table: kernels.linear_swiglu_quant(*c.operands, t)
        calls[f"linear_gate_residual-{name}"] = lambda c=case, g=wide_gate, i=index, r=residual, n=out_features: tuple(
            kernels.linear_gate_residual(*c.operands, gate, rows_of_gate, r.to(dtype))
            for dtype in DTYPES.values()
            for gate, rows_of_gate in ((None, None), (g.to(dtype)[:, n:], i))
        )
    return calls


def _cached(shape: str) -> dict[str, Call]:
    batch, period, _, _, heads, head_dim = SHAPES[shape]
    calls: dict[str, Call] = {}
    slots = period + 5
    for name, dtype in DTYPES.items():
        for kind in ("none", "layer_norm", "l2", "rope"):
            if kind == "rope" and head_dim % 2:
                continue
            case = cache_case(batch, heads, head_dim, slots, kind, seed=6)
            gen = generator(7)
            qkv = torch.randn(batch * period, 3 * heads * head_dim, generator=gen).to(dtype)
            positions = torch.randperm(slots, generator=gen)[:period]

            def append(c=case, x=qkv, p=positions) -> Results:
                k_cache, v_cache = c.caches()
                q = kernels.qkv_append(x, k_cache, v_cache, p, *c.tables(), c.heads, c.qk_kind, **c.options)
                return q, k_cache, v_cache

            calls[f"qkv_append-{kind}-{name}"] = append
        case = cache_case(batch, heads, head_dim, slots, seed=8, groups=2)
        gen = generator(9)
        q = torch.randn(batch, heads, period, head_dim, generator=gen).to(dtype)
        shape_of_cache = case.caches()[0].shape
        k_cache, v_cache = torch.randint(-128, 128, (2, *shape_of_cache), generator=gen).to(torch.int8).unbind(0)
        ends = torch.randint(1, slots, (period,), generator=gen).to(torch.int32)
        ends[-1] = slots - 1
        calls[f"attention-{name}"] = lambda c=case, q=q, k=k_cache, v=v_cache, e=ends, s=slots: (
            kernels.attention(q, k, v, e, s - 1, *c.tables(), 0.125),
        )
    return calls


def calls(shape: str) -> dict[str, Call]:
    """Every operator with its options, by name."""
    return _quantizing(shape) | _linear(shape) | _cached(shape)


def results(shape: str) -> dict[str, Results]:
    """The results of :func:`calls` on whatever is selected."""
    return {name: call() for name, call in calls(shape).items()}


def bits(tensor: Tensor) -> Tensor:
    """For comparisons bit for bit: 0.0 is not -0.0, a NaN is itself."""
    return tensor.contiguous().view(torch.int8) if tensor.dim() else tensor


def assert_same(got: dict[str, Results], want: dict[str, Results]) -> None:
    assert got.keys() == want.keys()
    different = [
        name
        for name in want
        if not all(torch.equal(bits(a), bits(b)) for a, b in zip(got[name], want[name], strict=True))
    ]
    assert not different, ", ".join(different)
