"""Decoding through prepared blocks: the numbers of the general path bit for bit, and nothing wrong passes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import ptq4arvg_kernels as kernels
from ptq4arvg.blocks import prepare
from ptq4arvg.decode import CHUNK_ROWS, can_decode
from ptq4arvg.models import rar
from ptq4arvg.models.rar import PREFIX, RAR
from ptq4arvg.pipeline import quantize
from ptq4arvg.recipes import RECIPES
from ptq4arvg_kernels.backends.cpu import native
from ptq4arvg_kernels.registry import Backend, register_backend, unregister_backend
from tests.tiny import tiny_calibration, tiny_rar

pytestmark = pytest.mark.skipif(native.WHY_NOT is not None, reason=str(native.WHY_NOT))

# Widths that no kernel is made for; repeated classes, all classes, more rows than one tile of a kernel holds.
SIZES = {"dim": 40, "mlp_dim": 52, "codebook": 19}
CLASSES = {"one": [2], "three": [0, 4, 1], "same": [3, 3, 3], "repeated": [4, 1, 4, 1, 0], "many": [*range(5)] * 8}


@pytest.fixture(scope="module", params=list(RECIPES))
def model(request: pytest.FixtureRequest) -> RAR:
    return quantized(request.param)


@pytest.fixture
def damaged() -> RAR:
    """A model of its own, to be broken."""
    return quantized("w6a6")


def quantized(recipe: str) -> RAR:
    original = tiny_rar(3, **SIZES)
    return quantize(original, recipe, tiny_calibration(original, 6), samples=8)


def both_branches(model: RAR, classes: list[int]) -> Tensor:
    labels = torch.tensor(classes)
    return torch.cat([labels, torch.full_like(labels, model.config.none_class)])


def some_tokens(model: RAR, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(model.config.codebook, (batch, model.config.tokens), generator=generator)


class General:
    """The path that serves every backend: one step over a window, with caches of its own."""

    def __init__(self, model: RAR, classes: list[int]) -> None:
        self.model, self.both = model, both_branches(model, classes)
        self.tokens = some_tokens(model, len(classes))
        self.caches = model.new_caches(len(self.both))

    def logits(self, start: int, length: int = 1) -> Tensor:
        known = self.tokens[:, : start + length - PREFIX].repeat(2, 1)
        return self.model.step(self.both, known, self.model.window(start, length), self.caches)[:, -1]


class Decoded(General):
    """The same through a decoder."""

    def __init__(self, model: RAR, classes: list[int]) -> None:
        super().__init__(model, classes)
        decoder = model._decoder(self.both, self.caches)
        assert decoder is not None
        self.decoder = decoder
        super().logits(0, PREFIX)

    def logits(self, start: int, length: int = 1) -> Tensor:
        self.model._embed_token(self.decoder.x, self.tokens[:, start - PREFIX], start)
        return self.decoder.step(start)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("classes", CLASSES.values(), ids=CLASSES)
def test_every_step_has_the_logits_of_the_general_path(model: RAR, classes: list[int]) -> None:
    general, decoded = General(model, classes), Decoded(model, classes)
    general.logits(0, PREFIX)
    for position in range(PREFIX, model.sequence_length):
        assert torch.equal(decoded.logits(position), general.logits(position))
    for ours, theirs in zip(decoded.caches, general.caches, strict=True):
        assert torch.equal(ours.k, theirs.k)
        assert torch.equal(ours.v, theirs.v)


def test_positions_are_taken_in_any_order(model: RAR) -> None:
    """Chunks of modulation are shorter than a sequence here; going back computes the earlier one again."""
    classes = CLASSES["many"]
    assert CHUNK_ROWS // (len(set(classes)) + 1) < model.sequence_length - PREFIX
    general, decoded = General(model, classes), Decoded(model, classes)
    general.logits(0, PREFIX)
    for position in (2, 3, 16, 4, 5, 16, 2):
        assert torch.equal(decoded.logits(position), general.logits(position))


@pytest.mark.parametrize("classes", CLASSES.values(), ids=CLASSES)
def test_images_are_the_same_with_and_without_a_decoder(
    model: RAR, classes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = torch.tensor(classes)
    tokens = model.generate(labels, 5)
    assert torch.equal(model.generate(labels, 5), tokens)
    assert not torch.equal(model.generate(labels, 6), tokens)
    assert torch.equal(model.generate(labels, 5, cached=False), tokens)
    monkeypatch.setattr(rar, "can_decode", lambda blocks, head: False)
    assert torch.equal(model.generate(labels, 5), tokens)


def test_images_are_decoded_at_all(model: RAR, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bool] = []
    make = model._decoder
    monkeypatch.setattr(model, "_decoder", lambda *given: made.append(True) or make(*given))
    monkeypatch.setattr(rar.RAR, "step", counted(rar.RAR.step, made))
    model.generate(torch.arange(2))
    assert len(made) == 2  # the decoder, and the first step, which has two positions


def counted(function: Callable[..., Tensor], calls: list[bool]) -> Callable[..., Tensor]:
    def call(*given: object) -> Tensor:
        calls.append(True)
        return function(*given)

    return call


@pytest.mark.parametrize("position", [-1, 17, 1000])
def test_positions_outside_the_sequence_are_refused(model: RAR, position: int) -> None:
    assert model.sequence_length == 17
    decoded = Decoded(model, [0, 1])
    with pytest.raises(ValueError, match=f"position {position} is outside the sequence of 17 positions"):
        decoded.decoder.step(position)
    general = General(model, [0, 1])
    general.logits(0, PREFIX)
    assert torch.equal(decoded.logits(2), general.logits(2))  # it goes on


# --- what is damaged is said, not drawn -------------------------------------------------------------------------------


def break_token_embeddings(model: RAR) -> None:
    model.embeddings.weight[: model.config.codebook] = math.nan


def break_condition(model: RAR) -> None:
    model.timesteps_embeddings[0, 9] = math.inf


def break_place(model: RAR) -> None:
    model.pos_embed[0, 9, 3] = math.nan


def break_norm(model: RAR) -> None:
    """Scale of the modulated norm: what it feeds turns into NaN, not the residual stream that it reads."""
    model.blocks[1].norm2.weight[3] = math.nan


@pytest.mark.parametrize("damage", [break_token_embeddings, break_condition, break_place, break_norm])
def test_damaged_weights_give_no_image(damaged: RAR, damage: Callable[[RAR], None]) -> None:
    damaged.generate(torch.arange(2))
    damage(damaged)
    with pytest.raises(ValueError, match=r"(?i)nan"):
        damaged.generate(torch.arange(2))


@pytest.mark.parametrize("damage", [break_token_embeddings, break_condition, break_place, break_norm])
def test_a_step_names_its_position(damaged: RAR, damage: Callable[[RAR], None]) -> None:
    decoded = Decoded(damaged, [0, 1])
    damage(damaged)
    with pytest.raises(ValueError, match=r"position \d+: .*NaN or infinity"):
        all(decoded.logits(position).isfinite().all() for position in range(PREFIX, damaged.sequence_length))


# --- who serves it ----------------------------------------------------------------------------------------------------


def prepared(model: RAR) -> bool:
    return can_decode(list(model.blocks), model.fused_head)  # type: ignore[arg-type]


def test_a_requested_backend_is_the_one_that_decodes(model: RAR) -> None:
    tokens = model.generate(torch.arange(3))
    assert prepared(model)
    with kernels.use_backend("cpu", strict=True):
        assert prepared(model)
        assert torch.equal(model.generate(torch.arange(3)), tokens)
    with kernels.use_backend("reference", strict=True):
        assert not prepared(model)
        assert model._decoder(both_branches(model, [0]), model.new_caches(2)) is None
        reference = model.generate(torch.arange(3))
        assert torch.equal(model.generate(torch.arange(3), cached=False), reference)
    assert int(reference.min()) >= 0
    assert int(reference.max()) < model.config.codebook


def test_a_backend_that_declines_is_an_error_only_under_strict(model: RAR) -> None:
    labels = torch.arange(3)
    tokens = model.generate(labels)
    register_backend(Backend("nothing", {}), priority=-1)
    try:
        with kernels.use_backend("nothing", strict=True):
            assert not prepared(model)
            with pytest.raises(kernels.BackendError, match="'nothing' declines"):
                model.generate(labels)
        with kernels.use_backend("nothing"):
            assert torch.equal(model.generate(labels), tokens)
    finally:
        unregister_backend("nothing")
    assert torch.equal(model.generate(labels), tokens)


def test_floating_point_and_half_precision_are_not_decoded(damaged: RAR) -> None:
    assert not prepared(tiny_rar())
    assert prepared(damaged)
    assert not prepared(damaged.half())


def test_a_copy_decodes_once_it_is_prepared(model: RAR) -> None:
    tokens = model.generate(torch.arange(3))
    other = copy.deepcopy(model)
    assert not prepared(other)
    assert torch.equal(other.generate(torch.arange(3)), tokens)
    assert prepare(other)
    assert prepared(other)
    assert torch.equal(other.generate(torch.arange(3)), tokens)
    assert prepared(model)


@pytest.mark.parametrize("name", ["norm1", "norm2", "q_norm", "k_norm"])
def test_an_operand_replaced_after_preparing_is_used(damaged: RAR, name: str) -> None:
    tokens = damaged.generate(torch.arange(5), 1)
    norm = getattr(damaged.blocks[0], name)
    norm.bias = torch.nn.Parameter(norm.bias + 3.0, requires_grad=False)  # type: ignore[operator]
    assert not prepared(damaged)
    changed = damaged.generate(torch.arange(5), 1)
    assert not torch.equal(changed, tokens)
    assert prepare(damaged)
    assert torch.equal(damaged.generate(torch.arange(5), 1), changed)
