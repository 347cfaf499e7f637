"""The stress variant: the same function, much harder channels."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from ptq4arvg.models.bundled import load_bundled
from ptq4arvg.models.rar import RAR, RARConfig
from ptq4arvg.models.stress import _fold, channel_std, stress
from ptq4arvg.nn import Linear, Norm
from ptq4arvg.protocol import FoldPair
from tests.tiny import randomize


def random_model(seed: int, **sizes: int) -> RAR:
    """Every parameter random, modulations included: AdaLN that starts at zero would hide a wrong fold."""
    base = {"dim": 32, "depth": 2, "heads": 2, "mlp_dim": 48, "codebook": 24, "classes": 5, "grid": 3}
    rows = (sizes.get("grid", 3)) ** 2 + 2
    config = RARConfig(**(base | sizes), pos_rows=rows, time_rows=rows, guidance=2.0)
    model = RAR(config)
    randomize(model, seed)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=["random", "wide", "bundled"])
def model(request: pytest.FixtureRequest) -> RAR:
    if request.param == "bundled":
        return load_bundled()
    return random_model(0) if request.param == "random" else random_model(1, dim=96, heads=3, depth=3)


def inputs(model: RAR, count: int) -> tuple[Tensor, Tensor]:
    """Tokens and classes, the unconditional class among them."""
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(model.config.codebook, (count, model.config.tokens), generator=generator)
    return tokens, torch.arange(count) % (model.config.classes + 1)


def norm_outputs(model: RAR, tokens: Tensor, classes: Tensor) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(pair.norm).register_forward_hook(
            lambda module, args, output, path=pair.norm: seen.__setitem__(path, output[:, 2:].flatten(0, 1).double())
        )
        for pair in model.fold_pairs()
    ]
    model(tokens, classes)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_logits_are_the_same(model: RAR, seed: int) -> None:
    tokens, classes = inputs(model, 16)
    stressed = stress(model, seed)
    assert (stressed(tokens, classes) - model(tokens, classes)).abs().max() < 1e-4


def test_it_stays_a_plain_model_and_leaves_the_original_alone(model: RAR) -> None:
    before = copy.deepcopy(model.state_dict())
    stressed = stress(model, 0)
    assert type(stressed) is RAR
    assert stressed.config == model.config
    assert {k: v.shape for k, v in stressed.state_dict().items()} == {k: v.shape for k, v in before.items()}
    assert all(module.scale_offset == 1.0 for module in stressed.modules() if isinstance(module, Norm))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_channels_get_the_gains_and_offsets_of_the_definition(model: RAR) -> None:
    """Undoing x' = G ⊙ (x + o) by regression of x' on x: the slope is lognormal(1.5), the intercept ±4 deviations."""
    tokens, classes = inputs(model, 32)
    plain, stressed = norm_outputs(model, tokens, classes), norm_outputs(stress(model, 0), tokens, classes)
    yardstick = channel_std(model)
    logs = []
    for path, x in plain.items():
        y = stressed[path]
        centred = x - x.mean(0)
        gain = (centred * (y - y.mean(0))).sum(0) / centred.square().sum(0)
        offset = (y / gain - x).mean(0)
        torch.testing.assert_close(offset.abs(), 4 * yardstick[path], rtol=1e-3, atol=1e-4)
        assert 0.2 < float((offset > 0).double().mean()) < 0.8
        logs.append(gain.log())
    logs = torch.cat(logs)
    assert abs(float(logs.std()) - 1.5) < 0.2
    assert abs(float(logs.mean())) < 0.3


def test_the_ranges_of_channels_spread_as_intended(model: RAR) -> None:
    """One scale for all channels becomes a bad idea: the widest channel exceeds the median one many times over."""
    tokens, classes = inputs(model, 16)
    for path, x in norm_outputs(stress(model, 0), tokens, classes).items():
        span = x.abs().amax(0)
        assert span.max() / span.median() > 6, path


def test_seeds_decide() -> None:
    model = random_model(2)
    first, again, other = stress(model, 5).state_dict(), stress(model, 5).state_dict(), stress(model, 6).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_without_gains_and_offsets_nothing_changes() -> None:
    model = random_model(2)
    unchanged = stress(model, 0, sigma=0.0, offset=0.0).state_dict()
    assert all(torch.equal(value, unchanged[key]) for key, value in model.state_dict().items())


def test_a_folded_model_is_refused() -> None:
    model = random_model(2)
    model.blocks[1].norm2.scale_offset = 0.0
    with pytest.raises(ValueError, match=r"blocks\.1\.norm2 has scale_offset 0\.0"):
        stress(model, 0)


class Plain(nn.Module):
    """A norm without modulation before a linear, as in families that condition by tokens only."""

    def __init__(self, kind: str, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = Norm(8, kind)
        self.linear = Linear(8, 4, bias=bias)
        nn.init.normal_(self.norm.weight, 1.0, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


PAIR = FoldPair("norm", None, ("linear",), "fc1")
GAIN, OFFSET = torch.linspace(0.1, 9, 8, dtype=torch.float64), torch.linspace(-3, 3, 8, dtype=torch.float64)


@torch.no_grad()
def test_a_norm_without_modulation_takes_gain_and_offset_itself() -> None:
    model, x = Plain("layer"), torch.randn(5, 8)
    expected, normed = model(x), model.norm(x)
    _fold(model, PAIR, GAIN, OFFSET)
    torch.testing.assert_close(model.norm(x).double(), GAIN * (normed + OFFSET), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "message"), [(Plain("rms"), "neither a bias nor"), (Plain("layer", bias=False), "linear has no bias")]
)
@torch.no_grad()
def test_a_pair_without_room_for_offsets_is_refused(model: Plain, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _fold(model, PAIR, GAIN, OFFSET)
