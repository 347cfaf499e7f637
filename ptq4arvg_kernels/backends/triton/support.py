"""Where the Triton backend can run, and what it knows of a device. Importing this does not import Triton."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import re

import torch
from torch import Tensor

from . import launch

OLDEST_TRITON = (3, 4)
OLDEST_CAPABILITY = (8, 0)


@functools.cache
def _triton_missing() -> str | None:
    """Why the installed Triton cannot be used, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    version = importlib.metadata.version("triton")
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers < OLDEST_TRITON:
        wanted = ".".join(map(str, OLDEST_TRITON))
        return f"Triton {version} is too old, {wanted} or newer is needed; pip install -U triton"
    return None


@functools.cache
def _gpu_missing() -> str | None:
    """Why there is no GPU to run on, or None."""
    if torch.version.hip is not None:
        return "serves NVIDIA GPUs, and this build of torch is for AMD's"
    if not torch.cuda.is_available():
        return "no NVIDIA GPU, or a build of torch without CUDA"
    return None


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def without_gpu() -> bool:
    """Whether kernels are executed on CPU tensors: interpreted, or started by a stand-in for the GPU."""
    return launch.replaced() or interpreted()


def unavailable() -> str | None:
    """Why no kernel can run in this process, or None."""
    return _triton_missing() or (None if without_gpu() else _gpu_missing())


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def device_refused(device: torch.device) -> str | None:
    """Why kernels cannot run on tensors of ``device``, or None."""
    wanted = "cpu" if without_gpu() else "cuda"
    if device.type != wanted:
        return f"serves tensors on {wanted}, not on {device.type}"
    if wanted == "cuda" and _capability(device) < OLDEST_CAPABILITY:
        found, oldest = (".".join(map(str, pair)) for pair in (_capability(device), OLDEST_CAPABILITY))
        return f"needs compute capability {oldest} (8-bit matrix instructions of that shape), the device has {found}"
    return None


def require_rows(op: str, **sources: Tensor | None) -> None:
    """Operands that kernels read at a clamped index have something to read.

    Raises:
        IndexError: one has no rows.
    """
    for name, source in sources.items():
        if source is not None and len(source) == 0:
            raise IndexError(f"{op}: {name} has no rows; pass one per position (tables), group or condition")
