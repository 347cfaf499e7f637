"""Tiles of the CUDA backend's GEMM kernels, and the floor of their main loops, by formula.

A step of the pipeline multiplies ``rows`` x ``channels`` x ``step_k``. A warp owns 32 channels and ``depth`` bricks of
64 k. Per brick it needs, for G = rows / 8 groups of eight rows,

    4 G    matrix instructions m16n8k32 (two channel tiles, two steps of 32 k),
      G    ldmatrix.x4 (eight rows, 64 k each),
      3    (6 bits) or 4 (8 bits) loads of 16 bytes per lane, and as many asynchronous copies,
     36    logic operations to unpack 6 bits: nine per four words, four times (csrc/cuda/int6.cuh); ten by the count of
           the published unpackings,

and its share of the copies of activations, ``rows * step_k / 16`` of 16 bytes for all threads (none in a kernel that
normalised its rows, which stay in shared memory). Nothing else belongs to the floor: no address, barrier, wait, branch.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ptq4arvg_kernels.backends.cuda import native
from ptq4arvg_kernels.backends.cuda.linear import OUTPUTS
from ptq4arvg_kernels.backends.gpu import SHARED_BYTES

from .gpu_devices import ARCHITECTURES

_NAME = re.compile(r"gemm(_norm)?_w([68])_(\d+)x(\d+)_(store|quant|gate_residual)")
BRICK_K, STRIP = 64, 32
UNPACK_OURS, UNPACK_PUBLISHED = 9, 10  # logic operations for 16 weights of a lane

Info = tuple[int, int, int]


@dataclass(frozen=True)
class GemmTile:
    """What a GEMM kernel is compiled for; ``shared_bytes``: dynamic, of plans for ordinary layers."""

    kernel: str
    bits: int
    output: str
    norm: bool
    rows: int
    channels: int
    step_k: int
    stages: int
    threads: int

    @property
    def warps(self) -> int:
        return self.threads // 32

    @property
    def depth(self) -> int:
        """Bricks of a warp per step."""
        return self.step_k // BRICK_K // (self.warps // (self.channels // STRIP))

    @property
    def groups(self) -> int:
        return self.rows // 8

    @property
    def mma_per_step(self) -> int:
        """Matrix instructions of a warp per step."""
        return 4 * self.groups * self.depth

    @property
    def macs_per_step(self) -> int:
        """Of the block's tile, padding included."""
        return self.rows * self.channels * self.step_k

    def name(self) -> str:
        return f"{self.rows}x{self.channels}x{self.step_k} w{self.warps} s{self.stages}"

    def floor(self, unpack: int = UNPACK_OURS) -> dict[str, float]:
        """Instructions of a warp per step by kind; see the module. ``unpack``: operations for 16 weights."""
        loads = (3 if self.bits == 6 else 4) * self.depth
        rows = 0.0 if self.norm else self.rows * self.step_k / 16 / self.threads
        return {
            "IMMA": self.mma_per_step,
            "LDSM": self.groups * self.depth,
            "LDS": loads,
            "LDGSTS": loads + rows,
            "logic": 4 * unpack * self.depth if self.bits == 6 else 0,
        }


def info_of(arch: int) -> Info:
    """What plans know of the GPU that stands for an architecture."""
    device = ARCHITECTURES[arch]
    return arch, device.multiprocessors, SHARED_BYTES[arch]


def plans(rows: int, n: int, k: int, bits: int, output: str, info: Info) -> list[Any]:
    """All plans that the dispatcher chooses from, the chosen ones of each kind first."""
    module, number = native.module(), OUTPUTS[output]
    found = list(module.gemm_plans(rows, n, k, bits, number, info))
    if output != "gate_residual":
        norm = module.plan_gemm_norm(rows, n, k, bits, number, info)
        found += [] if norm is None else [norm]
    return found


def _tile(plan: Any) -> GemmTile:
    name = _NAME.fullmatch(plan.kernel)
    if name is None:
        raise ValueError(f"{plan.kernel} is not the name of a GEMM kernel as benchmarks/cuda_tiles.py knows them")
    sizes = (plan.rows, plan.channels, plan.step_k, plan.stages, plan.threads)
    return GemmTile(plan.kernel, int(name[2]), name[5], bool(name[1]), *sizes)


# Layers wide and narrow, so that each tile is the best of its kind for one of them.
_SHAPES = ((2, 768, 768), (2, 4096, 1024), (2, 5120, 1280), (16, 1024, 1024), (200, 4096, 1024), (16, 16384, 1024))


@functools.cache
def tiles() -> dict[str, GemmTile]:
    """All GEMM kernels of the compiled module by name.

    Raises:
        RuntimeError: a kernel of the module that no plan leads to.
    """
    found: dict[str, GemmTile] = {}
    for bits in (6, 8):
        for output in OUTPUTS:
            for shape in _SHAPES:
                for arch in ARCHITECTURES:
                    found |= {plan.kernel: _tile(plan) for plan in plans(*shape, bits, output, info_of(arch))}
    lost = [name for name in native.module().kernels() if _NAME.fullmatch(name) and name not in found]
    if lost:
        raise RuntimeError(f"no plan leads to {', '.join(lost)}: add a shape to {__name__}._SHAPES")
    return found


def gemm_tile(kernel: str) -> GemmTile | None:
    """The tile of a GEMM kernel; None for other kernels."""
    return tiles()[kernel] if _NAME.fullmatch(kernel) else None


def shared_bytes(kernel: str, shapes: Iterable[tuple[int, int, int]], arch: int) -> list[int]:
    """Dynamic shared memory of the launches of a GEMM kernel over these (M, N, K), ascending; without those for which
    it has no plan."""
    tile = tiles()[kernel]
    found = {
        plan.shared
        for shape in shapes
        for plan in plans(*shape, tile.bits, tile.output, info_of(arch))
        if plan.kernel == kernel
    }
    return sorted(found)
