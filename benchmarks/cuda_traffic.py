"""Counters of the CUDA backend's launches from the PTX emulator, of whole grids or of parts that stand for them."""

from __future__ import annotations

import functools
import math
from itertools import product
from typing import Any

from ptq4arvg_kernels.backends.cuda.native import Launch

from .cuda_params import GemmParams, params
from .cuda_tiles import gemm_tile
from .emulated_traffic import Block, Traffic, Unit
from .loops import is_product, ptx_loops
from .triton_compiled import emulation


def units(launch: Launch, whole: bool = False) -> list[Unit]:
    """Parts of a grid whose counters, times their counts, are those of the grid.

    GEMM: all parts along K of one tile, of each kind: inside, in a ragged last row tile, in a ragged last column tile,
    in both; with a gate every row tile, since rows may share a gate, whose sectors then count once. ``qkv_append``: all
    of it. Other kernels: blocks that differ in the first index only do the same on other data; every other one may
    begin in the middle of a sector.

    Args:
        whole: all blocks of the grid instead.
    """
    width, height, depth = launch.grid
    p = params(launch)
    if whole or launch.name == "qkv_append":
        return [Unit(tuple(product(range(width), range(height), range(depth))), 1)]
    if not isinstance(p, GemmParams):
        others = list(product(range(height), range(depth)))
        count = min(2, width)
        return [Unit(tuple((x, y, z) for y, z in others), (width + 1 - x) // 2) for x in range(count)]
    tile = gemm_tile(launch.name)
    assert tile is not None
    kinds: dict[Any, list[tuple[int, int]]] = {}
    for x, y in product(range(width), range(height)):
        last_row = x == width - 1 and p.rows % tile.rows
        last_column = y == height - 1 and p.channels % tile.channels
        kinds.setdefault((x if p.gate else bool(last_row), bool(last_column)), []).append((x, y))
    return [Unit(_parts(*places[0], depth), len(places)) for places in kinds.values()]


def _parts(x: int, y: int, depth: int) -> tuple[Block, ...]:
    return tuple((x, y, z) for z in range(depth))


@functools.cache
def _hot_lines(kernel: str) -> list[range]:
    """Lines of a kernel's PTX that its main loop and the steps behind it take: of a GEMM from the beginning of the loop
    that multiplies to the last matrix instruction, of another kernel its innermost loops."""
    from tests.ptxsim.cuda_sources import only, source_ptx

    text = only(source_ptx(kernel), kernel)
    loops = ptx_loops(text)
    if gemm_tile(kernel) is None:
        return loops
    lines = [number for number, line in enumerate(text.splitlines(), 1) if is_product(line)]
    multiplying = [loop for loop in loops if any(number in loop for number in lines)]
    return [range(min(loop.start for loop in multiplying), lines[-1] + 1)]


def emulate(launch: Launch, whole: bool = False, hazards: str = "off") -> Traffic:
    """Run a launch, or parts that stand for all of it (:func:`units`), in the emulator.

    Results of blocks that are not run stay as they were, so that kernels behind this one may read garbage.

    Raises:
        RuntimeError: this is not a checkout of the repository, or there is no nvcc.
    """
    emulation()
    from tests.ptxsim.cuda_launcher import EmulatedDevice
    from tests.ptxsim.errors import PTXError

    traffic = Traffic(math.prod(launch.grid))
    try:
        for unit in units(launch, whole):
            device = EmulatedDevice(hazards=hazards, ctas=list(unit.blocks))
            device(launch)
            [executed] = device.records
            traffic.add(executed.result, _hot_lines(launch.name), unit.count)
    except PTXError as error:
        raise RuntimeError(str(error)) from error
    return traffic
