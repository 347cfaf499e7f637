"""What is in a checkpoint file, in words."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor

from ptq4arvg.checkpoint import is_quantized, read_header
from ptq4arvg.errors import CheckpointError
from ptq4arvg.sources import config_of
from ptq4arvg.state_dict import read_state_dict

__all__ = ["describe"]


def describe(path: Path) -> list[tuple[str, str]]:
    """Names and values, in the order in which to show them.

    Raises:
        CheckpointError: missing, truncated or foreign file.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file")
    tensors = read_state_dict(path)
    lines = [("file", f"{path}, {_megabytes(path.stat().st_size)}")]
    if is_quantized(path):
        lines += _quantized(read_header(path))
    else:
        lines.append(("kind", _floating_kind(tensors, path)))
    return lines + _by_dtype(tensors)


def _quantized(header: dict[str, Any]) -> list[tuple[str, str]]:
    recipe, layers = header["recipe"], header["layers"]
    packed = sum(layer["in_features"] * layer["out_features"] for layer in layers.values())
    roles = recipe.get("weight_bits", {})
    bits = Counter((bits, recipe["act_bits"][role]) for role, bits in roles.items())
    by_role = "; ".join(
        f"W{w}A{a}: {', '.join(role for role in roles if (roles[role], recipe['act_bits'][role]) == (w, a))}"
        for w, a in bits
    )
    calibration = header.get("calibration", {})
    lines = [
        ("kind", f"quantized {header['family']}, format {header['format_version']}"),
        ("recipe", recipe["name"]),
        ("bits by role", by_role),
        ("sink codes", f"{recipe['sink_bits']} bits"),
        ("config", ", ".join(f"{name}={value}" for name, value in header["config"].items())),
        ("layers", f"{len(layers)} integer linears, {packed / 1e6:.2f} M weights"),
    ]
    if "sequences" in calibration:
        lines.append(("calibration", f"{calibration['sequences']} sequences, seed {calibration['seed']}"))
    return lines


def _floating_kind(tensors: dict[str, Tensor], path: Path) -> str:
    try:
        return f"published checkpoint, {config_of(tensors, path)}"
    except CheckpointError:
        table = tensors.get("cls_token")
        return "state dict" if table is None else f"RAR of width {table.shape[-1]}, no published size"


def _by_dtype(tensors: dict[str, Tensor]) -> list[tuple[str, str]]:
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for tensor in tensors.values():
        kind = str(tensor.dtype).removeprefix("torch.")
        count[kind] += 1
        size[kind] += tensor.numel() * tensor.element_size()
    return [(kind, f"{count[kind]} tensors, {_megabytes(size[kind])}") for kind, _ in size.most_common()]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"
