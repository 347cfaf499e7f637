"""The pipeline on tiny generators: what quantize returns, that it is faithful, and what it refuses."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ptq4arvg.blocks import QuantBlock, QuantHead
from ptq4arvg.errors import CalibrationError
from ptq4arvg.fold import fold
from ptq4arvg.linear import QuantLinear
from ptq4arvg.models.rar import PREFIX, RAR
from ptq4arvg.pipeline import collect_calibration, quantize
from ptq4arvg.protocol import ROLES, CalibrationSet
from ptq4arvg.recipes import RECIPES, Recipe, named_recipe
from tests.simulated import simulated_logits
from tests.tiny import tiny_calibration, tiny_inputs, tiny_rar

BITS = {"w8a8": (8, 8), "w6a8": (6, 8), "w6a6": (6, 6)}
# Widths that are no multiple of what is packed; head width 20 is padded in the cache.
SIZES = {"dim": 40, "mlp_dim": 52}
SAMPLES = 8


def bits(value: int, **roles: int) -> dict[str, int]:
    return {**dict.fromkeys(ROLES, value), **roles}


MIXED = Recipe(
    "mixed", weight_bits=bits(6, head=8, adaln=8), act_bits=bits(6, head=8, proj=8), sink_bits=8, scaled_roles=("qkv",)
)


@pytest.fixture(scope="module")
def model() -> RAR:
    return tiny_rar(0, **SIZES)


@pytest.fixture(scope="module")
def calibration(model: RAR) -> CalibrationSet:
    return collect_calibration(model, SAMPLES, seed=1)


@pytest.fixture(scope="module")
def quantized(model: RAR, calibration: CalibrationSet) -> dict[str, RAR]:
    recipes: list[str | Recipe] = [*RECIPES, MIXED]
    return {
        recipe if isinstance(recipe, str) else recipe.name: quantize(model, recipe, calibration, samples=12)
        for recipe in recipes
    }


NAMES = pytest.mark.parametrize("name", [*RECIPES, "mixed"])


def sqnr(reference: Tensor, other: Tensor) -> float:
    """In dB, of mean-centred logits."""
    reference, other = (x.double() - x.double().mean(-1, keepdim=True) for x in (reference, other))
    return float(10 * torch.log10(reference.square().sum() / (reference - other).square().sum()))


def layers_of(model: RAR) -> dict[str, list[QuantLinear]]:
    """Integer layers by role."""
    found: dict[str, list[QuantLinear]] = {role: [] for role in ROLES}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            role = name.rsplit(".", 1)[1]
            found["head" if role == "linear" else role].append(module)
    return found


# --- the result -------------------------------------------------------------------------------------------------------


@NAMES
def test_no_floating_point_matrix_is_left(quantized: dict[str, RAR], name: str) -> None:
    result = quantized[name]
    assert isinstance(result, RAR)
    assert not result.training
    assert all(isinstance(block, QuantBlock) for block in result.blocks)
    assert isinstance(result.fused_head, QuantHead)
    assert not any(isinstance(module, nn.Linear) for module in result.modules())
    assert {role: len(layers) for role, layers in layers_of(result).items()} == {
        "adaln": 3,
        "qkv": 2,
        "proj": 2,
        "fc1": 2,
        "fc2": 2,
        "head": 1,
    }
    # What stays in floating point: embeddings and position tables, norms, and vectors.
    matrices = {key for key, value in result.named_parameters() if value.ndim >= 2}
    assert matrices == {
        "cls_token",
        "pos_embed",
        "target_aware_pos_embed",
        "timesteps_embeddings",
        "embeddings.weight",
    }
    assert not any(parameter.requires_grad for parameter in result.parameters())


@pytest.mark.parametrize("name", RECIPES)
def test_bits_are_those_of_the_recipe(quantized: dict[str, RAR], name: str) -> None:
    weight_bits, act_bits = BITS[name]
    for role, layers in layers_of(quantized[name]).items():
        for layer in layers:
            assert layer.w_bits == weight_bits
            # The head has one group for all positions, and so no sinks of its own.
            groups = 1 if role == "head" else 17 if role == "adaln" else 3
            sinks = 0 if role == "head" else PREFIX
            assert layer.act_bits.tolist() == [8] * sinks + [act_bits] * (groups - sinks)


def test_bits_may_differ_by_role(quantized: dict[str, RAR]) -> None:
    for role, layers in layers_of(quantized["mixed"]).items():
        for layer in layers:
            assert layer.w_bits == MIXED.weight_bits[role]
            assert int(layer.act_bits[-1]) == MIXED.act_bits[role]
    assert set(quantized["mixed"].quantization["scaling"]) == {"blocks.0.norm1", "blocks.1.norm1"}


def test_sink_bits_are_those_of_the_recipe(model: RAR, calibration: CalibrationSet) -> None:
    narrow, wide = (
        layers_of(
            quantize(
                model,
                Recipe(f"sinks {width}", bits(6), bits(6), sink_bits=width, compensate=False),
                calibration,
                samples=12,
            )
        )
        for width in (6, 8)
    )
    for role, layers in narrow.items():
        for layer, wider in zip(layers, wide[role], strict=True):
            assert set(layer.act_bits.tolist()) == {6}
            # The sinks' codes alone differ: weights, not compensated, and every other group are the same.
            assert torch.equal(layer.qweight, wider.qweight)
            same = layer.act_bits == wider.act_bits
            assert torch.equal(layer.delta[same], wider.delta[same])
            assert bool((layer.delta[~same] > wider.delta[~same]).all())


def test_wide_groups_are_not_narrowed_by_sink_bits(model: RAR, calibration: CalibrationSet) -> None:
    result = quantize(model, Recipe("w8a8 sinks 6", sink_bits=6), calibration, samples=12)
    for layers in layers_of(result).values():
        assert all(set(layer.act_bits.tolist()) == {8} for layer in layers)


@NAMES
def test_nothing_of_a_fold_remains_in_the_forward(quantized: dict[str, RAR], name: str) -> None:
    """Norms that were scaled have absorbed the constant 1 of the modulation; the others keep it."""
    result = quantized[name]
    offsets = {path: module.scale_offset for path, module in result.named_modules() if hasattr(module, "scale_offset")}
    scaled = {path.replace("adaln_before_head", "fused_head") for path in result.quantization["scaling"]}
    for path, offset in offsets.items():
        assert offset == (0.0 if path in scaled else 1.0), path


# --- fidelity ---------------------------------------------------------------------------------------------------------


@NAMES
def test_logits_are_those_of_the_fake_quantized_simulation(quantized: dict[str, RAR], name: str) -> None:
    """The simulation is in float64, from dequantized weights and the same tables.

    A value within float32 noise of a rounding boundary may land on the other code and disturb the rest of its own
    sequence; there are some 2·10⁴ values per sequence, each with a chance of about 1e-6 of that. All other sequences
    agree to float32.
    """
    result = quantized[name]
    tokens, classes = tiny_inputs(result, 30, 5)
    expected, logits = simulated_logits(result, tokens, classes), result(tokens, classes)
    worst = (logits - expected).abs().amax((1, 2))
    assert (worst < 1e-5).float().mean() >= 0.85
    assert sqnr(expected, logits) > 50


@pytest.mark.parametrize("seed", range(3))
def test_logits_are_close_to_those_of_the_model(seed: int) -> None:
    """Random weights have no outliers, so a uniform grid bounds the loss.

    Measured are 28.5 to 32 dB at W8A8, 25 to 29 at W6A8 and 21.5 to 25 at W6A6; thresholds leave 3 dB for other seeds.
    """
    original = tiny_rar(seed, **SIZES)
    recorded = collect_calibration(original, SAMPLES, seed)
    tokens, classes = tiny_inputs(original, 30, seed + 10)
    reference = original(tokens, classes)
    found = {name: sqnr(reference, quantize(original, name, recorded, samples=12)(tokens, classes)) for name in RECIPES}
    assert found["w8a8"] > 25.5
    assert found["w6a8"] > 22
    assert found["w6a6"] > 18.5
    assert found["w8a8"] > found["w6a8"] > found["w6a6"]


@pytest.mark.parametrize("seed", range(2))
def test_outlier_channels_cost_nothing(seed: int) -> None:
    """Channels with lognormal gains and offsets many times their size, which are taken out again before rounding."""
    original = tiny_rar(seed, **SIZES)
    harder = copy.deepcopy(original)
    gen = torch.Generator().manual_seed(seed)
    for pair in harder.fold_pairs():
        gain, offset = torch.exp(1.5 * torch.randn(40, generator=gen)), 4 * torch.randn(40, generator=gen)
        fold(harder, pair, gain, offset / gain)
    tokens, classes = tiny_inputs(original, 30, seed + 10)
    reference = original(tokens, classes)
    torch.testing.assert_close(harder(tokens, classes), reference, rtol=0, atol=1e-4)
    recorded = collect_calibration(original, SAMPLES, seed)
    plain, result = (quantize(model, "w6a6", recorded, samples=12) for model in (original, harder))
    assert sqnr(reference, result(tokens, classes)) > sqnr(reference, plain(tokens, classes)) - 1.5
    # The shift is symmetric: behind it the zero point of all but the sinks is the middle of the grid, nearly.
    for role in ("qkv", "fc1", "head"):
        for layer in layers_of(result)[role]:
            assert abs(int(layer.zero_point[-1]) - 32) <= 2


@NAMES
def test_decoding_is_the_full_pass_bit_for_bit(quantized: dict[str, RAR], name: str) -> None:
    result = quantized[name]
    tokens, classes = tiny_inputs(result, 5, 2)
    full = result.step(classes, tokens[:, :-1], result.window(0, result.sequence_length), None)
    caches = result.new_caches(5)
    first = result.step(classes, tokens[:, :0], result.window(0, PREFIX), caches)
    assert torch.equal(first, full[:, :PREFIX])
    for step in range(1, result.config.tokens):
        logits = result.step(classes, tokens[:, :step], result.window(step + 1, 1), caches)
        assert torch.equal(logits, full[:, step + 1 : step + 2]), step
    assert torch.equal(result(tokens, classes), full[:, 1:])


@NAMES
def test_sampling_with_and_without_cache(quantized: dict[str, RAR], name: str) -> None:
    classes = torch.tensor([0, 4, 4, 2])
    tokens = quantized[name].generate(classes, seed=3)
    assert torch.equal(tokens, quantized[name].generate(classes, seed=3, cached=False))
    assert tokens.shape == (4, 16)


@NAMES
def test_rows_do_not_depend_on_their_batch(quantized: dict[str, RAR], name: str) -> None:
    result = quantized[name]
    tokens, classes = tiny_inputs(result, 7, 3)
    together = result(tokens, classes)
    for row in range(7):
        assert torch.equal(result(tokens[row : row + 1], classes[row : row + 1])[0], together[row])
    order = torch.tensor([6, 2, 2, 0])
    assert torch.equal(result(tokens[order], classes[order]), together[order])


def test_bad_requests_are_refused_as_by_the_original(quantized: dict[str, RAR]) -> None:
    result = quantized["w6a6"]
    with pytest.raises(ValueError, match="class 9 is out of range"):
        result.generate(torch.tensor([9]))
    with pytest.raises(ValueError, match="17 tokens"):
        result(torch.zeros(1, 17, dtype=torch.int64), torch.tensor([0]))


# --- the call ---------------------------------------------------------------------------------------------------------


def test_model_is_left_unchanged(model: RAR, calibration: CalibrationSet) -> None:
    original = copy.deepcopy(model).train()
    before = {key: value.clone() for key, value in original.state_dict().items()}
    modules = [name for name, _ in original.named_modules()]
    sequences = {name: value.clone() for name, value in calibration.inputs.items()}
    quantize(original, "w6a6", calibration, samples=12)
    assert original.training
    assert [name for name, _ in original.named_modules()] == modules
    assert not hasattr(original, "quantization")
    assert all(torch.equal(value, before[key]) for key, value in original.state_dict().items())
    assert not any(module._forward_pre_hooks for module in original.modules())
    assert all(torch.equal(value, sequences[name]) for name, value in calibration.inputs.items())


def test_results_are_reproducible(model: RAR) -> None:
    first, again, other = (quantize(model, "w6a8", samples=4, seed=seed) for seed in (5, 5, 6))
    state, same, different = first.state_dict(), again.state_dict(), other.state_dict()
    assert all(torch.equal(value, same[key]) for key, value in state.items())
    assert first.quantization == again.quantization
    assert not all(torch.equal(value, different[key]) for key, value in state.items())


def test_given_sequences_are_those_that_would_be_recorded(model: RAR) -> None:
    recorded = collect_calibration(model, 4, seed=5)
    given, own = quantize(model, "w6a8", recorded, samples=4, seed=5), quantize(model, "w6a8", samples=4, seed=5)
    assert all(torch.equal(value, own.state_dict()[key]) for key, value in given.state_dict().items())
    assert len(recorded) == 8
    assert recorded.conditional.sum() == 4


def test_size_of_calibration_batches_is_immaterial(model: RAR, calibration: CalibrationSet) -> None:
    """Statistics are pooled: what remains is float noise of the forward pass, which moves a step or code by a grain."""
    one, other = (quantize(model, "w8a8", calibration, samples=12, batch=size) for size in (12, 5))
    for name, layer in one.named_modules():
        if isinstance(layer, QuantLinear):
            twin = other.get_submodule(name)
            torch.testing.assert_close(twin.delta, layer.delta, rtol=2e-3, atol=0)


def test_progress_climbs_to_one(model: RAR) -> None:
    seen: list[tuple[float, str]] = []
    quantize(model, "w8a8", samples=2, progress=lambda fraction, what: seen.append((fraction, what)))
    fractions = [fraction for fraction, _ in seen]
    assert fractions == sorted(fractions)
    assert 0 < fractions[0] < 0.1
    assert seen[-1][0] == 1.0
    assert fractions.count(1.0) == 1
    stages = list(dict.fromkeys(what for _, what in seen))
    assert len(stages) >= 5
    assert all(stages)


@pytest.mark.parametrize("name", [*RECIPES, "mixed"])
def test_description_is_json(quantized: dict[str, RAR], name: str) -> None:
    result = quantized[name]
    described = json.loads(json.dumps(result.quantization))
    assert described == result.quantization
    recipe = MIXED if name == "mixed" else RECIPES[name]
    assert described["integer"] is True
    assert described["format_version"] == 1
    assert described["family"] == "rar"
    assert described["config"] == result.config_dict()
    assert Recipe.from_dict(described["recipe"]) == recipe
    assert described["weight_bits"] == max(recipe.weight_bits.values())
    assert described["act_bits"] == max(recipe.act_bits.values())
    dgc = described["calibration"]["dgc"]
    assert dgc["conditional"] + dgc["unconditional"] == described["calibration"]["sequences"] == 12


def test_without_dgc_branches_alternate(model: RAR, calibration: CalibrationSet) -> None:
    result = quantize(model, Recipe("plain", dgc=False), calibration, samples=6)
    first = [0, SAMPLES, 1, SAMPLES + 1, 2, SAMPLES + 2]
    expected = quantize(model, Recipe("plain", dgc=False), calibration.select(torch.tensor(first)), samples=6)
    assert result.quantization["calibration"] == {"seed": 0, "sequences": 6, "dgc": None}
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in result.state_dict().items())


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [0, -3])
def test_no_samples_is_a_calibration_error(model: RAR, calibration: CalibrationSet, samples: int) -> None:
    with pytest.raises(CalibrationError, match=rf"{samples}.*samples ≥ 1"):
        collect_calibration(model, samples)
    with pytest.raises(CalibrationError, match=rf"{samples}.*samples ≥ 1"):
        quantize(model, samples=samples)
    with pytest.raises(CalibrationError, match=rf"{samples}.*samples ≥ 1"):
        quantize(model, calibration=calibration, samples=samples)


def test_empty_set_is_a_calibration_error(model: RAR, calibration: CalibrationSet) -> None:
    with pytest.raises(CalibrationError, match="no sequences"):
        quantize(model, calibration=calibration.select(slice(0, 0)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("path", ["blocks.1.mlp.fc1.weight", "lm_head.bias", "blocks.0.adaLN_modulation.1.weight"])
def test_damaged_weights_are_a_calibration_error(path: str, value: float) -> None:
    damaged = tiny_rar(0)
    sequences = tiny_calibration(damaged, 4)
    damaged.get_parameter(path).view(-1)[3] = value
    with pytest.raises(CalibrationError, match=r"nan|NaN|inf"):
        quantize(damaged, "w8a8", sequences, samples=4)


def test_constant_and_dead_channels_are_quantized(calibration: CalibrationSet) -> None:
    """Channels that never vary or are always zero have no range of their own; they must not break their neighbours."""
    odd = tiny_rar(1, **SIZES)
    for block in odd.blocks:
        assert isinstance(block, nn.Module)
        modulation = block.get_submodule("adaLN_modulation.1")
        for chunk in (0, 1):  # shift1, scale1 of channels 0 and 1: the norm's output is 0 and 0.7 there, always
            for channel in (0, 1):
                modulation.get_parameter("weight")[chunk * 40 + channel] = 0
                modulation.get_parameter("bias")[chunk * 40 + channel] = [0.7 * channel, -1.0][chunk]
        block.get_submodule("mlp.fc1").get_parameter("weight")[:, 5] = 0
    sequences = collect_calibration(odd, SAMPLES, 0)
    tokens, classes = tiny_inputs(odd, 20, 3)
    assert sqnr(odd(tokens, classes), quantize(odd, "w8a8", sequences, samples=12)(tokens, classes)) > 25


def test_unknown_recipes_are_named(model: RAR) -> None:
    with pytest.raises(ValueError, match=r"'w4a4'.*w8a8"):
        quantize(model, "w4a4")
    for baseline in ("paper", "rtn", "smoothquant"):
        with pytest.raises(ValueError, match=rf"'{baseline}'.*simulate"):
            quantize(model, baseline)


def test_recipes_have_names_in_either_case() -> None:
    assert named_recipe("W6A6") is RECIPES["w6a6"]
    assert named_recipe(MIXED) is MIXED


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight_bits": bits(6, head=4)}, r"weight_bits\['head'\] is 4; supported are 6 and 8"),
        ({"act_bits": bits(6, qkv=16)}, r"act_bits\['qkv'\] is 16"),
        ({"weight_bits": {"qkv": 8}}, "must name exactly the roles"),
        ({"act_bits": bits(8, mlp=8)}, "mlp"),
        ({"sink_bits": 7}, "sink_bits is 7"),
        ({"scaled_roles": ("qkv", "proj")}, r"'proj'.*cannot be folded"),
    ],
)
def test_recipes_that_integers_cannot_hold_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=rf"'mine'.*{words}"):
        Recipe("mine", **change)


def test_quantized_model_is_not_quantized_again(quantized: dict[str, RAR], calibration: CalibrationSet) -> None:
    with pytest.raises(ValueError, match=r"already quantized.*w8a8"):
        quantize(quantized["w8a8"], "w6a6", calibration)
