"""The CUDA backend, as the GPU benchmarks see it: recorded launches, their tiles, counters and machine code."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch

from ptq4arvg_kernels import use_backend
from ptq4arvg_kernels.backends import gpu
from ptq4arvg_kernels.backends.cuda import native
from ptq4arvg_kernels.backends.cuda.native import Launch
from ptq4arvg_kernels.backends.gpu import Device

from . import cuda_minimum, cuda_traffic
from .cuda_compiled import examine, nvcc_version
from .cuda_params import GemmParams, params
from .cuda_tiles import BRICK_K, gemm_tile
from .emulated_traffic import Traffic
from .gpu_backends import GpuBackend, Product
from .sass import HotLoop
from .traffic_minimum import Minimum


class CudaBackend(GpuBackend):
    """Raises RuntimeError where the compiled module is missing."""

    name = "cuda"
    # The emulator runs the PTX for 8.0, which the code of every architecture is made of; plans are those of the device.
    capabilities = (80, 86, 89, 90, 100, 120)

    def __init__(self) -> None:
        native.module()

    @contextlib.contextmanager
    def launching(self, device: Device, launcher: Callable[[Launch], None]) -> Iterator[None]:
        with gpu.assume(device), native.replace(launcher), use_backend("cuda", strict=True), torch.no_grad():
            yield

    def kernel_name(self, started: Launch) -> str:
        tile = gemm_tile(started.name)
        if tile is None:
            return started.name
        return f"gemm{'_norm' if tile.norm else ''}/{tile.output}"

    def tile_name(self, started: Launch) -> str:
        tile = gemm_tile(started.name)
        return f"w{started.threads // 32}" if tile is None else tile.name()

    def blocks(self, started: Launch) -> int:
        return math.prod(started.grid)

    def product(self, started: Launch) -> Product | None:
        tile = gemm_tile(started.name)
        if tile is None:
            return None
        p = params(started)
        assert isinstance(p, GemmParams)
        steps = -(-min(p.part_bricks, p.bricks) * BRICK_K // tile.step_k)
        sizes = (tile.bits, tile.rows, tile.channels, tile.step_k, tile.warps)
        return Product(p.rows, p.channels, p.width, *sizes, steps, math.prod(started.grid), started.grid[2], tile.norm)

    def minimum(self, started: Launch) -> Minimum:
        return cuda_minimum.minimum(started)

    def emulate(self, started: Launch, capability: int, whole: bool = False) -> Traffic:
        return cuda_traffic.emulate(started, whole)

    def hot_loop(self, started: Launch, capability: int) -> HotLoop:
        loop = examine(started.name, capability).hot_loop
        assert loop is not None
        return loop

    def described(self) -> dict[str, str]:
        return {"nvcc": nvcc_version()}
