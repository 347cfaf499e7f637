"""Fake-quantized recipes: the published one and the baselines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ptq4arvg.calibration.quantizers import UniformParams, fake_quantize, search_columns
from ptq4arvg.checkpoint import save
from ptq4arvg.errors import CalibrationError
from ptq4arvg.linear import QuantLinear
from ptq4arvg.models.rar import RAR
from ptq4arvg.pipeline import quantize
from ptq4arvg.recipes import RECIPES as INTEGER_RECIPES
from ptq4arvg.recipes import Recipe, named_recipe
from ptq4arvg.simulate import (
    PUBLISHED_PERCENTILES,
    RECIPES,
    FakeQuantLinear,
    FakeQuantOperand,
    asymmetric_rows,
    simulate,
)
from ptq4arvg_kernels.tables import make_table
from tests.tiny import tiny_calibration, tiny_inputs, tiny_rar

SEEDS = st.integers(0, 2**20)


@pytest.fixture(scope="module")
def model() -> RAR:
    return tiny_rar(0)


@pytest.fixture(scope="module", params=RECIPES)
def simulated(request: pytest.FixtureRequest, model: RAR) -> RAR:
    return simulate(model, request.param, calibration=tiny_calibration(model, 8), samples=8)


def error(model: nn.Module, other: nn.Module, tokens: Tensor, classes: Tensor) -> float:
    exact = model(tokens, classes)
    return float((other(tokens, classes) - exact).square().mean() / exact.square().mean())


# -------------------------------------------------------------------------------------------------------------- pieces


@given(seed=SEEDS, bits=st.sampled_from([6, 8]))
def test_asymmetric_weights_are_within_half_a_step_of_their_window(seed: int, bits: int) -> None:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(5, 300, generator=g) + torch.randn(5, 1, generator=g)
    rounded = asymmetric_rows(w, bits)
    params = search_columns(w.T, bits, PUBLISHED_PERCENTILES)
    delta, zero_point = params.delta[:, None], params.zero_point[:, None]
    low, high = -zero_point * delta, (2**bits - 1 - zero_point) * delta
    clipped = torch.minimum(torch.maximum(w.double(), low), high)
    assert bool(((rounded.double() - clipped).abs() <= delta / 2 * (1 + 1e-4)).all())
    assert rounded.dtype == w.dtype
    assert all(len(row.unique()) <= 2**bits for row in rounded)


@given(seed=SEEDS, w_bits=st.sampled_from([6, 8]), copies=st.integers(1, 3))
def test_a_fake_quantized_linear_is_the_integer_one(seed: int, w_bits: int, copies: int) -> None:
    """``F.linear(x̂, Ŵ, b)`` equals the reference operator's δ s (acc − zq C) + b (invariant 15)."""
    g = torch.Generator().manual_seed(seed)
    limit = 2 ** (w_bits - 1) - 1
    codes = torch.randint(-limit, limit + 1, (9, 20), generator=g).to(torch.int8)
    scale = torch.rand(9, generator=g) / limit + 1e-3
    bias = torch.randn(9, generator=g)
    bits = torch.tensor([8, 6, 6])
    delta = torch.rand(3, generator=g) * 0.1 + 0.01
    zero_point = (torch.rand(3, generator=g) * (2.0**bits - 1)).round().long()
    group = torch.tensor([0, 1, 2, 2, 1])
    integer = QuantLinear.from_codes(codes, scale, bias, w_bits, delta, zero_point, bits, group)
    fake = FakeQuantLinear(codes.float() * scale[:, None], bias, make_table(delta, zero_point, bits, group))
    positions = torch.tensor([3, 0, 1, 4])
    x = 3 * torch.randn(copies, 4, 20, generator=g)
    expected = integer(x, positions)
    assert torch.allclose(fake(x, positions), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_without_positions_the_first_row_is_used() -> None:
    table = make_table([0.1, 0.2], [128, 120], 8, [0, 1])
    layer = FakeQuantLinear(torch.eye(3), None, table)
    x = torch.randn(2, 4, 3)
    assert torch.equal(layer(x), layer(x, torch.zeros(1, dtype=torch.int64)))


def test_operands_by_head_and_slot() -> None:
    delta = torch.rand(2, 5, 1, dtype=torch.float64) * 0.1 + 0.01
    operand = FakeQuantOperand(UniformParams(delta, torch.full((2, 5, 1), 100.0, dtype=torch.float64), 8))
    x = torch.randn(3, 2, 4, 6)
    y = operand(x)
    for head in range(2):
        for slot in range(4):
            single = UniformParams(delta[head, slot], torch.tensor([100.0]).double(), 8)
            assert torch.equal(y[:, head, slot], fake_quantize(x[:, head, slot], single))


def test_operands_move_with_the_model() -> None:
    params = UniformParams(torch.ones(1), torch.zeros(1), 8)
    assert {name for name, _ in FakeQuantOperand(params).named_buffers()} == {"delta", "zero_point"}
    assert FakeQuantOperand(params).to("meta").delta.device.type == "meta"


# ------------------------------------------------------------------------------------------------------------- recipes


def test_the_result_is_marked_and_cannot_be_saved(simulated: RAR, tmp_path: Path) -> None:
    assert type(simulated) is RAR
    assert simulated.quantization["integer"] is False
    assert simulated.quantization["recipe"]["name"] in RECIPES
    with pytest.raises(ValueError, match=r"fake-quantized simulation.*integer weights to save"):
        save(simulated, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="not quantized"):
        save(tiny_rar(0), tmp_path / "x.safetensors")


def test_every_linear_is_replaced_and_logits_stay_close(simulated: RAR, model: RAR) -> None:
    for path in model.linear_specs():
        assert isinstance(simulated.get_submodule(path), FakeQuantLinear), path
    lost = error(model, simulated, *tiny_inputs(model, 12))
    assert 1e-5 < lost < 0.3


def test_weights_are_on_a_grid(simulated: RAR, model: RAR) -> None:
    for path in model.linear_specs():
        for row in simulated.get_submodule(path).weight:
            assert len(row.unique()) <= 64, path


def test_only_the_published_recipe_depends_on_positions(simulated: RAR, model: RAR) -> None:
    paper = simulated.quantization["recipe"]["name"] == "paper"
    for path, spec in model.linear_specs().items():
        table = simulated.get_submodule(path).table
        assert len(table) == model.sequence_length
        assert len(table.unique(dim=0)) == (spec.groups if paper else 1), path
        assert table[:, 3].tolist() == [6.0] * model.sequence_length


def test_operands(simulated: RAR, model: RAR) -> None:
    """q, k, p and v per tensor as published; keys and values as the integer generators keep them in the baselines."""
    paper = simulated.quantization["recipe"]["name"] == "paper"
    for block in simulated.blocks:
        for name in ("q", "k", "p", "v"):
            tap = getattr(block.attn.taps, name)
            if paper:
                assert isinstance(tap, FakeQuantOperand)
                assert tap.bits == 6
                assert tap.delta.shape == (1,)
            elif name in ("k", "v"):
                assert isinstance(tap, FakeQuantOperand)
                assert tap.bits == 8
                assert tap.delta.shape == (model.config.heads, model.sequence_length, 1)
                assert torch.equal(tap.delta[:, 0], tap.delta[:, 1])
                assert not torch.equal(tap.delta[:, 1], tap.delta[:, 2])
            else:
                assert isinstance(tap, nn.Identity)


def test_folded_norms(simulated: RAR, model: RAR) -> None:
    folded = simulated.quantization["recipe"]["name"] != "rtn"
    for pair in model.fold_pairs():
        assert simulated.get_submodule(pair.norm).scale_offset == (0.0 if folded else 1.0)


def test_cached_decode_is_the_full_forward_at_every_step(simulated: RAR) -> None:
    """Including step 0, where the published RAR is off by one (invariants 23, 24)."""
    tokens, classes = tiny_inputs(simulated, 6)
    full = simulated(tokens, classes)
    caches = simulated.new_caches(6)
    near = []
    for step in range(simulated.config.tokens):
        start = step + 1 if step else 0
        window = simulated.window(start, step + 2 - start)
        logits = simulated.step(classes, tokens[:, :step], window, caches)[:, -1]
        near.append(float((logits - full[:, step]).abs().amax()))
    assert near[0] < 1e-4
    # Elsewhere a differently ordered sum may put a value on the other side of a rounding edge.
    assert sorted(near)[len(near) // 2] < 1e-4
    assert max(near) < 0.2 * float(full.std())


def test_rows_do_not_depend_on_their_neighbours(simulated: RAR) -> None:
    """Static: nothing is measured at run time (invariant 26)."""
    tokens, classes = tiny_inputs(simulated, 6)
    together = simulated(tokens, classes)
    alone = torch.cat([simulated(tokens[i : i + 1], classes[i : i + 1]) for i in range(6)])
    assert float((together - alone).abs().median()) < 1e-5


def test_the_model_is_left_alone(model: RAR) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    simulate(model, "paper", calibration=tiny_calibration(model, 3), samples=3)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not hasattr(model, "quantization")


def test_8_bits_lose_less_than_6(model: RAR) -> None:
    run, calibration = tiny_inputs(model, 12), tiny_calibration(model, 8)
    for recipe in RECIPES:
        low, high = (simulate(model, recipe, b, b, calibration, samples=8) for b in (6, 8))
        assert error(model, high, *run) < error(model, low, *run) / 3, recipe


def test_dead_channels_survive_the_published_recipe() -> None:
    """A norm that hands over constants: its shift is the constant, not the middle of an arbitrary window."""
    model = tiny_rar(4)
    with torch.no_grad():
        for block in model.blocks:
            linear = block.adaLN_modulation[1]
            for chunk in (0, 1, 3, 4):  # x = n·(1 + γ) + β with γ = −1, β = ¼
                row = chunk * model.config.dim + 5
                linear.weight[row] = 0
                linear.bias[row] = -1.0 if chunk in (1, 4) else 0.25
    run, calibration = tiny_inputs(model, 12), tiny_calibration(model, 8)
    assert error(model, simulate(model, "paper", 8, 8, calibration, samples=8), *run) < 0.02
    assert error(model, quantize(model, "w8a8", calibration, samples=8), *run) < 0.02


def test_sequences_are_sampled_where_none_are_given(model: RAR) -> None:
    result = simulate(model, "rtn", samples=2, seed=3)
    assert result.quantization["calibration"]["sequences"] == 2
    assert result.quantization["calibration"]["dgc"]["candidates"] == 4


# -------------------------------------------------------------------------------------------------------------- errors


def test_bad_arguments(model: RAR) -> None:
    with pytest.raises(ValueError, match="unknown simulated recipe 'w8a8'; known: rtn, smoothquant, paper"):
        simulate(model, "w8a8")
    with pytest.raises(ValueError, match="weight_bits is 4; supported are 6 and 8"):
        simulate(model, "rtn", weight_bits=4)
    with pytest.raises(ValueError, match="act_bits is 5"):
        simulate(model, "rtn", act_bits=5)
    with pytest.raises(CalibrationError, match="holds no sequences"):
        simulate(model, "rtn", calibration=tiny_calibration(model, 2).select(slice(0, 0)))
    with pytest.raises(CalibrationError, match="at least one sample, got 0"):
        simulate(model, "rtn", samples=0)


@pytest.mark.parametrize("name", ["paper", "Paper", "rtn", "smoothquant"])
def test_simulated_recipes_are_not_integer_ones(name: str, model: RAR) -> None:
    with pytest.raises(ValueError, match=rf"{name}.*cannot be packed; run it with ptq4arvg\.simulate\.simulate"):
        named_recipe(name)
    with pytest.raises(ValueError, match="cannot be packed"):
        quantize(model, name, tiny_calibration(model, 2))


def test_named_recipes() -> None:
    assert named_recipe("W6A8") is INTEGER_RECIPES["w6a8"]
    own = Recipe("own", scaled_roles=())
    assert named_recipe(own) is own
    assert Recipe.from_dict(INTEGER_RECIPES["w6a6"].to_dict()) == INTEGER_RECIPES["w6a6"]
    with pytest.raises(ValueError, match="unknown recipe 'w4a4'; known: w8a8, w6a8, w6a6"):
        named_recipe("w4a4")
