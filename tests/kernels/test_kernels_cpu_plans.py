"""Plans are the operators one after the other, bit for bit: layers and whole blocks, on every instruction set."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import ptq4arvg_kernels as kernels
from ptq4arvg_kernels.backends.cpu import native, plans
from tests.kernels.cpu_cases import bits, running, threads
from tests.kernels.kernel_cases import cache_case, generator, instruction_sets, linear_case, random_table

pytestmark = pytest.mark.skipif(not instruction_sets(), reason=f"no CPU backend: {native.WHY_NOT}")
every_set = pytest.mark.parametrize("instruction_set", instruction_sets())

WIDTH, HIDDEN, HEADS, HEAD_DIM, SLOTS = 70, 90, 3, 20, 9
TABLE = random_table(SLOTS, [8, 6, 6], 0, step=0.05)


def _layer(out_features: int, in_features: int, w_bits: int = 6, paired: bool = False) -> tuple[Any, ...]:
    """The operands of an operator without codes and positions, as a packed layer takes them."""
    case = linear_case(1, out_features, in_features, w_bits, [8], seed=out_features)
    _, _, *weights = case.operands[:8]
    return (*weights, TABLE, paired)


def _same(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


@pytest.mark.sanitize
@every_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prologue", ["none", "silu", "norm", "modulated"])
def test_layer(instruction_set: str, dtype: torch.dtype, prologue: str) -> None:
    gen = generator(1)
    operands = _layer(50, WIDTH)
    x = torch.randn(8, WIDTH, generator=gen).to(dtype)
    positions = torch.tensor([4, 0, 7, 2])
    modulation = torch.randn(2, 3 * WIDTH, generator=gen).to(dtype)
    rows = torch.tensor([0] * 4 + [1] * 4, dtype=torch.int32)
    weight = torch.randn(WIDTH, generator=gen)
    norm = plans.NormOperands("layer", 1e-6, weight, None, 0.0)
    with running(instruction_set):
        if prologue in ("none", "silu"):
            plan = plans.LayerPlan(plans.PackedLayer(*operands), prologue)
            got = plan(x, positions)
            codes = kernels.quantize(x, TABLE, positions, prologue)
        elif prologue == "norm":
            got = plans.LayerPlan(plans.PackedLayer(*operands), norm=norm)(x, positions)
            codes = kernels.adaln_quant(x, "layer", 1e-6, weight, None, None, None, None, 0.0, TABLE, positions)
        else:
            norm = dataclasses.replace(norm, scale=2, shift=0)
            got = plans.LayerPlan(plans.PackedLayer(*operands), norm=norm)(x, positions, modulation, rows)
            scale, shift = modulation[:, 2 * WIDTH :], modulation[:, :WIDTH]
            codes = kernels.adaln_quant(x, "layer", 1e-6, weight, None, scale, shift, rows, 0.0, TABLE, positions)
        want = kernels.linear(*codes, *operands[:-1], positions, "none", dtype)
    assert _same(got, want)


def _block(activation: str, qk_kind: str) -> tuple[plans.BlockOperands, dict[str, tuple[Any, ...]]]:
    paired = activation == "swiglu"
    inner = HEADS * HEAD_DIM
    layers = {
        "qkv": _layer(3 * inner, WIDTH, 8),
        "proj": _layer(WIDTH, inner),
        "fc1": _layer(2 * HIDDEN if paired else HIDDEN, WIDTH, 6, paired),
        "fc2": _layer(WIDTH, HIDDEN, 8),
    }
    case = cache_case(2, HEADS, HEAD_DIM, SLOTS, qk_kind)
    options = {name: case.options.get(name) for name in ("q_weight", "q_bias", "k_weight", "k_bias", "q_scale", "rope")}
    vectors = torch.randn(2, WIDTH, generator=generator(5)).unbind(0)
    operands = plans.BlockOperands(
        heads=HEADS,
        head_dim=HEAD_DIM,
        norm1=plans.NormOperands("layer", 1e-6, *vectors, 1.0, scale=1, shift=0, gate=2),
        norm2=plans.NormOperands("rms", 1e-5, None, None, 0.0, scale=4, shift=3, gate=5),
        activation=activation,
        qk_kind=qk_kind,
        qk_eps=1e-6,
        k_table=case.k_table,
        v_table=case.v_table,
        kv_group=case.kv_group,
        softmax_scale=0.2,
        **options,
        **{name: plans.PackedLayer(*layer) for name, layer in layers.items()},
    )
    return operands, layers


def _by_operators(
    o: plans.BlockOperands, layers: dict[str, tuple[Any, ...]], x: Tensor, positions: Tensor, call: tuple[Any, ...]
) -> Tensor:
    ends, span, modulation, rows, k_cache, v_cache = call
    chunk = modulation.split(WIDTH, dim=1)

    def norm(n: plans.NormOperands, y: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = chunk[n.scale], chunk[n.shift]
        return kernels.adaln_quant(
            y, n.kind, n.eps, n.weight, n.bias, scale, shift, rows, n.scale_offset, TABLE, positions
        )

    def operands(name: str, codes: tuple[Tensor, Tensor]) -> tuple[Any, ...]:
        return (*codes, *layers[name][:-1], positions)

    tables = (o.k_table, o.v_table, o.kv_group)
    qkv = kernels.linear(*operands("qkv", norm(o.norm1, x)), "none", x.dtype)
    options = (o.q_weight, o.q_bias, o.k_weight, o.k_bias, o.q_scale, o.rope, o.qk_eps)
    q = kernels.qkv_append(qkv, k_cache, v_cache, positions, *tables, HEADS, o.qk_kind, *options)
    mixed = kernels.attention(q, k_cache, v_cache, ends, span, *tables, o.softmax_scale)
    proj = operands("proj", kernels.quantize(mixed, TABLE, positions))
    x = kernels.linear_gate_residual(*proj, chunk[o.norm1.gate], rows, x)
    fc1 = operands("fc1", norm(o.norm2, x))
    hidden = (
        kernels.linear_swiglu_quant(*fc1, TABLE)
        if o.activation == "swiglu"
        else kernels.linear_quant(*fc1, o.activation, TABLE)
    )
    return kernels.linear_gate_residual(*operands("fc2", hidden), chunk[o.norm2.gate], rows, x)


def _call(period: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    gen = generator(7)
    x = torch.randn(2 * period, WIDTH, generator=gen).to(dtype)
    positions = torch.arange(SLOTS - period, SLOTS)
    ends = (positions + 1).to(torch.int32)
    modulation = torch.randn(3, 6 * WIDTH, generator=gen).to(dtype)
    rows = torch.randint(0, 3, (2 * period,), generator=gen).to(torch.int32)
    shape = (2, HEADS, SLOTS, 32)
    caches = torch.randint(-128, 128, (2, *shape), generator=gen).to(torch.int8).unbind(0)
    return x, positions, (ends, SLOTS, modulation, rows, *caches)


@pytest.mark.sanitize
@every_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("activation", "qk_kind"), [("gelu_tanh", "layer_norm"), ("swiglu", "rope"), ("silu", "l2")])
@pytest.mark.parametrize("period", [1, 7])
def test_block(instruction_set: str, dtype: torch.dtype, activation: str, qk_kind: str, period: int) -> None:
    operands, layers = _block(activation, qk_kind)
    x, positions, call = _call(period, dtype)
    with running(instruction_set):
        caches = [cache.clone() for cache in call[4:]]
        want = _by_operators(operands, layers, x, positions, (*call[:4], *caches))
        for count, gomp in ((1, True), (2, True), (3, True), (3, False)):
            again = [cache.clone() for cache in call[4:]]
            with threads(count, gomp):
                got = plans.BlockPlan(operands)(x, positions, *call[:4], *again)
            assert _same(got, want)
            assert all(torch.equal(a, b) for a, b in zip(again, caches, strict=True))


def test_block_in_place() -> None:
    """The output may be the input itself."""
    operands, _ = _block("gelu_erf", "none")
    x, positions, call = _call(3, torch.float32)
    plan = plans.BlockPlan(operands)
    want = plan(x, positions, *call[:4], *(cache.clone() for cache in call[4:]))
    assert want is not None
    view, maybe = native.view, native.maybe
    ends, span, modulation, rows, k_cache, v_cache = call
    views = (view(positions), view(ends), span, maybe(modulation), maybe(rows), view(k_cache), view(v_cache))
    assert plan.run(view(x), *views, view(x))
    assert _same(x, want)


def test_weights_come_back_as_stored() -> None:
    operands = _layer(50, WIDTH)
    assert torch.equal(plans.PackedLayer(*operands).qweight(), operands[0])


@pytest.mark.sanitize
@pytest.mark.parametrize(
    "spoil",
    [
        {"positions": torch.tensor([0, 1, SLOTS])},
        {"positions": torch.tensor([0, -1, 2])},
        {"positions": torch.tensor([0, 2, 2])},
        {"ends": torch.tensor([0, 2, 3], dtype=torch.int32)},
        {"ends": torch.tensor([1, 2, SLOTS + 1], dtype=torch.int32)},
        {"rows": torch.tensor([0, 1, 2, 0, 1, 3], dtype=torch.int32)},
        {"x": torch.full((6, WIDTH), float("nan"))},
    ],
    ids=["position", "negative position", "same slot", "sees nothing", "sees too much", "modulation row", "not finite"],
)
def test_bad_data_of_a_call(spoil: dict[str, Tensor]) -> None:
    operands, _ = _block("silu", "none")
    x, positions, (ends, span, modulation, rows, *caches) = _call(3, torch.float32)
    got = plans.BlockPlan(operands)(
        spoil.get("x", x),
        spoil.get("positions", positions),
        spoil.get("ends", ends),
        span,
        modulation,
        spoil.get("rows", rows),
        *caches,
    )
    assert got is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 2}, "qkv does not fit the block"),
        ({"heads": 0}, "num_heads|heads is 0"),
        ({"proj": "fc1"}, "proj does not fit the block"),
        ({"activation": "swiglu"}, "fc1 does not fit the block"),
        ({"qk_kind": "l2"}, "l2 needs q_scale"),
        ({"qk_kind": "rope"}, "rope is missing"),
        ({"k_table": torch.zeros(2, HEADS, 4)}, "breaks the law"),
        ({"kv_group": torch.full((SLOTS,), 2, dtype=torch.int32)}, "kv_group is 2, expected 0 to 1"),
        ({"kv_group": torch.zeros(SLOTS)}, "kv_group is float32, expected int32"),
        ({"qk_eps": "small"}, "qk_eps has the wrong type"),
        ({"k_table": torch.zeros(2, HEADS, 8)[..., ::2]}, "not contiguous"),
    ],
)
def test_operands_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    operands, _ = _block("gelu_erf", "none")
    changes = {name: getattr(operands, value) if value == "fc1" else value for name, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        plans.BlockPlan(dataclasses.replace(operands, **changes))


def test_layers_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="paired layer belongs into a block"):
        plans.LayerPlan(plans.PackedLayer(*_layer(50, WIDTH, 6, True)))
    norm = plans.NormOperands("rms", 1e-6, None, None, 1.0, gate=0)
    with pytest.raises(ValueError, match="norm has no gate"):
        plans.LayerPlan(plans.PackedLayer(*_layer(50, WIDTH)), norm=norm)
    with pytest.raises(ValueError, match="both scale and shift"):
        plans.LayerPlan(plans.PackedLayer(*_layer(50, WIDTH)), norm=dataclasses.replace(norm, gate=-1, scale=0))
    qweight, *rest = _layer(50, WIDTH)
    with pytest.raises(ValueError, match="corrupt"):
        plans.PackedLayer(torch.zeros_like(qweight), *rest)
    *most, _, paired = _layer(50, WIDTH)
    with pytest.raises(ValueError, match="breaks the law"):
        plans.LayerPlan(plans.PackedLayer(*most, torch.zeros(SLOTS, 4), paired))
    plan = plans.LayerPlan(plans.PackedLayer(*_layer(50, WIDTH)))
    with pytest.raises(ValueError, match="modulation has nothing to modulate"):
        plan(torch.zeros(1, WIDTH), torch.tensor([0]), torch.zeros(1, WIDTH))
    with pytest.raises(ValueError, match="x has size 3 in dimension 1"):
        plan(torch.zeros(1, 3), torch.tensor([0]))
    assert plan(torch.zeros(1, WIDTH), torch.tensor([SLOTS])) is None
