"""Where the CUDA backend can run, and what its plans know of a device."""

from __future__ import annotations

import functools

import torch

from ..gpu import describe
from . import native

OLDEST_CAPABILITY = 80
# The oldest driver for programs of a CUDA release (CUDA compatibility guide, minor-version compatibility).
OLDEST_DRIVER = {12: "r525", 13: "r580"}


def driver_needed() -> str:
    """The oldest driver that the runtime in the compiled module works with, such as ``r580``."""
    version = native.module().runtime_version()
    return OLDEST_DRIVER.get(version // 1000, f"of CUDA {_release(version)}")


def architectures() -> list[int]:
    """Compute capabilities the module has machine code for, major * 10 + minor; the last one as PTX too."""
    return [int(number) for number in native.module().architectures.split(";")]


def _release(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _capability(number: int) -> str:
    return f"{number // 10}.{number % 10}"


def build() -> str:
    """What the compiled module is made for, in words."""
    listed = ", ".join(map(_capability, architectures()))
    release = _release(native.module().runtime_version())
    return f"compiled for compute capability {listed} with CUDA {release}: needs driver {driver_needed()} or newer"


@functools.cache
def _gpu_missing() -> str | None:
    """Why there is no GPU to run on, or None."""
    if torch.version.hip is not None:
        return "serves NVIDIA GPUs, and this build of torch is for AMD's"
    if not torch.cuda.is_available():
        return f"no NVIDIA GPU, or a build of torch without CUDA ({build()})"
    driver = native.module().driver_version()
    if driver // 1000 < native.module().runtime_version() // 1000:
        return (
            f"the driver is too old, it knows CUDA {_release(driver)} ({build()}); update it, or install from source "
            f"with a toolkit of CUDA {driver // 1000}"
        )
    return None


def unavailable() -> str | None:
    """Why no kernel can run in this process, or None."""
    return native.why_not() or (None if native.replaced() else _gpu_missing())


def capability_refused(capability: int, compiled: list[int]) -> str | None:
    """Why a GPU of this compute capability cannot run a module compiled for others, or None.

    Machine code runs on later minor versions of its major version, PTX (of the last one) on all later ones.
    """
    if capability < OLDEST_CAPABILITY:
        return (
            f"needs compute capability {_capability(OLDEST_CAPABILITY)} (asynchronous copies and 8-bit matrix "
            f"instructions), the device has {_capability(capability)}"
        )
    if capability >= max(compiled) or any(
        number // 10 == capability // 10 and number <= capability for number in compiled
    ):
        return None
    listed = ", ".join(map(_capability, compiled))
    return (
        f"compiled for compute capability {listed}, the device has {_capability(capability)}; install from source with "
        f"PTQ4ARVG_CUDA_ARCHS={capability}"
    )


@functools.cache
def device_refused(device: torch.device, replaced: bool) -> str | None:
    """Why kernels cannot run on tensors of ``device``, or None. ``replaced``: see :func:`.native.replaced`."""
    wanted = "cpu" if replaced else "cuda"
    if device.type != wanted:
        return f"serves tensors on {wanted}, not on {device.type}"
    return None if wanted == "cpu" else capability_refused(describe(device).capability, architectures())


def device_info(device: torch.device) -> tuple[int, int, int]:
    """What plans depend on: compute capability, multiprocessors, bytes of shared memory per block."""
    known = describe(device)
    return known.capability, known.multiprocessors, known.shared_bytes
