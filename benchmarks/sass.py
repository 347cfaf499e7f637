"""Machine code of compiled kernels: registers and spills, and the instructions of the loop that multiplies.

The tools are those that come with Triton (``cuobjdump``, ``nvdisasm``); no GPU takes part.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# Tensor-core instructions on 8-bit integers: per warp (sm_8x, sm_12x), per warpgroup (sm_90), per block (sm_100).
MATRIX = ("IMMA", "IGMMA", "UTCIMMA")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z][A-Z0-9_]*)((?:\.[\w]+)*)([^;]*);")
_LABEL = re.compile(r"^(\.L_[\w.]+|\.L[\w.]*):")
_TARGET = re.compile(r"`\((\.L[\w.]+)\)")
_RESOURCES = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Instruction:
    """One instruction: address in the function, name without modifiers, modifiers, label it branches to."""

    address: int
    name: str
    modifiers: str
    target: str | None


@dataclass(frozen=True)
class Listing:
    """The instructions of a function in order, and the addresses of its labels."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


@dataclass(frozen=True)
class Resources:
    """What a kernel takes: registers per thread; bytes per thread of its stack, where spilled registers go."""

    registers: int
    spill_bytes: int


@dataclass(frozen=True)
class Usage(Resources):
    """:class:`Resources` and static shared memory of a block, in bytes."""

    shared_bytes: int


@cache
def _tool(name: str) -> Path:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: this Triton comes without {name}; install triton from PyPI")
    return path


def _run(tool: str, arguments: Sequence[str], cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_tool(tool)), *arguments, file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{tool} failed: {done.stderr.strip()}")
    return done.stdout


def usage(cubin: bytes) -> dict[str, Usage]:
    """What the kernels of a cubin take, by name.

    Neither Triton's kernels nor ours have arrays of their own on the stack, so that all of it is spilled registers.

    Raises:
        RuntimeError: the tool failed or its answer has another form.
    """
    text = _run("cuobjdump", ["--dump-resource-usage"], cubin)
    found = _RESOURCES.findall(text)
    if not found or len(found) != text.count("REG:"):
        raise RuntimeError(f"cuobjdump --dump-resource-usage answers in another form than expected:\n{text}")
    return {
        name: Usage(int(reg), max(int(stack), int(local)), int(shared)) for name, reg, stack, shared, local in found
    }


def resources(cubin: bytes) -> Resources:
    """Registers and spilled bytes per thread of the one kernel in a cubin.

    Raises:
        RuntimeError: as :func:`usage`, or there are several kernels.
    """
    found = usage(cubin)
    if len(found) != 1:
        raise RuntimeError(f"the cubin has {len(found)} functions instead of one: {', '.join(found)}")
    [only] = found.values()
    return Resources(only.registers, only.spill_bytes)


def disassemble(cubin: bytes) -> str:
    """The text that nvdisasm prints for the code of a cubin."""
    return _run("nvdisasm", ["--print-code"], cubin)


def parse(text: str) -> Listing:
    """Instructions and labels of a disassembly with one function.

    Raises:
        ValueError: there are no instructions, or addresses do not grow (several functions).
    """
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    for line in text.splitlines():
        label = _LABEL.match(line.strip())
        if label is not None:
            waiting.append(label[1])
            continue
        found = _INSTRUCTION.match(line)
        if found is None:
            continue
        address = int(found[1], 16)
        if instructions and address <= instructions[-1].address:
            raise ValueError("the disassembly holds several functions; give one kernel at a time")
        labels.update(dict.fromkeys(waiting, address))
        waiting.clear()
        target = _TARGET.search(found[4])
        instructions.append(Instruction(address, found[2], found[3], None if target is None else target[1]))
    if not instructions:
        raise ValueError("the disassembly holds no instruction")
    return Listing(tuple(instructions), labels)


def loops(listing: Listing) -> list[tuple[int, int]]:
    """First and last address of every loop: what lies between a label and the last branch back to it. Inner ones first.

    An endless branch to itself, which fills the space behind a function, is no loop.
    """
    ends: dict[int, int] = {}
    for i in listing.instructions:
        if i.name in ("BRA", "BRX", "JMP") and i.target in listing.labels and listing.labels[i.target] < i.address:
            ends[listing.labels[i.target]] = i.address
    return sorted(ends.items(), key=lambda bounds: (bounds[1] - bounds[0], bounds[0]))


@dataclass(frozen=True)
class HotLoop:
    """The loop that multiplies.

    Attributes:
        counts: static instructions of the loop by name without modifiers, those of all its iterations.
        matrix: names with modifiers of its tensor-core instructions.
        iterations: K tiles per pass through the loop; ptxas may have unrolled it.
    """

    counts: dict[str, int]
    matrix: dict[str, int]
    iterations: int

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def per_iteration(self) -> dict[str, float]:
        """Instructions of one K tile by name."""
        return {name: count / self.iterations for name, count in self.counts.items()}


def matrix_macs(name: str) -> int | None:
    """Multiply-adds of a tensor-core instruction with its modifiers; None where the name does not say.

    ``IMMA.16832``: 16x8x32 of a warp. ``IGMMA.64x128x32``: of a warpgroup of four warps.
    """
    dense = re.search(r"IGMMA\.(\d+)x(\d+)x(\d+)", name)
    if dense is not None:
        return int(dense[1]) * int(dense[2]) * int(dense[3])
    return {"IMMA.16832": 16 * 8 * 32, "IMMA.16816": 16 * 8 * 16, "IMMA.8816": 8 * 8 * 16}.get(
        ".".join(name.split(".")[:2])
    )


def tile_macs(matrix: Mapping[str, int], warps: int, bm: int, bn: int) -> int:
    """Multiply-adds that a block does in one pass through a loop with these tensor-core instructions.

    Raises:
        ValueError: an instruction of unknown shape.
    """
    total = 0
    for name, count in matrix.items():
        if name.startswith("UTCIMMA"):  # issued once for the block, over at most 128 x 256 results and 32 of K
            total += count * min(bm, 128) * min(bn, 256) * 32
            continue
        macs = matrix_macs(name)
        if macs is None:
            raise ValueError(f"unknown shape of tensor-core instruction {name}")
        total += count * macs * (warps // 4 if name.startswith("IGMMA") else warps)
    return total


def hot_loop(listing: Listing, per_tile: int) -> HotLoop:
    """The innermost loop with tensor-core instructions; of several disjoint ones, the one that has most of them.

    Args:
        listing: the kernel.
        per_tile: tensor-core instructions of one K tile, from the PTX: ptxas unrolls loops, but keeps these one by one.

    Raises:
        ValueError: no loop multiplies, or it holds no whole number of K tiles.
    """
    best: tuple[int, tuple[int, int]] | None = None
    taken: list[tuple[int, int]] = []
    for first, last in loops(listing):
        if any(first <= a and b <= last for a, b in taken):
            continue  # an outer loop of one with products
        count = sum(i.name in MATRIX for i in listing.instructions if first <= i.address <= last)
        if count:
            taken.append((first, last))
            if best is None or count > best[0]:
                best = count, (first, last)
    if best is None:
        raise ValueError("no loop of this kernel holds a tensor-core instruction on 8-bit integers")
    first, last = best[1]
    inside = [i for i in listing.instructions if first <= i.address <= last]
    matrix = dict(Counter(i.name + i.modifiers for i in inside if i.name in MATRIX))
    products = sum(matrix.values())
    if per_tile < 1 or products % per_tile:
        raise ValueError(f"the loop has {products} tensor-core instructions {matrix}, a K tile in the PTX {per_tile}")
    return HotLoop(dict(Counter(i.name for i in inside).most_common()), matrix, products // per_tile)
