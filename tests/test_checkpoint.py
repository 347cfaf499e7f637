"""Files of quantized generators: what is saved comes back bit for bit, and nothing else is taken for one."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ptq4arvg import state_dict
from ptq4arvg.checkpoint import is_quantized, load, read_header, save
from ptq4arvg.errors import CheckpointError
from ptq4arvg.linear import QuantLinear
from ptq4arvg.models.rar import RAR
from ptq4arvg.pipeline import quantize
from ptq4arvg.protocol import ROLES
from ptq4arvg.recipes import RECIPES, Recipe
from ptq4arvg.simulate import simulate
from ptq4arvg_kernels.packing import FORMAT_VERSION as PACKING_VERSION
from tests.tiny import tiny_calibration, tiny_inputs, tiny_rar

# Without scaling of the head its norm keeps the modulation's constant 1: norms differ in what they have absorbed.
MIXED = Recipe(
    "mixed",
    weight_bits={**dict.fromkeys(ROLES, 6), "head": 8, "adaln": 8},
    act_bits={**dict.fromkeys(ROLES, 6), "fc2": 8},
    scaled_roles=("qkv", "fc1"),
)
NAMES = [*RECIPES, "mixed"]
PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(200)


@pytest.fixture(scope="module")
def original() -> RAR:
    return tiny_rar(0, dim=40, mlp_dim=52, temperature=0.9, power=1.5)


@pytest.fixture(scope="module")
def quantized(original: RAR) -> dict[str, RAR]:
    sequences = tiny_calibration(original, 6)
    recipes: list[str | Recipe] = [*RECIPES, MIXED]
    return {name: quantize(original, recipe, sequences, samples=8) for name, recipe in zip(NAMES, recipes, strict=True)}


@pytest.fixture
def saved(quantized: dict[str, RAR], tmp_path: Path) -> Path:
    """A W6A6 file."""
    path = tmp_path / "model.safetensors"
    save(quantized["w6a6"], path)
    return path


def contents(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["ptq4arvg"])  # noqa: SIM118


def rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
    tensors, header = contents(path)
    change(tensors, header)
    save_file(tensors, path, {"ptq4arvg": json.dumps(header)})


# --- round trip -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_logits_come_back_bit_for_bit(quantized: dict[str, RAR], name: str, tmp_path: Path) -> None:
    model, path = quantized[name], tmp_path / "model.safetensors"
    save(model, path)
    loaded = load(path)
    assert isinstance(loaded, RAR)
    assert not loaded.training
    assert loaded.config == model.config
    assert loaded.quantization == model.quantization
    tokens, classes = tiny_inputs(model, 12, 4)
    assert torch.equal(loaded(tokens, classes), model(tokens, classes))
    assert torch.equal(loaded.generate(torch.arange(5), 3), model.generate(torch.arange(5), 3))
    expected = dict(model.named_buffers()) | dict(model.named_parameters())
    restored = dict(loaded.named_buffers()) | dict(loaded.named_parameters())
    assert restored.keys() == expected.keys()
    for key, value in restored.items():
        assert value.dtype == expected[key].dtype, key
        assert torch.equal(value, expected[key]), key
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_saving_what_was_loaded_gives_the_same_file(saved: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.safetensors"
    save(load(saved), again)
    assert again.read_bytes() == saved.read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_header_describes_the_model(quantized: dict[str, RAR], name: str, tmp_path: Path) -> None:
    model, path = quantized[name], tmp_path / "model.safetensors"
    save(model, path)
    header = read_header(path)
    recipe = MIXED if name == "mixed" else RECIPES[name]
    assert header["format_version"] == 1
    assert header["packing_version"] == PACKING_VERSION
    assert (header["family"], header["config"]) == ("rar", model.config_dict())
    assert header["integer"] is True
    # Bits per role, and per layer.
    assert header["recipe"]["weight_bits"] == recipe.weight_bits
    assert header["recipe"]["act_bits"] == recipe.act_bits
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, QuantLinear)}
    assert {path: entry["w_bits"] for path, entry in header["layers"].items()} == {
        path: layer.w_bits for path, layer in layers.items()
    }
    assert header["layers"]["fused_head.linear"] == {
        "in_features": 40,
        "out_features": 16,
        "w_bits": recipe.weight_bits["head"],
        "groups": 1,
        "bias": True,
    }
    assert is_quantized(path)


def test_file_holds_packed_weights_and_half_precision_tables(saved: Path, quantized: dict[str, RAR]) -> None:
    tensors, header = contents(saved)
    for layer, entry in header["layers"].items():
        rows = -(-entry["in_features"] // 32) * 32 * 3 // 4
        assert tensors[f"{layer}.qweight"].dtype == torch.uint8
        assert tensors[f"{layer}.qweight"].shape == (entry["out_features"], rows)
        # Derived values are computed again, not stored.
        assert not {f"{layer}.table", f"{layer}.col_sums"} & tensors.keys()
    for table in ("embeddings.weight", "pos_embed", "target_aware_pos_embed", "timesteps_embeddings", "cls_token"):
        assert tensors[table].dtype == torch.float16
        # Rounded when quantizing, so that what was evaluated is what is saved.
        assert torch.equal(tensors[table].float(), quantized["w6a6"].get_parameter(table))
    floats = {key for key, value in tensors.items() if value.is_floating_point() and value.ndim >= 2}
    assert floats - {
        "embeddings.weight",
        "pos_embed",
        "target_aware_pos_embed",
        "timesteps_embeddings",
        "cls_token",
    } == {f"blocks.{i}.{operand}_delta" for i in range(2) for operand in "kv"}


def test_loading_runs_no_code(saved: Path, quantized: dict[str, RAR], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("unpickling")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    tokens, classes = tiny_inputs(quantized["w6a6"], 2)
    assert torch.equal(load(saved)(tokens, classes), quantized["w6a6"](tokens, classes))


# --- saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["write", "replace"])
def test_interrupted_save_leaves_the_old_file(
    saved: Path, quantized: dict[str, RAR], where: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def half_written(tensors: object, path: Path, **kwargs: object) -> None:
        path.write_bytes(before[:1000])
        raise error

    def fail(*args: object) -> None:
        raise error

    if where == "write":
        monkeypatch.setattr(state_dict, "save_file", half_written)
    else:
        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(type(error)):
        save(quantized["w8a8"], saved)
    monkeypatch.undo()
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]
    # Nothing stands in the way of the next attempt.
    save(quantized["w8a8"], saved)
    assert load(saved).quantization["recipe"]["name"] == "w8a8"


def test_floating_point_model_is_refused(original: RAR, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not quantized.*ptq4arvg\.quantize"):
        save(original, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_simulation_is_refused(original: RAR, tmp_path: Path) -> None:
    simulated = simulate(original, "rtn", calibration=tiny_calibration(original, 3), samples=4)
    with pytest.raises(ValueError, match=r"'rtn'.*simulation.*w8a8"):
        save(simulated, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["model", "model.bin", "model.pt"])
def test_other_suffixes_are_refused_when_saving(quantized: dict[str, RAR], name: str, tmp_path: Path) -> None:
    """They could not be loaded: suffixes tell the reader what a file is."""
    with pytest.raises(ValueError, match=rf"{name}.*\.safetensors"):
        save(quantized["w8a8"], tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_missing_folder_is_named(quantized: dict[str, RAR], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        save(quantized["w8a8"], tmp_path / "nowhere" / "model.safetensors")


# --- damaged and foreign files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 8, 100, 0.2, 0.5, 0.99, -1])
def test_truncated_file_is_refused(saved: Path, length: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(length * len(content)) if isinstance(length, float) else length])
    assert not is_quantized(saved)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated, damaged"):
        load(saved)


def test_file_with_bytes_to_spare_is_refused(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes() + b"more")
    with pytest.raises(CheckpointError, match=saved.name):
        load(saved)


@pytest.mark.parametrize("content", [PNG, b"PK\x03\x04" + bytes(300), b'{"format_version": 1}', bytes(5000)])
def test_file_of_another_kind_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert not is_quantized(path)
    with pytest.raises(CheckpointError, match=path.name):
        load(path)


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.safetensors", tmp_path):
        assert not is_quantized(path)
        with pytest.raises(CheckpointError, match=f"{path.name} is not a file"):
            load(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_foreign_safetensors_is_refused(original: RAR, metadata: dict[str, str] | None, tmp_path: Path) -> None:
    path = tmp_path / "fp.safetensors"
    save_file(original.state_dict(), path, metadata)
    assert not is_quantized(path)
    with pytest.raises(CheckpointError, match=r"fp\.safetensors.*not a quantized generator"):
        load(path)


@pytest.mark.parametrize("text", ["{", "[1, 2]", "null", "{}"])
def test_header_that_is_no_description_is_refused(saved: Path, text: str) -> None:
    tensors, _ = contents(saved)
    save_file(tensors, saved, {"ptq4arvg": text})
    with pytest.raises(CheckpointError, match="description in the header"):
        load(saved)


@pytest.mark.parametrize("key", ["format_version", "packing_version"])
@pytest.mark.parametrize("version", [0, 2, "1"])
def test_other_versions_are_named(saved: Path, key: str, version: object) -> None:
    rewrite(saved, lambda tensors, header: header.update({key: version}))
    with pytest.raises(CheckpointError, match=rf"{key} {version}.*reads 1.*quantize again"):
        load(saved)


@pytest.mark.parametrize("key", ["format_version", "family", "config", "recipe", "layers", "norms"])
def test_missing_part_of_the_description_is_named(saved: Path, key: str) -> None:
    rewrite(saved, lambda tensors, header: header.pop(key))
    with pytest.raises(CheckpointError, match=rf"lacks {key}"):
        load(saved)


LAYER = "blocks.1.fc1"
NORM = "blocks.0.norm1"


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (("family",), "var"),
        (("config", "dim"), 80),
        (("config", "heads"), 4),
        (("config", "depth"), 3),
        (("config", "depth"), 1),
        (("config", "grid"), 3),
        (("config", "mlp_dim"), 48),
        (("config", "width"), 7),
        (("config", "dim"), "40"),
        (("config", "dim"), -40),
        (("config",), None),
        (("layers", LAYER, "w_bits"), 8),
        (("layers", LAYER, "w_bits"), 7),
        (("layers", LAYER, "w_bits"), "6"),
        (("layers", LAYER, "in_features"), 41),
        (("layers", LAYER, "in_features"), 10**9),
        (("layers", LAYER, "out_features"), 10**12),
        (("layers", LAYER, "groups"), -1),
        (("layers", LAYER, "groups"), 2),
        (("layers", LAYER, "bias"), False),
        (("layers", LAYER), {}),
        (("layers",), {}),
        (("layers",), []),
        (("norms",), {}),
        (("norms", NORM, "weight"), False),
        (("norms", NORM, "scale_offset"), "one"),
        (("norms", NORM, "scale_offset"), float("nan")),
        (("norms", "blocks.0.attn.q_norm"), {"scale_offset": 1.0, "weight": True, "bias": True}),
        (("recipe",), None),
        (("recipe", "weight_bits", "fc1"), 8),
    ],
)
def test_description_that_does_not_fit_is_refused(saved: Path, at: tuple[str, ...], value: object) -> None:
    def change(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        for key in at[:-1]:
            header = header[key]
        header[at[-1]] = value

    rewrite(saved, change)
    with pytest.raises(CheckpointError, match=saved.name):
        load(saved)


def test_codes_and_classes_cannot_be_exchanged(saved: Path) -> None:
    """The embedding table has the same rows for 16 codes and 5 classes as for 17 and 4, but another meaning."""
    rewrite(saved, lambda tensors, header: header["config"].update(codebook=17, classes=4))
    with pytest.raises(CheckpointError, match=r"lm_head.*16.*17|lm_head.*17.*16"):
        load(saved)


@pytest.mark.parametrize("layer", ["blocks.0.qkv", "fused_head.adaln"])
def test_zeroed_weights_are_found(saved: Path, layer: str) -> None:
    """A blanked region, as a crash of the machine leaves it: no packed 6-bit code is a zero."""

    def blank(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        tensors[f"{layer}.qweight"].flatten()[30:60] = 0

    rewrite(saved, blank)
    with pytest.raises(CheckpointError, match=rf"{layer}.*corrupt"):
        load(saved)


def test_impossible_bytes_are_found(quantized: dict[str, RAR], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(quantized["w8a8"], path)
    rewrite(path, lambda tensors, header: tensors["blocks.0.proj.qweight"].fill_(0x80))
    with pytest.raises(CheckpointError, match=r"-128.*corrupt"):
        load(path)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("blocks.0.qkv.delta", 0.0, r"delta contains 0\.0"),
        ("blocks.0.qkv.delta", float("nan"), "delta contains nan"),
        ("blocks.0.qkv.zero_point", 300, "zero_point contains 300"),
        ("blocks.0.qkv.act_bits", 4, "bits contains 4"),
        ("blocks.0.qkv.w_scale", -1.0, r"w_scale holds -1\.0"),
        ("blocks.0.qkv.group_of_position", 9, "contains 9"),
        ("blocks.1.k_delta", -1.0, r"delta contains -1\.0"),
        ("blocks.1.v_zero_point", 256, "zero_point contains 256"),
        ("blocks.1.kv_group", 2, "kv_group"),
    ],
)
def test_parameters_outside_the_law_are_named(saved: Path, key: str, value: float, words: str) -> None:
    rewrite(saved, lambda tensors, header: tensors[key].fill_(value))
    with pytest.raises(CheckpointError, match=words):
        load(saved)


@pytest.mark.parametrize("key", ["blocks.0.qkv.qweight", "embeddings.weight", "blocks.1.kv_group"])
def test_missing_tensor_is_named(saved: Path, key: str) -> None:
    rewrite(saved, lambda tensors, header: tensors.pop(key))
    with pytest.raises(CheckpointError, match=rf"1 missing: {key}"):
        load(saved)


def test_unexpected_tensor_is_named(saved: Path) -> None:
    rewrite(saved, lambda tensors, header: tensors.update({"stray": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match="1 unexpected: stray"):
        load(saved)
