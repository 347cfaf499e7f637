"""Folding is exact, complete and reversible (method.md §1.5, invariants 2 to 5)."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ptq4arvg.calibration.gps import channel_shift, gps_scale, layer_error, smoothquant_scale
from ptq4arvg.calibration.quantizers import search_columns
from ptq4arvg.fold import fold, pair_weight
from ptq4arvg.nn import Norm
from ptq4arvg.pipeline import pair_rows
from tests.calibration.families import DIM, FAMILIES, ModulatedPlainNorm, RMSNormTwoLinears, build, data, linear_inputs
from tests.tiny import tiny_calibration, tiny_inputs, tiny_rar

SEEDS = st.integers(0, 2**20)
KINDS = st.sampled_from(FAMILIES)


def draw(seed: int, width: int) -> tuple[Tensor, Tensor]:
    """Scale over two decades and a shift, float64 ``[D]``."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.exp(torch.randn(width, generator=g, dtype=torch.float64))
    return scale, torch.randn(width, generator=g, dtype=torch.float64)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().double().norm() / b.detach().double().norm())


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


# ----------------------------------------------------------------------------------------------------- tiny families


@given(kind=KINDS, seed=SEEDS)
def test_the_function_does_not_change(kind: type[nn.Module], seed: int) -> None:
    model, run = build(kind, seed), data(seed + 1)
    before = model(*run)
    (pair,) = model.fold_pairs()
    fold(model, pair, *draw(seed + 2, DIM))
    assert relative(model(*run), before) < 1e-5


@given(kind=KINDS, seed=SEEDS)
def test_linears_see_the_scaled_and_shifted_input(kind: type[nn.Module], seed: int) -> None:
    """``x' = x/s − p`` and ``W' = W diag(s)``: folding nothing would also leave the function unchanged."""
    model, run = build(kind, seed), data(seed + 1)
    (pair,) = model.fold_pairs()
    x, weight = linear_inputs(model, pair, run), pair_weight(model, pair)
    scale, shift = draw(seed + 2, DIM)
    fold(model, pair, scale, shift)
    assert relative(linear_inputs(model, pair, run), x.double() / scale - shift) < 1e-5
    assert torch.equal(pair_weight(model, pair), (weight.double() * scale).float())


@given(kind=KINDS, seed=SEEDS)
def test_folding_back_restores_the_parameters(kind: type[nn.Module], seed: int) -> None:
    """(s, p) and then (1/s, −p·s): parameters that existed return, created ones become neutral."""
    model = build(kind, seed)
    (pair,) = model.fold_pairs()
    fold(model, pair, torch.ones(DIM), torch.zeros(DIM))  # creates what is missing, and moves the 1 into the modulation
    before = parameters(model)
    scale, shift = draw(seed, DIM)
    fold(model, pair, scale, shift)
    fold(model, pair, 1 / scale, -shift * scale)
    after = parameters(model)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.allclose(after[name], value, rtol=1e-6, atol=2e-5), name


@given(kind=KINDS, seed=SEEDS)
def test_two_folds_are_one(kind: type[nn.Module], seed: int) -> None:
    """x/s₁ − p₁, then /s₂ − p₂, is x/(s₁s₂) − (p₁/s₂ + p₂)."""
    twice, once = build(kind, seed), build(kind, seed)
    (pair,) = twice.fold_pairs()
    (s1, p1), (s2, p2) = draw(seed, DIM), draw(seed + 1, DIM)
    fold(twice, pair, s1, p1)
    fold(twice, pair, s2, p2)
    fold(once, pair, s1 * s2, p1 / s2 + p2)
    for (name, a), (_, b) in zip(twice.named_parameters(), once.named_parameters(), strict=True):
        assert relative(a, b) < 1e-5, name


def test_an_rmsnorm_gets_the_shift_as_its_bias_and_its_linears_get_biases() -> None:
    model = build(RMSNormTwoLinears, 0)
    (pair,) = model.fold_pairs()
    weights = {path: model.get_submodule(path).weight.double().clone() for path in pair.linears}
    assert model.norm.bias is None
    assert model.w1.bias is None
    scale, shift = draw(1, DIM)
    fold(model, pair, scale, shift)
    assert torch.equal(model.norm.bias, (-shift).float())
    for path, weight in weights.items():
        bias = model.get_submodule(path).bias.double()
        assert torch.allclose(bias, weight @ (shift * scale), rtol=1e-4, atol=1e-5)
    # A second fold treats the created bias like any other: h ← h/s − p.
    fold(model, pair, torch.full((DIM,), 2.0), torch.ones(DIM))
    assert torch.allclose(model.norm.bias.double(), -shift / 2 - 1, rtol=1e-6)
    # … and it is part of the state dict, hence saved.
    assert {"norm.bias", "w1.bias", "w3.bias"} <= model.state_dict().keys()
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_modulation_gives_up_its_constant_and_keeps_its_gate() -> None:
    model = build(ModulatedPlainNorm, 0)
    (pair,) = model.fold_pairs()
    gate = model.modulation.weight[:DIM].clone()
    scale, shift = draw(1, DIM)
    fold(model, pair, scale, shift)
    assert model.norm.scale_offset == 0.0
    assert model.norm.weight is None
    assert model.norm.bias is None
    assert torch.equal(model.modulation.weight[:DIM], gate)
    assert model.modulation.bias[:DIM].abs().max() == 0
    assert torch.allclose(model.modulation.bias[DIM : 2 * DIM].double(), 1 / scale, rtol=1e-6)
    assert torch.allclose(model.modulation.bias[2 * DIM :].double(), -shift, rtol=1e-6)


@pytest.mark.parametrize("bits", [6, 8])
@pytest.mark.parametrize("kind", FAMILIES)
def test_shift_and_gps_serve_every_kind_of_norm(kind: type[nn.Module], bits: int) -> None:
    """Outlier channels and offsets are folded in, as in the stress models, and the search finds its way back."""
    model, run = build(kind, 0), data(1, 1024)
    (pair,) = model.fold_pairs()
    exact = model(*run)
    gain, offset = draw(2, DIM)
    fold(model, pair, gain**1.5, 8 * offset)
    x = linear_inputs(model, pair, run).double()

    def error() -> float:
        """Squared output error of the pair with its input per tensor and its weight per row, on the true scale."""
        rows, weight = linear_inputs(model, pair, run), pair_weight(model, pair)
        power = float((rows @ weight.T).double().square().sum())
        return power * layer_error(rows, weight, torch.ones(DIM, dtype=torch.float64), bits, bits)

    before = error()
    shift = channel_shift(x, bits)
    found = gps_scale(x - shift, pair_weight(model, pair), bits, bits)
    fold(model, pair, found.scale, shift / found.scale)
    assert error() < before / 10
    assert relative(model(*run), exact) < 1e-5


@pytest.mark.parametrize(
    ("scale", "shift", "message"),
    [
        (torch.zeros(DIM), torch.zeros(DIM), "norm: scale contains 0.0.*positive"),
        (-torch.ones(DIM), torch.zeros(DIM), "scale contains -1.0"),
        (torch.full((DIM,), math.nan), torch.zeros(DIM), "scale contains nan.*finite"),
        (torch.full((DIM,), math.inf), torch.zeros(DIM), "scale contains inf"),
        (torch.ones(DIM), torch.full((DIM,), math.inf), "shift contains inf"),
        (torch.ones(DIM + 1), torch.zeros(DIM), rf"scale has shape \({DIM + 1},\), expected \({DIM},\)"),
        (torch.ones(DIM), torch.zeros(1, DIM), "shift has shape"),
    ],
)
@pytest.mark.parametrize("kind", FAMILIES)
def test_bad_factors_are_refused_and_nothing_is_touched(
    kind: type[nn.Module], scale: Tensor, shift: Tensor, message: str
) -> None:
    model = build(kind, 0)
    before = parameters(model)
    with pytest.raises(ValueError, match=message):
        fold(model, model.fold_pairs()[0], scale, shift)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_a_foreign_norm_is_refused() -> None:
    model = build(FAMILIES[0], 0)
    model.norm = nn.LayerNorm(DIM)
    with pytest.raises(ValueError, match="norm is a LayerNorm"):
        fold(model, model.fold_pairs()[0], torch.ones(DIM), torch.zeros(DIM))


# --------------------------------------------------------------------------------------------------------------- RAR


@given(seed=SEEDS)
def test_rar_computes_the_same_with_all_pairs_folded(seed: int) -> None:
    model = tiny_rar(seed)
    run = tiny_inputs(model, 6, seed)
    before = model(*run)
    for i, pair in enumerate(model.fold_pairs()):
        fold(model, pair, *draw(seed + i, model.config.dim))
    assert relative(model(*run), before) < 1e-5
    assert all(model.get_submodule(pair.norm).scale_offset == 0.0 for pair in model.fold_pairs())


def test_rar_keeps_its_norms_other_chunks_and_keys() -> None:
    model = tiny_rar(1)
    before = copy.deepcopy(model.state_dict())
    width = model.config.dim
    pair = model.fold_pairs()[1]  # norm2 → fc1: chunks 3 (shift) and 4 (scale) of the block's modulation
    scale, shift = draw(0, width)
    fold(model, pair, scale, shift)
    after = model.state_dict()
    assert after.keys() == before.keys()
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    modulation = "blocks.0.adaLN_modulation.1"
    linear = "blocks.0.mlp.fc1"
    assert changed == {f"{modulation}.weight", f"{modulation}.bias", f"{linear}.weight", f"{linear}.bias"}
    for kind in ("weight", "bias"):
        same = (after[f"{modulation}.{kind}"] == before[f"{modulation}.{kind}"]).view(6, width, -1).flatten(1).all(1)
        assert same.tolist() == [True, True, True, False, False, True]
    # No tensor of any kind was added to the forward pass, and only this norm lost its constant.
    offsets = {name: m.scale_offset for name, m in model.named_modules() if isinstance(m, Norm)}
    assert {name for name, offset in offsets.items() if offset == 0.0} == {pair.norm}
    assert set(offsets.values()) == {0.0, 1.0}


def test_folding_zero_initialised_modulations() -> None:
    """The constant 1 must survive where modulations contribute nothing else."""
    model = tiny_rar(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adaLN_modulation" in name:
                parameter.zero_()
    run = tiny_inputs(model, 6)
    x = model(*run)
    for i, pair in enumerate(model.fold_pairs()):
        fold(model, pair, *draw(i, model.config.dim))
    assert relative(model(*run), x) < 1e-5


@pytest.mark.parametrize("bits", [6, 8])
def test_smoothquant_shift_and_gps_in_turn_change_nothing_but_the_grid(bits: int) -> None:
    """The published order, SQ → shift → GPS, and what it does to zero points (invariants 2 and 4)."""
    model = tiny_rar(3)
    run, sequences = tiny_inputs(model, 6), tiny_calibration(model, 8)
    before, pairs = model(*run), model.fold_pairs()
    rows = pair_rows(model, pairs, sequences, 8)
    for pair in pairs:
        scale = smoothquant_scale(rows[pair.norm].abs().amax(0), pair_weight(model, pair))
        fold(model, pair, scale, torch.zeros_like(scale))
    assert relative(model(*run), before) < 1e-5

    rows = pair_rows(model, pairs, sequences, 8)
    offset = {pair.norm: search_columns(rows[pair.norm], bits).zero_point for pair in pairs}
    for pair in pairs:
        fold(model, pair, torch.ones(model.config.dim), channel_shift(rows[pair.norm], bits))
    assert relative(model(*run), before) < 1e-5

    shifted = pair_rows(model, pairs, sequences, 8)
    middle = 2 ** (bits - 1)
    for pair in pairs:
        zero_point = search_columns(shifted[pair.norm], bits).zero_point
        assert bool(((zero_point - middle).abs() <= 1).all()), pair.norm
        # Without the shift they are elsewhere.
        assert bool(((offset[pair.norm] - middle).abs() > 1).any()), pair.norm

    for pair in pairs:
        found = gps_scale(shifted[pair.norm], pair_weight(model, pair), bits, bits)
        fold(model, pair, found.scale, torch.zeros_like(found.scale))
    assert relative(model(*run), before) < 2e-5
