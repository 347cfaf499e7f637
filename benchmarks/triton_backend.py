"""The Triton backend, as the GPU benchmarks see it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

from ptq4arvg_kernels.backends.gpu import Device
from ptq4arvg_kernels.backends.triton.launch import Launch

from . import emulated_traffic, traffic_minimum, triton_launches
from .emulated_traffic import Traffic
from .gpu_backends import GpuBackend, Product
from .sass import HotLoop
from .traffic_minimum import Minimum
from .triton_compiled import examine, triton_version


class TritonBackend(GpuBackend):
    name = "triton"
    capabilities = (80, 86, 89, 90)

    def launching(self, device: Device, launcher: Callable[[Launch], None]) -> contextlib.AbstractContextManager[None]:
        return triton_launches.launching(device, launcher)

    def kernel_name(self, started: Launch) -> str:
        return triton_launches.kernel_name(started)

    def tile_name(self, started: Launch) -> str:
        return triton_launches.tile_name(started)

    def blocks(self, started: Launch) -> int:
        return math.prod(started.grid)

    def product(self, started: Launch) -> Product | None:
        if not triton_launches.is_gemm(started):
            return None
        a, c, split = started.arguments, started.constants, triton_launches.k_parts(started)
        steps = a["steps"] if split > 1 else -(-a["K"] // c["BK"])
        tile = (c["BITS"], c["BM"], c["BN"], c["BK"], started.num_warps)
        return Product(a["M"], a["N"], a["K"], *tile, steps, math.prod(started.grid), split)

    def minimum(self, started: Launch) -> Minimum:
        return traffic_minimum.minimum(started)

    def emulate(self, started: Launch, capability: int, whole: bool = False) -> Traffic:
        return emulated_traffic.emulate(started, capability, whole)

    def hot_loop(self, started: Launch, capability: int) -> HotLoop:
        loop = examine(started, capability).hot_loop
        assert loop is not None
        return loop

    def described(self) -> dict[str, str]:
        return {"triton": triton_version()}
