"""RAR against its published state dicts, its published numbers, and a second computation from the description."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import chisquare
from torch import Tensor, nn

from ptq4arvg.errors import CheckpointError
from ptq4arvg.models.families import build
from ptq4arvg.models.rar import CONFIGS, PREFIX, RAR, RARConfig
from ptq4arvg.nn import Window
from tests.tiny import tiny_inputs, tiny_rar

MANIFESTS = Path(__file__).parents[1] / "data" / "manifests"
# Guidance weights at steps 0, 64, 128, 192 and 255 of the published schedules, to three decimals.
SCHEDULE_STEPS = (0, 64, 128, 192, 255)
SCHEDULES = {
    "rar_b": (1, 1.018, 1.803, 7.404, 15.996),
    "rar_l": (1, 1.035, 2.090, 7.957, 15.497),
    "rar_xl": (1, 1.225, 2.640, 5.285, 6.900),
    "rar_xxl": (1, 1.602, 3.793, 6.628, 8.000),
}
TEMPERATURES = {"rar_b": 1.0, "rar_l": 1.02, "rar_xl": 1.02, "rar_xxl": 1.02}
# Parameters in millions, as published (method.md §2.1).
PARAMETERS = {"rar_b": 260.9, "rar_l": 461.7, "rar_xl": 955.4, "rar_xxl": 1498.5}


# --- the model once more: plain tensor operations in float64 on a dict of tensors, no torch.nn ------------------------


def ref_layer_norm(x: Tensor, weight: Tensor | float = 1.0, bias: Tensor | float = 0.0) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias


def ref_linear(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return torch.einsum("...k,nk->...n", x, w[f"{name}.weight"]) + w[f"{name}.bias"]


def ref_silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def ref_gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def ref_logits(
    w: dict[str, Tensor], config: RARConfig, tokens: list[int], label: int, order: list[int] | None = None
) -> Tensor:
    """Logits ``[min(n + 1, grid²), codebook]`` of one sequence of n tokens, in float64."""
    total = config.grid * config.grid
    order = list(range(total)) if order is None else order
    fed = tokens[: total - 1]
    embedding = w["embeddings.weight"]
    rows = [w["cls_token"][0, 0] + w["pos_embed"][0, 0]]
    class_row = embedding[config.codebook + 1 + label] + w["pos_embed"][0, 1]
    rows.append(class_row + w["target_aware_pos_embed"][0, 2 + order[0]])
    for slot, token in enumerate(fed):
        row = embedding[token] + w["pos_embed"][0, 2 + order[slot]]
        rows.append(row + w["target_aware_pos_embed"][0, 2 + order[slot + 1]])
    x = torch.stack(rows)
    length, width = x.shape
    heads, head_dim = config.heads, config.dim // config.heads
    condition = ref_silu(embedding[config.codebook + 1 + label] + w["timesteps_embeddings"][0, :length])
    for i in range(config.depth):
        modulation = ref_linear(condition, w, f"blocks.{i}.adaLN_modulation.1")
        shift1, scale1, gate1, shift2, scale2, gate2 = (modulation[:, j * width : (j + 1) * width] for j in range(6))
        y = ref_layer_norm(x, w[f"blocks.{i}.norm1.weight"], w[f"blocks.{i}.norm1.bias"]) * (1 + scale1) + shift1
        qkv = ref_linear(y, w, f"blocks.{i}.attn.qkv")
        mixed = torch.zeros(length, width, dtype=x.dtype)
        for head in range(heads):
            at = [slice(part * width + head * head_dim, part * width + (head + 1) * head_dim) for part in range(3)]
            q, k = (
                ref_layer_norm(qkv[:, at[j]], w[f"blocks.{i}.attn.{n}.weight"], w[f"blocks.{i}.attn.{n}.bias"])
                for j, n in enumerate(("q_norm", "k_norm"))
            )
            v = qkv[:, at[2]]
            for row in range(length):
                scores = (k[: row + 1] @ q[row]) / math.sqrt(head_dim)
                weights = torch.exp(scores - scores.max())
                mixed[row, head * head_dim : (head + 1) * head_dim] = (weights / weights.sum()) @ v[: row + 1]
        x = x + gate1 * ref_linear(mixed, w, f"blocks.{i}.attn.proj")
        y = ref_layer_norm(x, w[f"blocks.{i}.norm2.weight"], w[f"blocks.{i}.norm2.bias"]) * (1 + scale2) + shift2
        x = x + gate2 * ref_linear(ref_gelu(ref_linear(y, w, f"blocks.{i}.mlp.fc1")), w, f"blocks.{i}.mlp.fc2")
    modulation = ref_linear(condition, w, "adaln_before_head.adaLN_modulation.1")
    y = ref_layer_norm(x) * (1 + modulation[:, :width]) + modulation[:, width:]
    return ref_linear(y, w, "lm_head")[1:]


def float64_state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.double() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("seed", [0, 1])
def test_forward_is_the_described_computation(seed: int) -> None:
    model = tiny_rar(seed)
    tokens, classes = tiny_inputs(model, 6, seed)
    logits = model(tokens, classes)
    w = float64_state(model)
    for row in range(6):
        expected = ref_logits(w, model.config, tokens[row].tolist(), int(classes[row]))
        assert logits[row].shape == expected.shape == (model.config.tokens, model.config.codebook)
        torch.testing.assert_close(logits[row].double(), expected, rtol=1e-5, atol=1e-5)


def test_forward_in_another_order_is_the_described_computation() -> None:
    model = tiny_rar(2)
    tokens, classes = tiny_inputs(model, 3, 2)
    orders = torch.rand(3, model.config.tokens, generator=torch.Generator().manual_seed(2)).argsort(1)
    logits = model(tokens, classes, orders)
    w = float64_state(model)
    for row in range(3):
        expected = ref_logits(w, model.config, tokens[row].tolist(), int(classes[row]), orders[row].tolist())
        torch.testing.assert_close(logits[row].double(), expected, rtol=1e-5, atol=1e-5)
    assert (logits - model(tokens, classes)).abs().max() > 0.1


def test_forward_of_a_prefix_is_the_prefix_of_the_forward() -> None:
    model = tiny_rar(3)
    tokens, classes = tiny_inputs(model, 2)
    full = model(tokens, classes)
    for n in (0, 1, 7, model.config.tokens - 1):
        logits = model(tokens[:, :n], classes)
        assert logits.shape[1] == n + 1
        torch.testing.assert_close(logits, full[:, : n + 1], rtol=0, atol=1e-5)


# --- published state dicts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_state_dict_is_the_published_one(name: str) -> None:
    with torch.device("meta"):
        model = RAR.from_config(name)
    state = {key: (tuple(value.shape), str(value.dtype)) for key, value in model.state_dict().items()}
    manifest = json.loads((MANIFESTS / f"{name}.json").read_text())
    assert state == {key: (tuple(shape), f"torch.{dtype}") for key, (shape, dtype) in manifest.items()}
    assert sum(value.numel() for value in model.state_dict().values()) / 1e6 == pytest.approx(PARAMETERS[name], abs=0.1)


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> RAR:
    """A model whose config is registered as ``tiny``, so that files of its state dict count as published."""
    model = tiny_rar(4, temperature=0.9)
    monkeypatch.setitem(CONFIGS, "tiny", model.config)
    return model


def as_bin(state: dict[str, Tensor], path: Path) -> Path:
    path = path.with_suffix(".bin")
    torch.save(state, path)
    return path


def as_safetensors(state: dict[str, Tensor], path: Path) -> Path:
    path = path.with_suffix(".safetensors")
    save_file(state, path)
    return path


WRITERS = pytest.mark.parametrize("write", [as_bin, as_safetensors])
Writer = Callable[[dict[str, Tensor], Path], Path]


@WRITERS
def test_published_file_loads_unmodified(published: RAR, write: Writer, tmp_path: Path) -> None:
    path = write(published.state_dict(), tmp_path / "rar")
    model = RAR.from_published("tiny", path)
    assert not model.training
    assert model.config == published.config
    tokens, classes = tiny_inputs(published, 3)
    assert torch.equal(model(tokens, classes), published(tokens, classes))


def test_half_precision_file_is_computed_in_float32(published: RAR, tmp_path: Path) -> None:
    path = as_safetensors({key: value.half() for key, value in published.state_dict().items()}, tmp_path / "rar")
    model = RAR.from_published("tiny", path)
    for key, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, published.state_dict()[key].half().float())


@WRITERS
def test_file_with_other_keys_or_shapes_is_refused_by_name(published: RAR, write: Writer, tmp_path: Path) -> None:
    state = dict(published.state_dict())
    state["blocks.7.stray"] = torch.zeros(3)
    del state["blocks.1.attn.proj.bias"]
    state["lm_head.weight"] = torch.zeros(17, 32)
    path = write(state, tmp_path / "rar")
    with pytest.raises(CheckpointError) as caught:
        RAR.from_published("tiny", path)
    message = str(caught.value)
    for part in (str(path), "blocks.7.stray", "blocks.1.attn.proj.bias", "lm_head.weight", "[17, 32]", "[16, 32]"):
        assert part in message


@WRITERS
@pytest.mark.parametrize("fraction", [0.001, 0.3, 0.98])
def test_truncated_file_is_refused(published: RAR, write: Writer, fraction: float, tmp_path: Path) -> None:
    path = write(published.state_dict(), tmp_path / "rar")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])
    with pytest.raises(CheckpointError, match=path.name):
        RAR.from_published("tiny", path)


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n" + bytes(100), b"hello, this is not a checkpoint", b""])
def test_foreign_file_is_refused(published: RAR, suffix: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"rar{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=path.name):
        RAR.from_published("tiny", path)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('code ran')",)


def test_file_with_code_is_refused_without_running_it(published: RAR, tmp_path: Path) -> None:
    path = tmp_path / "rar.bin"
    torch.save({**published.state_dict(), "bomb": Bomb()}, path)
    with pytest.raises(CheckpointError, match="code"):
        RAR.from_published("tiny", path)


def test_unknown_config_is_named() -> None:
    with pytest.raises(ValueError, match=r"rar_huge.*rar_b"):
        RAR.from_config("rar_huge")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads": 3}, r"32.*3"),
        ({"depth": 0}, r"depth.*0"),
        ({"grid": 5, "pos_rows": 18}, r"5×5.*27.*18"),
        ({"grid": 4, "time_rows": 17}, r"18.*17"),
    ],
)
def test_impossible_sizes_are_named(change: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RARConfig(**{"dim": 32, "depth": 1, "heads": 2, "mlp_dim": 48, "grid": 4, **change})


def test_family_is_built_from_its_own_description() -> None:
    model = tiny_rar(0, power=2.0)
    other = build(model.family, json.loads(json.dumps(model.config_dict())))
    assert other.config == model.config
    with pytest.raises(ValueError, match="imagegpt"):
        build("imagegpt", model.config_dict())
    with pytest.raises(ValueError, match="widths"):
        build("rar", {**model.config_dict(), "widths": 3})


# --- conditions, embeddings, positions --------------------------------------------------------------------------------


def test_class_ids_follow_codes_and_mask() -> None:
    config = CONFIGS["rar_b"]
    with torch.device("meta"):
        model = RAR(RARConfig(16, 1, 1, 16))
    assert model.embeddings.num_embeddings == 2026
    assert (config.codebook, config.classes, config.none_class) == (1024, 1000, 1000)
    assert model._class_ids(torch.tensor([0, 999])).tolist() == [1025, 2024]
    # "No class" is the last row of the table.
    assert int(model._class_ids(torch.tensor(config.none_class))) == model.embeddings.num_embeddings - 1


def test_only_the_row_of_the_class_conditions_a_sequence() -> None:
    model = tiny_rar(5)
    tokens, _ = tiny_inputs(model, 1)
    rows = model.config.codebook + 1 + model.config.classes + 1
    for label in range(model.config.classes + 1):
        before = model(tokens, torch.tensor([label]))
        for row in range(model.config.codebook, rows):
            saved = model.embeddings.weight[row].clone()
            model.embeddings.weight[row] += 1.0
            changed = not torch.equal(model(tokens, torch.tensor([label])), before)
            model.embeddings.weight[row] = saved
            assert changed == (row == model.config.codebook + 1 + label)


def test_first_logits_do_not_depend_on_image_tokens() -> None:
    model = tiny_rar(6)
    tokens, classes = tiny_inputs(model, 4)
    other = (tokens + 1) % model.config.codebook
    torch.testing.assert_close(model(tokens, classes)[:, 0], model(other, classes)[:, 0], rtol=0, atol=0)
    assert not torch.allclose(model(tokens, classes)[:, 1], model(other, classes)[:, 1])


def test_logits_depend_on_earlier_tokens_only() -> None:
    model = tiny_rar(6)
    tokens, classes = tiny_inputs(model, 2)
    before = model(tokens, classes)
    for i in range(model.config.tokens - 1):
        changed = tokens.clone()
        changed[:, i] = (changed[:, i] + 1) % model.config.codebook
        after = model(changed, classes)
        # Logits row j is of token j and has read the tokens before j.
        assert torch.equal(after[:, : i + 1], before[:, : i + 1])
        assert bool(((after - before)[:, i + 1 :].abs().amax(-1) > 0).all())


def test_target_aware_embedding_is_that_of_the_next_token() -> None:
    model = tiny_rar(7)
    tokens, classes = tiny_inputs(model, 2)
    positions = torch.arange(model.sequence_length)
    inputs = model.embed(classes, tokens[:, :-1], positions)
    before = model(tokens, classes)
    for i in range(model.config.tokens):
        saved = model.target_aware_pos_embed[0, PREFIX + i].clone()
        model.target_aware_pos_embed[0, PREFIX + i] += 1.0
        moved = (model.embed(classes, tokens[:, :-1], positions) - inputs).abs().amax(-1)
        after = model(tokens, classes)
        model.target_aware_pos_embed[0, PREFIX + i] = saved
        # Slot 1 + i predicts image token i, which is row i of the logits.
        assert moved[0].nonzero().flatten().tolist() == [1 + i]
        assert torch.equal(after[:, :i], before[:, :i])
        assert bool(((after - before)[:, i:].abs().amax(-1) > 0).all())


def test_first_rows_of_the_target_aware_table_are_unused() -> None:
    model = tiny_rar(7)
    tokens, classes = tiny_inputs(model, 2)
    before = model(tokens, classes)
    model.target_aware_pos_embed[0, :PREFIX] += 1.0
    assert torch.equal(model(tokens, classes), before)


def test_identity_order_is_raster_order() -> None:
    model = tiny_rar(8)
    tokens, classes = tiny_inputs(model, 3)
    identity = torch.arange(model.config.tokens).expand(3, -1)
    assert torch.equal(model(tokens, classes, identity), model(tokens, classes))


def test_conditions_without_repetition_equal_conditions_per_row() -> None:
    model = tiny_rar(9)
    classes = torch.tensor([3, 5, 3, 0, 5, 5])
    positions = torch.tensor([0, 1, 4])
    condition = model.condition(classes, positions)
    assert condition.rows.dtype == torch.int32
    assert len(condition.values) == 3 * 3
    spread = condition.values[condition.rows.long()].view(6, 3, -1)
    table = model.embeddings.weight[model.config.codebook + 1 :]
    assert torch.equal(spread, table[classes][:, None] + model.timesteps_embeddings[0, positions])
    assert torch.equal(condition.positions[condition.rows.long()].view(6, 3), positions.expand(6, 3))
    # A batch with repeated classes is the rows on their own.
    tokens, _ = tiny_inputs(model, 6)
    together = model(tokens, classes)
    for row in range(6):
        alone = model(tokens[row : row + 1], classes[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-5)


# --- guidance and sampling --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_guidance_schedule_is_the_published_one(name: str) -> None:
    with torch.device("meta"):
        model = RAR(RARConfig(16, 1, 1, 16, **_sampling(CONFIGS[name])))
    weights = [model.guidance_weight(step) for step in SCHEDULE_STEPS]
    assert weights == pytest.approx(SCHEDULES[name], abs=5.1e-4)
    assert CONFIGS[name].temperature == TEMPERATURES[name]


def _sampling(config: RARConfig) -> dict[str, float]:
    return {"temperature": config.temperature, "guidance": config.guidance, "power": config.power}


def test_guided_logits_are_extrapolated_then_divided_by_the_temperature() -> None:
    model = tiny_rar(0, temperature=1.25, guidance=3.0, power=2.0)
    cond, uncond = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))
    for step in (0, 5, 15):
        w = 1 + 2.0 * 0.5 * (1 - math.cos(math.pi * (step / 16) ** 2))
        torch.testing.assert_close(model.guided(cond, uncond, step), (uncond + w * (cond - uncond)) / 1.25)


def test_without_guidance_the_conditional_distribution_is_sampled() -> None:
    model = tiny_rar(1, guidance=1.0)
    cond, uncond = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))
    for step in range(model.config.tokens):
        torch.testing.assert_close(model.guided(cond, uncond, step), cond)


def test_cached_decode_is_the_full_forward_at_every_step() -> None:
    model = tiny_rar(10)
    tokens, classes = tiny_inputs(model, 4)
    full = model.step(classes, tokens[:, :-1], model.window(0, model.sequence_length), None)
    caches = model.new_caches(4)
    first = model.step(classes, tokens[:, :0], model.window(0, PREFIX), caches)
    torch.testing.assert_close(first, full[:, :PREFIX], rtol=0, atol=1e-5)
    for step in range(1, model.config.tokens):
        logits = model.step(classes, tokens[:, :step], model.window(step + 1, 1), caches)
        torch.testing.assert_close(logits, full[:, step + 1 : step + 2], rtol=0, atol=1e-5)
    torch.testing.assert_close(model(tokens, classes), full[:, 1:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_cached_sampling_gives_the_tokens_of_uncached_sampling(seed: int) -> None:
    model = tiny_rar(seed)
    classes = torch.tensor([0, 4, 2, 2])
    tokens = model.generate(classes, seed)
    assert tokens.shape == (4, model.config.tokens)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, model.generate(classes, seed, cached=False))


def test_cached_sampling_computes_every_position_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_rar(0)
    computed: list[list[int]] = []
    step = model.step

    def watched(classes: Tensor, tokens: Tensor, window: Window, caches: list[Any] | None) -> Tensor:
        computed.append(window.positions.tolist())
        return step(classes, tokens, window, caches)

    monkeypatch.setattr(model, "step", watched)
    model.generate(torch.tensor([1, 2]))
    assert computed == [[0, 1], *([i] for i in range(2, model.sequence_length))]


def test_same_seed_same_tokens() -> None:
    model = tiny_rar(0)
    classes = torch.arange(5)
    tokens = model.generate(classes, 3)
    torch.manual_seed(99)  # the global generator plays no part
    assert torch.equal(tokens, model.generate(classes, 3))
    assert not torch.equal(tokens, model.generate(classes, 4))


def test_progress_counts_the_steps() -> None:
    model = tiny_rar(0)
    seen: list[int] = []
    model.generate(torch.tensor([1]), progress=seen.append)
    assert seen == list(range(model.config.tokens))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_drawn_tokens_follow_the_guided_softmax(guidance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """One picture of 1×1 token, so that all pictures of a class are draws from one known distribution."""
    model = tiny_rar(11, grid=1, codebook=7, guidance=guidance, temperature=1.3, power=0.5)
    # The only step is the first, whose weight is 1 by the schedule.
    monkeypatch.setattr(model, "guidance_weight", lambda step: guidance)
    draws = 4000
    counts = torch.bincount(model.generate(torch.full((draws,), 2), seed=5).flatten(), minlength=7)
    w, config = float64_state(model), model.config
    cond, uncond = (ref_logits(w, config, [], label)[0] for label in (2, config.none_class))
    expected = ((uncond + guidance * (cond - uncond)) / 1.3).softmax(-1)
    assert expected.min() > 1e-3
    assert chisquare(counts.numpy(), (expected * draws).numpy()).pvalue > 1e-3
    # The test has teeth: it tells these probabilities from those without temperature.
    wrong = (uncond + guidance * (cond - uncond)).softmax(-1)
    assert chisquare(counts.numpy(), (wrong * draws).numpy()).pvalue < 1e-3


def test_every_step_draws_from_the_logits_of_its_prefix() -> None:
    """At a temperature near 0 each token is the best one of the guided logits after the tokens before it."""
    model = tiny_rar(12, temperature=1e-4, guidance=3.0, power=1.0)
    classes = torch.tensor([0, 3, 1])
    tokens = model.generate(classes)
    cond = model(tokens, classes)
    uncond = model(tokens, torch.full_like(classes, model.config.none_class))
    for step in range(model.config.tokens):
        guided = uncond[:, step] + model.guidance_weight(step) * (cond - uncond)[:, step]
        assert torch.equal(tokens[:, step], guided.argmax(-1))


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [-1, 6, 1000])
def test_class_out_of_range_is_named(label: int) -> None:
    model = tiny_rar(0)
    classes = torch.tensor([0, label])
    with pytest.raises(ValueError, match=rf"class {label} .*0 … 4"):
        model.generate(classes)
    with pytest.raises(ValueError, match=rf"class {label} .*0 … 4"):
        model(torch.zeros(2, 3, dtype=torch.int64), classes)


def test_unconditional_class_cannot_be_asked_for() -> None:
    with pytest.raises(ValueError, match=r"class 5 means unconditional.*0 … 4"):
        tiny_rar(0).generate(torch.tensor([1, 5]))


def test_too_many_tokens_are_counted() -> None:
    with pytest.raises(ValueError, match=r"17 tokens.*16"):
        tiny_rar(0)(torch.zeros(1, 17, dtype=torch.int64), torch.tensor([0]))


@pytest.mark.parametrize("token", [-1, 16])
def test_token_out_of_range_is_named(token: int) -> None:
    with pytest.raises(ValueError, match=rf"token {token} .*0 … 15"):
        tiny_rar(0)(torch.tensor([[3, token]]), torch.tensor([0]))


@pytest.mark.parametrize("classes", [torch.zeros(0, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64)])
def test_classes_must_be_a_list(classes: Tensor) -> None:
    with pytest.raises(ValueError, match="non-empty 1-D"):
        tiny_rar(0).generate(classes)


# --- protocol ---------------------------------------------------------------------------------------------------------


def test_description_names_every_linear_and_the_published_groups() -> None:
    model = tiny_rar(0)
    specs = model.linear_specs()
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(specs) == linears
    length = model.sequence_length
    assert length == model.config.tokens + 1
    assert model.sinks == (0, 1)
    for path, spec in specs.items():
        if "adaLN" in path:
            assert (spec.role, spec.activation, spec.group_of_position) == ("adaln", "silu", tuple(range(length)))
        elif path == "lm_head":
            assert (spec.role, spec.groups) == ("head", 1)
        else:
            assert spec.group_of_position == (0, 1) + (2,) * (length - 2)
            assert path.endswith(spec.role)


def test_fold_pairs_name_each_norm_and_its_only_readers() -> None:
    model = tiny_rar(0)
    pairs = {pair.norm: (pair.linears, pair.role) for pair in model.fold_pairs()}
    assert pairs == {
        "blocks.0.norm1": (("blocks.0.attn.qkv",), "qkv"),
        "blocks.0.norm2": (("blocks.0.mlp.fc1",), "fc1"),
        "blocks.1.norm1": (("blocks.1.attn.qkv",), "qkv"),
        "blocks.1.norm2": (("blocks.1.mlp.fc1",), "fc1"),
        "adaln_before_head.norm": (("lm_head",), "head"),
    }


def test_calibration_records_both_branches_of_guided_samples() -> None:
    model = tiny_rar(0)
    classes = torch.tensor([4, 1, 1])
    recorded = model.sample_calibration(classes, seed=7)
    assert torch.equal(recorded.inputs["tokens"], model.generate(classes, 7).repeat(2, 1))
    assert recorded.inputs["classes"].tolist() == [4, 1, 1, 5, 5, 5]
    assert recorded.conditional.tolist() == [True] * 3 + [False] * 3
    logits = model.calibration_forward(recorded.inputs)
    assert torch.equal(logits, model(recorded.inputs["tokens"], recorded.inputs["classes"]))
