"""What the GPU benchmarks need to know of a backend's launches, the same for every backend."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ptq4arvg_kernels.backends.gpu import Device

from .emulated_traffic import Traffic
from .sass import HotLoop
from .traffic_minimum import Minimum

BACKENDS = ("triton", "cuda")


@dataclass(frozen=True)
class Product:
    """How a GEMM is cut into thread blocks.

    Attributes:
        m, n, k, w_bits: of the layer.
        bm, bn, bk: rows, channels and K of a block's tile and loop iteration.
        steps: iterations of a block at most.
        blocks: of the grid, ``split`` of them for each tile.
        norm: the kernel normalises its rows itself.
    """

    m: int
    n: int
    k: int
    w_bits: int
    bm: int
    bn: int
    bk: int
    warps: int
    steps: int
    blocks: int
    split: int
    norm: bool = False


class GpuBackend(ABC):
    """A backend whose launches are recorded, emulated and compiled without a GPU.

    A launch is what the backend hands to its launcher; only the backend looks into it.
    """

    name: str
    capabilities: tuple[int, ...]  # whose code the emulator can run

    @abstractmethod
    def launching(self, device: Device, launcher: Callable[[Any], None]) -> contextlib.AbstractContextManager[None]:
        """Run what is inside on this backend, as on ``device``, with ``launcher`` in place of the GPU."""

    @abstractmethod
    def kernel_name(self, started: Any) -> str: ...

    @abstractmethod
    def tile_name(self, started: Any) -> str: ...

    @abstractmethod
    def blocks(self, started: Any) -> int:
        """Thread blocks of the grid."""

    @abstractmethod
    def product(self, started: Any) -> Product | None:
        """None for kernels other than GEMMs."""

    @abstractmethod
    def minimum(self, started: Any) -> Minimum: ...

    @abstractmethod
    def emulate(self, started: Any, capability: int, whole: bool = False) -> Traffic: ...

    @abstractmethod
    def hot_loop(self, started: Any, capability: int) -> HotLoop:
        """The loop over K of a GEMM, compiled for a compute capability."""

    @abstractmethod
    def described(self) -> dict[str, str]:
        """What compiled the kernels, for a report."""

    def record(self, device: Device, call: Callable[[], Any]) -> list[Any]:
        """The launches that ``call`` would start on ``device``; nothing is executed, so its results are garbage."""
        launches: list[Any] = []
        with self.launching(device, launches.append):
            call()
        return launches


def gpu_backend(name: str) -> GpuBackend:
    """The backend called ``name``.

    Raises:
        ValueError: these benchmarks know no such backend.
        RuntimeError: it is not installed here; the message says why.
    """
    if name == "triton":
        from .triton_backend import TritonBackend

        return TritonBackend()
    if name == "cuda":
        from .cuda_backend import CudaBackend

        return CudaBackend()
    raise ValueError(f"unknown backend {name!r}; the GPU benchmarks know {', '.join(BACKENDS)}")
