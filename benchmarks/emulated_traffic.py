"""Counters of a launch from the PTX emulator, of the whole grid or of a part that stands for all of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from ptq4arvg_kernels.backends.triton.launch import Launch

from .loops import ptx_loops
from .triton_compiled import emulation
from .triton_launches import is_gemm

SECTOR = 32
Block = tuple[int, int, int]


@dataclass(frozen=True)
class Unit:
    """Thread blocks to run, and how many sets of blocks of the grid do the same as these."""

    blocks: tuple[Block, ...]
    count: int


def _grid(started: Launch) -> Block:
    x, y, z = [*started.grid, 1, 1][:3]
    return x, y, z


def tile_of(block: int, tiles_m: int, tiles_n: int, group_m: int) -> tuple[int, int]:
    """Row tile and column tile of a block of the GEMM, as ``gemm.tile_of`` computes them."""
    if group_m == 0:
        return 0, block
    group = block // (group_m * tiles_n)
    first = group * group_m
    height = min(tiles_m - first, group_m)
    inside = block - group * group_m * tiles_n
    return first + inside % height, inside // height


def units(started: Launch, whole: bool = False) -> list[Unit]:
    """Parts of a grid whose counters, times their counts, are those of the grid.

    GEMM: all parts along K of one tile, of each kind: inside, in a ragged last row tile, in a ragged last column tile,
    in both. Other kernels: blocks that differ in the first index only (a row, or a sequence and head) do the same on
    other data; every other one may begin in the middle of a sector, since rows are multiples of 16 bytes.

    What a kernel asks memory for does not depend on the data; the instructions of an error function do, by a percent.

    Args:
        whole: all blocks of the grid instead.
    """
    width, *others = _grid(started)
    depth = list(product(*(range(n) for n in others)))

    def blocks(x: int) -> tuple[Block, ...]:
        return tuple((x, y, z) for y, z in depth)

    if whole:
        return [Unit(tuple(block for x in range(width) for block in blocks(x)), 1)]
    if not is_gemm(started):
        return [Unit(blocks(x), (width + 1 - x) // 2) for x in range(min(2, width))]
    arguments, constants = started.arguments, started.constants
    last_m = arguments["tiles_m"] - 1 if arguments["M"] % constants["BM"] else None
    last_n = arguments["tiles_n"] - 1 if arguments["N"] % constants["BN"] else None
    kinds: dict[tuple[bool, bool], list[int]] = {}
    for x in range(width):
        m, n = tile_of(x, arguments["tiles_m"], arguments["tiles_n"], constants["GROUP_M"])
        kinds.setdefault((m == last_m, n == last_n), []).append(x)
    return [Unit(blocks(members[0]), len(members)) for members in kinds.values()]


@dataclass
class Traffic:
    """Counters of a launch, scaled to its grid.

    Attributes:
        blocks, emulated_blocks: of the grid, and executed.
        instructions: warp instructions of the PTX by class.
        load_bytes, store_bytes: that lanes asked global memory for, atomic operations among the stores.
        load_sectors, store_sectors: sectors of 32 bytes that these requests touch, warp by warp.
        wavefronts, ideal_wavefronts: of shared memory.
        loop_wavefronts, loop_ideal_wavefronts: those of the innermost loops.
    """

    blocks: int
    emulated_blocks: int = 0
    instructions: Counter[str] = field(default_factory=Counter)
    load_bytes: int = 0
    store_bytes: int = 0
    load_sectors: int = 0
    store_sectors: int = 0
    wavefronts: int = 0
    ideal_wavefronts: int = 0
    loop_wavefronts: int = 0
    loop_ideal_wavefronts: int = 0

    @property
    def bytes(self) -> int:
        return self.load_bytes + self.store_bytes

    @property
    def sector_bytes(self) -> int:
        return SECTOR * (self.load_sectors + self.store_sectors)

    def add(self, result: Any, loops: list[range], count: int) -> None:
        """Book ``count`` times the counters of an executed part."""
        stat = result.stat
        self.instructions.update({name: count * number for name, number in result.classes.items()})
        self.load_bytes += count * stat["gld_bytes"]
        self.store_bytes += count * stat["gst_bytes"]
        self.load_sectors += count * stat["gld_sectors"]
        self.store_sectors += count * stat["gst_sectors"]
        self.emulated_blocks += result.ctas
        for (line, _), (_, _, _, wavefronts, ideal) in result.lines.items():
            self.wavefronts += count * wavefronts
            self.ideal_wavefronts += count * ideal
            if any(line in loop for loop in loops):
                self.loop_wavefronts += count * wavefronts
                self.loop_ideal_wavefronts += count * ideal


def emulate(started: Launch, capability: int, whole: bool = False, hazards: str = "off") -> Traffic:
    """Run a launch, or parts that stand for all of it (:func:`units`), in the emulator.

    Results of blocks that are not run stay as they were, so that kernels behind this one may read garbage.
    """
    x, y, z = _grid(started)
    traffic = Traffic(x * y * z)
    for unit in units(started, whole):
        device = emulation().EmulatedDevice(capability, hazards=hazards, ctas=list(unit.blocks))
        device(started)
        [executed] = device.records
        traffic.add(executed.result, ptx_loops(executed.compiled.ptx), unit.count)
    return traffic
