"""Files of quantized generators: safetensors, with a JSON description in the header.

The header's key ``ptq4arvg`` holds a JSON object: ``format_version``, ``packing_version``, ``family``, ``config``,
``recipe``, ``weight_bits``, ``act_bits``, ``integer``, the reports of calibration, ``sha256`` of the tensors, and
``layers``: for every linear by path its sizes and bits. Packed weights are stored as ``ptq4arvg_kernels.packing``
documents; tables (embeddings) as fp16, to which the pipeline rounded them; scales and biases as fp32. What is derived
from these is computed again when loading.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ptq4arvg.blocks import QuantBlock, QuantHead
from ptq4arvg.calibration.stwq import kv_groups
from ptq4arvg.errors import CheckpointError
from ptq4arvg.linear import QuantLinear
from ptq4arvg.models.families import build
from ptq4arvg.nn import Norm
from ptq4arvg.pipeline import FORMAT_VERSION, assemble
from ptq4arvg.protocol import AttentionSpec
from ptq4arvg.recipes import Recipe
from ptq4arvg.state_dict import TensorFile, check_fit, read_state_dict, write_safetensors_atomic
from ptq4arvg_kernels.packing import FORMAT_VERSION as PACKING_VERSION

__all__ = ["is_quantized", "load", "read_header", "save"]

HEADER_KEY = "ptq4arvg"


def _digest(keys: Iterable[str], read: Callable[[str], Tensor]) -> str:
    """SHA-256 over names and bytes: a zeroed or swapped block would otherwise be a legal 8-bit weight."""
    state = hashlib.sha256()
    for key in sorted(keys):
        state.update(key.encode())
        flat = read(key).detach().cpu().contiguous().reshape(-1)
        state.update(flat.view(torch.uint8).numpy().data)
    return state.hexdigest()


def save(model: Any, path: str | os.PathLike[str]) -> None:
    """Write a quantized generator; an interrupted save leaves the old file as it was.

    Raises:
        ValueError: the model was not quantized by :func:`ptq4arvg.pipeline.quantize` or is a simulation, or the path
            does not end in ``.safetensors``, by which readers know the kind of a file.
    """
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"{path}: quantized checkpoints are safetensors files; let the name end in .safetensors")
    description = getattr(model, "quantization", None)
    if description is None:
        raise ValueError("this model is not quantized; pass the result of ptq4arvg.quantize")
    if not description["integer"]:
        raise ValueError(
            f"recipe {description['recipe']['name']!r} is a fake-quantized simulation without integer weights to save; "
            "quantize with w8a8, w6a8 or w6a6"
        )
    parameters = dict(model.named_parameters())
    tensors = {
        key: value.half() if value.ndim >= 2 and key in parameters else value
        for key, value in model.state_dict().items()
    }
    header = {
        **description,
        "packing_version": PACKING_VERSION,
        "layers": _layers(model),
        "norms": _norms(model),
        "sha256": _digest(tensors, tensors.__getitem__),
    }
    write_safetensors_atomic(path, tensors, {HEADER_KEY: json.dumps(header, sort_keys=True)})


def _layers(model: nn.Module) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "w_bits": layer.w_bits,
            "groups": len(layer.delta),
            "bias": layer.bias is not None,
        }
        for name, layer in model.named_modules()
        if isinstance(layer, QuantLinear)
    }


def _norms(model: nn.Module) -> dict[str, dict[str, Any]]:
    return {
        name: {"scale_offset": norm.scale_offset, "weight": norm.weight is not None, "bias": norm.bias is not None}
        for name, norm in model.named_modules()
        if isinstance(norm, Norm)
    }


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The description in a quantized checkpoint.

    Raises:
        CheckpointError: missing, truncated or foreign file, no description, or a format version this package does not
            know.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated, damaged or not a safetensors file ({error})") from error
    if HEADER_KEY not in metadata:
        raise CheckpointError(
            f"{path} is a safetensors file without a {HEADER_KEY!r} description: not a quantized generator"
        )
    try:
        header = json.loads(metadata[HEADER_KEY])
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: the description in the header is not JSON ({error})") from error
    needed = {"format_version", "packing_version", "family", "config", "recipe", "layers", "norms", "sha256"}
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the description in the header is not a JSON object but {header!r:.40}")
    if not needed <= header.keys():
        raise CheckpointError(f"{path}: the description in the header lacks {', '.join(sorted(needed - set(header)))}")
    for name, known in (("format_version", FORMAT_VERSION), ("packing_version", PACKING_VERSION)):
        if header[name] != known:
            raise CheckpointError(
                f"{path} has {name} {header[name]}, this package reads {known}; "
                "load it with the package that wrote it, or quantize again"
            )
    return header


def is_quantized(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a safetensors file with a description of ours (of any version)."""
    try:
        with safe_open(path, "pt") as file:
            return HEADER_KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def load(path: str | os.PathLike[str]) -> Any:
    """Load a quantized generator; its logits equal those of the saved one bit for bit.

    Raises:
        CheckpointError: not such a file, truncated, of another version, or with contents that do not fit its
            description.
    """
    header = read_header(path)
    try:
        return _restore(header, path)
    except CheckpointError:
        raise
    except (AttributeError, LookupError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        # RuntimeError is what torch raises for sizes that no tensor can have.
        raise CheckpointError(f"{path} does not fit its own description: {error}") from error


def _restore(header: dict[str, Any], path: str | os.PathLike[str]) -> Any:
    with torch.device("meta"):
        model = build(header["family"], header["config"])
    specs, layers = model.linear_specs(), header["layers"]
    homes = _homes(model)
    recipe = Recipe.from_dict(header["recipe"])
    _same_names("layers", layers, set(homes.values()))

    def make(linear: str) -> QuantLinear:
        known, length = layers[homes[linear]], len(specs[linear].group_of_position)
        original = model.get_submodule(linear)
        for what, stated in (
            ("in_features", original.in_features),
            ("out_features", original.out_features),
            ("w_bits", recipe.weight_bits[specs[linear].role]),
        ):
            if known[what] != stated:
                raise ValueError(
                    f"{what} of {linear} is {known[what]} in the layers, but {stated} by config and recipe"
                )
        with torch.device("meta"):
            return QuantLinear(
                known["in_features"],
                known["out_features"],
                known["w_bits"],
                known["groups"],
                length,
                known["bias"],
                specs[linear].activation,
            )

    def kv(attention: AttentionSpec, operand: str) -> tuple[Tensor, Tensor]:
        shape = (int(kv_groups(model).max()) + 1, attention.heads)
        return torch.ones(shape), torch.zeros(shape, dtype=torch.int16)

    model = assemble(model, make, kv)
    norms = {name: module for name, module in model.named_modules() if isinstance(module, Norm)}
    _same_names("norms", header["norms"], set(norms))
    for name, norm in norms.items():
        known = header["norms"][name]
        if known["scale_offset"] not in (0.0, 1.0):
            raise ValueError(f"scale_offset of {name} is {known['scale_offset']!r}; it is 0 or 1")
        norm.scale_offset = known["scale_offset"]
        for what in ("weight", "bias"):
            setattr(norm, what, nn.Parameter(torch.empty(norm.dim)) if known[what] else None)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                setattr(module, name, nn.Parameter(torch.empty(parameter.shape)))
    check_fit(model, read_state_dict(path), source=str(path))
    with TensorFile(path) as file:
        _fill(model, file, path)
        if _digest(file.keys(), file.read) != header["sha256"]:
            raise CheckpointError(
                f"{path}: the tensors do not have the checksum that the header states; copy the file again"
            )
    beside = ("layers", "norms", "packing_version", "sha256")
    model.quantization = {key: value for key, value in header.items() if key not in beside}
    return model.eval().requires_grad_(False)


def _fill(model: nn.Module, file: TensorFile, path: str | os.PathLike[str]) -> None:
    """Read, check and prepare block by block, so that memory never holds the weights twice."""
    filled: set[str] = set()

    def fill(prefix: str, module: nn.Module) -> None:
        for name, part in module.named_modules(prefix=prefix):
            own: dict[str, Tensor | None] = {**part._parameters, **part._buffers}
            before = len(filled)
            for key, target in own.items():
                path_of = f"{name}.{key}" if name else key
                if target is None or path_of in filled or key in part._non_persistent_buffers_set:
                    continue
                filled.add(path_of)
                value = file.read(path_of).to(target.dtype)
                if target.is_meta:
                    part._buffers[key] = value
                else:
                    with torch.no_grad():
                        target.copy_(value)
            if isinstance(part, QuantLinear) and len(filled) > before:
                _refresh(part, name, path)

    for name, module in model.named_modules():
        if isinstance(module, QuantBlock | QuantHead):
            fill(name, module)
            if isinstance(module, QuantBlock):
                _refresh(module, name, path)
            module.prepare()
    fill("", model)


def _refresh(module: QuantLinear | QuantBlock, name: str, path: str | os.PathLike[str]) -> None:
    try:
        module.refresh()
    except (IndexError, ValueError) as error:
        raise CheckpointError(f"{path}: {name}: {error}") from error


def _same_names(what: str, stated: Any, expected: set[str]) -> None:
    """Raise ``ValueError`` unless the description states exactly the modules that a model of its config has."""
    different = sorted(set(stated) ^ expected)
    if different:
        raise ValueError(
            f"{what} should name the {len(expected)} of its config; different are {', '.join(different[:8])}"
        )


def _homes(model: Any) -> dict[str, str]:
    """Where ``assemble`` puts the integer layer of each linear: path of the linear → path of the layer."""
    homes = {}
    for spec in model.block_specs():
        for role in ("qkv", "proj", "fc1", "fc2"):
            homes[getattr(spec, role)] = f"{spec.path}.{role}"
        if spec.modulation is not None:
            homes[spec.modulation.linear] = f"{spec.path}.adaln"
    head = model.head_spec()
    homes[head.linear] = "fused_head.linear"
    if head.modulation is not None:
        homes[head.modulation.linear] = "fused_head.adaln"
    return homes
