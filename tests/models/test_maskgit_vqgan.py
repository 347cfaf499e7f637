"""MaskGIT-VQGAN against its published state dict and against a second computation written from the formulas alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ptq4arvg.errors import CheckpointError
from ptq4arvg.models.tokenizers import MaskGitVQGAN, MaskGitVQGANConfig, to_uint8

MANIFEST = Path(__file__).parents[1] / "data" / "manifests" / "tok_maskgit_vqgan_imagenet_f16_256.json"
# Width changes on the way down (32 → 64) and on the way up, two down-samplings.
TINY = MaskGitVQGANConfig(channels=32, multipliers=(1, 2, 2), res_blocks=2, codebook_size=24, code_dim=8)


@pytest.fixture
def tiny() -> MaskGitVQGAN:
    torch.manual_seed(0)
    model = MaskGitVQGAN(TINY)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # The initial affine of a GroupNorm is the identity, which would hide a forgotten weight or bias.
            parameter.copy_(
                torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else parameter[0].numel() ** -0.5)
            )
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
        model.quantize.embedding.weight.mul_(8**0.5)
        # Brings most pixels into [0, 1], so that clamping does not hide differences.
        model.decoder.conv_out.weight.mul_(0.5)
        model.decoder.conv_out.bias.fill_(0.5)
    return model


# --- the model once more, in float64 from a dict of tensors, without torch.nn -----------------------------------------


def ref_conv(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    weight = w[f"{name}.weight"]
    edge = weight.shape[-1]
    padded = torch.zeros(*x.shape[:2], x.shape[2] + edge - 1, x.shape[3] + edge - 1, dtype=x.dtype)
    padded[:, :, edge // 2 : edge // 2 + x.shape[2], edge // 2 : edge // 2 + x.shape[3]] = x
    out = torch.zeros(x.shape[0], weight.shape[0], *x.shape[2:], dtype=x.dtype)
    for i in range(edge):
        for j in range(edge):
            window = padded[:, :, i : i + x.shape[2], j : j + x.shape[3]]
            out += torch.einsum("bchw,oc->bohw", window, weight[:, :, i, j])
    bias = w.get(f"{name}.bias")
    return out if bias is None else out + bias[:, None, None]


def ref_norm_silu(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    groups = x.reshape(x.shape[0], 32, -1)
    centred = groups - groups.mean(-1, keepdim=True)
    normed = (centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()).reshape(x.shape)
    y = normed * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]
    return y / (1 + torch.exp(-y))


def ref_block(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    h = ref_conv(ref_norm_silu(x, w, f"{name}.norm1"), w, f"{name}.conv1")
    h = ref_conv(ref_norm_silu(h, w, f"{name}.norm2"), w, f"{name}.conv2")
    if f"{name}.nin_shortcut.weight" in w:
        return h + torch.einsum("bchw,oc->bohw", h, w[f"{name}.nin_shortcut.weight"][:, :, 0, 0])
    return x + h


def ref_decode(tokens: Tensor, w: dict[str, Tensor], levels: int, blocks: int) -> Tensor:
    x = w["quantize.embedding.weight"][tokens].permute(0, 3, 1, 2)
    x = ref_conv(x, w, "decoder.conv_in")
    for i in range(blocks):
        x = ref_block(x, w, f"decoder.mid.{i}")
    for level in range(levels - 1, -1, -1):
        for i in range(blocks):
            x = ref_block(x, w, f"decoder.up.{level}.block.{i}")
        if level > 0:
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            x = ref_conv(x, w, f"decoder.up.{level}.upsample_conv")
    return ref_conv(ref_norm_silu(x, w, "decoder.norm_out"), w, "decoder.conv_out")


def ref_encode(images: Tensor, w: dict[str, Tensor], levels: int, blocks: int) -> Tensor:
    x = ref_conv(images, w, "encoder.conv_in")
    for level in range(levels):
        for i in range(blocks):
            x = ref_block(x, w, f"encoder.down.{level}.block.{i}")
        if level < levels - 1:
            x = (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4
    for i in range(blocks):
        x = ref_block(x, w, f"encoder.mid.{i}")
    return ref_conv(ref_norm_silu(x, w, "encoder.norm_out"), w, "encoder.conv_out")


def double(model: MaskGitVQGAN) -> dict[str, Tensor]:
    return {key: tensor.double() for key, tensor in model.state_dict().items()}


# --- structure --------------------------------------------------------------------------------------------------------


def test_state_dict_equals_the_published_one() -> None:
    published = json.loads(MANIFEST.read_text())
    with torch.device("meta"):
        model = MaskGitVQGAN()
    ours = {key: [list(t.shape), str(t.dtype).removeprefix("torch.")] for key, t in model.state_dict().items()}
    assert ours == published
    assert sum(t.numel() for t in model.state_dict().values()) == 54_515_587


def test_a_256_pixel_image_is_256_tokens() -> None:
    model = MaskGitVQGAN(
        MaskGitVQGANConfig(channels=32, multipliers=(1,) * 5, res_blocks=1, codebook_size=16, code_dim=4)
    )
    tokens = model.encode(torch.rand(1, 3, 256, 256))
    assert tokens.shape == (1, 16, 16)
    assert tokens.dtype == torch.int64
    assert model.decode_tokens(tokens).shape == (1, 3, 256, 256)
    assert MaskGitVQGANConfig().pixels_per_token == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 48}, "multiple of 32"),
        ({"multipliers": (1, 0)}, "multiple of 32"),
        ({"multipliers": ()}, "at least one level"),
        ({"res_blocks": 0}, "res_blocks must be positive, got 0"),
    ],
)
def test_impossible_configurations(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskGitVQGANConfig(**arguments)


# --- computation ------------------------------------------------------------------------------------------------------


def test_width_changing_block_ignores_its_input_residual(tiny: MaskGitVQGAN) -> None:
    block = tiny.encoder.down[1].block[0]
    assert block.nin_shortcut.weight.shape == (64, 64, 1, 1)
    x = torch.randn(2, 32, 5, 7)
    expected = ref_block(x.double(), double(tiny), "encoder.down.1.block.0")
    torch.testing.assert_close(block(x).double(), expected, rtol=1e-4, atol=1e-5)

    # With the last convolution at zero, an input residual is all that could be left.
    with torch.no_grad():
        block.conv2.weight.zero_()
    assert torch.count_nonzero(block(x)) == 0


def test_block_of_constant_width_adds_its_input(tiny: MaskGitVQGAN) -> None:
    block = tiny.decoder.mid[0]
    assert block.nin_shortcut is None
    with torch.no_grad():
        block.conv2.weight.zero_()
    x = torch.randn(2, 64, 5, 7)
    assert torch.equal(block(x), x)


def test_decoder_matches_the_formulas(tiny: MaskGitVQGAN) -> None:
    tokens = torch.randint(TINY.codebook_size, (2, 3, 5))
    raw = ref_decode(tokens, double(tiny), levels=3, blocks=2)
    inside = (raw > 0) & (raw < 1)
    assert 0.5 < inside.double().mean() < 1
    images = tiny.decode_tokens(tokens)
    assert images.dtype == torch.float32
    assert images.shape == (2, 3, 12, 20)
    torch.testing.assert_close(images.double(), raw.clamp(0, 1), rtol=0, atol=2e-5)
    assert images.min() == 0.0
    assert images.max() == 1.0


def test_encoder_matches_the_formulas(tiny: MaskGitVQGAN) -> None:
    images = torch.rand(2, 3, 12, 20)
    w = double(tiny)
    latents = ref_encode(images.double(), w, levels=3, blocks=2)
    torch.testing.assert_close(tiny.encoder(images).double(), latents, rtol=1e-4, atol=1e-4)
    distances = (latents.permute(0, 2, 3, 1)[..., None, :] - w["quantize.embedding.weight"]).square().sum(-1)
    best = distances.topk(2, largest=False)
    assert (best.values[..., 1] - best.values[..., 0]).min() > 1e-3, "a tie would make the comparison meaningless"
    assert torch.equal(tiny.encode(images), best.indices[..., 0])
    assert tiny.encode(images).unique().numel() > 3


def test_every_code_is_its_own_nearest(tiny: MaskGitVQGAN) -> None:
    codes = torch.arange(TINY.codebook_size).view(1, 4, 6)
    latents = tiny.quantize.embedding(codes).movedim(-1, 1)
    assert torch.equal(tiny.quantize.nearest(latents), codes)


def test_decoding_is_deterministic_and_independent_of_the_batch(tiny: MaskGitVQGAN) -> None:
    tokens = torch.randint(TINY.codebook_size, (3, 4, 4))
    images = tiny.decode_tokens(tokens)
    assert torch.equal(images, tiny.decode_tokens(tokens.clone()))
    assert torch.equal(images, tiny.decode_tokens(tokens.view(3, 16)))
    assert torch.equal(images, tiny.decode_tokens(tokens.to(torch.int32)))
    torch.testing.assert_close(tiny.decode_tokens(tokens[1:2]), images[1:2], rtol=0, atol=1e-5)
    assert not images.requires_grad


def test_low_precision_weights_still_give_float32_images(tiny: MaskGitVQGAN) -> None:
    tokens = torch.randint(TINY.codebook_size, (1, 4, 4))
    full = tiny.decode_tokens(tokens)
    low = tiny.to(torch.bfloat16).decode_tokens(tokens)
    assert low.dtype == torch.float32
    assert (low - full).abs().mean() < 0.02
    assert tiny.encode(full).shape == (1, 4, 4)


@pytest.mark.parametrize("value", [-1, 24, 4096])
def test_token_ids_outside_the_codebook_are_named(tiny: MaskGitVQGAN, value: int) -> None:
    tokens = torch.zeros(1, 4, 4, dtype=torch.int64)
    tokens[0, 2, 3] = value
    with pytest.raises(ValueError, match=rf"token id {value} is outside the codebook, whose ids are 0 to 23"):
        tiny.decode_tokens(tokens)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(1, 4, 4), "int64 or int32, got torch.float32"),
        (torch.zeros(1, 15, dtype=torch.int64), "15 tokens form no square"),
        (torch.zeros(16, dtype=torch.int64), r"got \[16\]"),
        (torch.zeros(0, 4, 4, dtype=torch.int64), "not empty"),
    ],
)
def test_malformed_tokens(tiny: MaskGitVQGAN, tokens: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.decode_tokens(tokens)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "floating point in"),
        (torch.zeros(3, 8, 8), r"got \[3, 8, 8\]"),
        (torch.zeros(1, 1, 8, 8), r"\[B, 3, H, W\]"),
        (torch.zeros(1, 3, 8, 10), "multiples of 4"),
    ],
)
def test_malformed_images(tiny: MaskGitVQGAN, images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.encode(images)


# --- bytes ------------------------------------------------------------------------------------------------------------


def test_to_uint8_clamps_and_truncates() -> None:
    # 0.999 · 255 = 254.7: rounding would give 255.
    images = torch.tensor([-0.5, 0.0, 0.999, 1.0, 7.0, 0.5])
    assert to_uint8(images).tolist() == [0, 0, 254, 255, 255, 127]
    assert to_uint8(images.half()).dtype == torch.uint8


def test_to_uint8_refuses_what_is_no_picture() -> None:
    with pytest.raises(ValueError, match="1 of 2 values are NaN"):
        to_uint8(torch.tensor([0.0, float("nan")]))
    with pytest.raises(ValueError, match=r"got torch\.uint8"):
        to_uint8(torch.zeros(2, dtype=torch.uint8))


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_load_published_round_trip(tiny: MaskGitVQGAN, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"tokenizer{suffix}"
    if suffix == ".safetensors":
        save_file(tiny.state_dict(), path)
    else:
        torch.save(tiny.state_dict(), path)
    other = MaskGitVQGAN(TINY)
    tokens = torch.randint(TINY.codebook_size, (1, 3, 3))
    assert not torch.equal(other.decode_tokens(tokens), tiny.decode_tokens(tokens))
    assert other.load_published(path) is other
    assert torch.equal(other.decode_tokens(tokens), tiny.decode_tokens(tokens))


def test_load_published_names_what_does_not_fit_and_changes_nothing(tiny: MaskGitVQGAN, tmp_path: Path) -> None:
    path = tmp_path / "other.bin"
    state = tiny.state_dict()
    state["decoder.conv_in.bias"] = torch.zeros(63)
    state["decoder.conv_inn.weight"] = state.pop("decoder.conv_in.weight")
    torch.save(state, path)
    model = MaskGitVQGAN(TINY)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        model.load_published(path)
    message = str(caught.value)
    assert str(path) in message
    assert "1 missing: decoder.conv_in.weight" in message
    assert "1 unexpected: decoder.conv_inn.weight" in message
    assert "decoder.conv_in.bias [63] instead of [64]" in message
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
