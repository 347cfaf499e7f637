"""Launches of the Triton backend, recorded without a GPU: the production host code runs on CPU tensors of the real
shapes and hands its launches to a list instead of a device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ptq4arvg_kernels import use_backend
from ptq4arvg_kernels.backends import gpu
from ptq4arvg_kernels.backends.gpu import Device
from ptq4arvg_kernels.backends.triton import launch
from ptq4arvg_kernels.backends.triton.launch import Launch, Launcher

GEMM = "gemm"


@contextlib.contextmanager
def launching(device: Device, launcher: Launcher) -> Iterator[None]:
    """Run what is inside on the Triton backend, as on ``device``, with ``launcher`` in place of the GPU."""
    with gpu.assume(device), launch.replace(launcher), use_backend("triton", strict=True), torch.no_grad():
        yield


def record(device: Device, call: Callable[[], Any]) -> list[Launch]:
    """The launches that ``call`` would start on ``device``; nothing is executed, so its results are garbage."""
    launches: list[Launch] = []
    with launching(device, launches.append):
        call()
    return launches


def kernel_name(started: Launch) -> str:
    """Name of the kernel's function, with the epilogue of a GEMM."""
    name = started.kernel.__name__
    return f"{name}/{started.constants['EPILOGUE']}" if name == GEMM else name


def is_gemm(started: Launch) -> bool:
    return bool(started.kernel.__name__ == GEMM)


def k_parts(started: Launch) -> int:
    """Parts of K that blocks of their own compute, of a GEMM."""
    return int(started.grid[1])


# Constants of a kernel that follow from others or from the width of its data.
_DERIVED = ("PADDED", "LANES", "CHUNK", "CHUNKS", "VECTOR")


def tile_name(started: Launch) -> str:
    """The tile, warps and stages of a GEMM; the sizes among the constants of another kernel, and its warps."""
    constants = started.constants
    if is_gemm(started):
        return f"{constants['BM']}x{constants['BN']}x{constants['BK']} w{started.num_warps} s{started.num_stages}"
    sizes = [f"{k}={v}" for k, v in constants.items() if type(v) is int and k not in _DERIVED]
    return f"{' '.join(sizes)} w{started.num_warps}"


def variant_name(started: Launch) -> str:
    """What else tells compiled kernels of one name and tile apart."""
    constants = started.constants
    if is_gemm(started):
        ragged = [name for name, even in (("M", "EVEN_M"), ("K", "EVEN_K")) if not constants[even]]
        parts = [f"w{constants['BITS']}", *([f"ragged {' '.join(ragged)}"] if ragged else [])]
        return " ".join([*parts, *(["split"] if k_parts(started) > 1 else [])])
    parts = [f"{v}" for v in constants.values() if isinstance(v, str)]
    parts += [k.lower() for k, v in constants.items() if v is True and k != "ASM"]
    absent = [k for k, v in started.arguments.items() if v is None]
    return " ".join([*parts, *([f"without {','.join(absent)}"] if absent else [])])
