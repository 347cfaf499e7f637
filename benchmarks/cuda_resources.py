"""The resource table's lines of the CUDA backend: every kernel of the compiled module, by architecture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ptq4arvg_kernels.backends.cuda import native

from .cuda_compiled import compiled, examine, files_of
from .cuda_tiles import UNPACK_PUBLISHED, GemmTile, gemm_tile, info_of, shared_bytes
from .linear_launches import SHAPE_ROWS, all_shapes
from .sass import HotLoop, tile_macs

WEIGHTS_PER_BRICK = 64  # of a lane: 32 channels x 64 k by 32 lanes
SLOT_TILE = 16  # of csrc/cuda/attention_tile.h: a warp's ring holds keys and values of so many slots per stage
ATTENTION_SHAPES = ((2, 1), (32, 1), (3200, 1), (32, 16), (3200, 16))  # pairs, queries


def _attention_shared(kernel: str, arch: int) -> list[int]:
    """Dynamic shared memory of an attention kernel, of plans for few and many sequences."""
    lanes = int(kernel.rpartition("_d")[2])
    stages = 2 if lanes == 256 else 3
    plan = native.module().plan_attention
    found = set()
    for pairs, queries in ATTENTION_SHAPES:
        if (queries == 1) == kernel.startswith("decode"):
            _, _, warps, _ = plan(pairs, queries, 257, lanes, info_of(arch))
            found.add(warps * stages * 2 * SLOT_TILE * lanes)
    return sorted(found)


def _dynamic(kernel: str, arch: int) -> list[int]:
    if gemm_tile(kernel) is not None:
        shapes = [(m, shape.n, shape.k) for shape in all_shapes() for m in SHAPE_ROWS]
        return shared_bytes(kernel, shapes, arch)
    if kernel.startswith(("decode_d", "block_attention_d")):
        return _attention_shared(kernel, arch)
    return []


def _loop(tile: GemmTile, loop: HotLoop) -> dict[str, Any]:
    """The line's figures of a main loop; ``floor`` by formula, see :mod:`.cuda_tiles`."""
    floor, total = tile.floor(), loop.total / loop.iterations
    published = sum(tile.floor(UNPACK_PUBLISHED).values())
    warps, macs = tile.warps, tile.macs_per_step
    return {
        "w_bits": tile.bits,
        "sass_per_iteration": total,
        "sass": {name: round(count, 2) for name, count in loop.per_iteration().items()},
        "matrix": loop.matrix,
        "unrolled": loop.iterations,
        "products_over_tile": tile_macs(loop.matrix, warps, tile.rows, tile.channels) / macs / loop.iterations,
        "sass_per_kmac": round(1000 * total * warps / macs, 4),
        "floor": floor,
        "floor_per_kmac": round(1000 * sum(floor.values()) * warps / macs, 4),
        "over_floor": round(total / sum(floor.values()), 4),
        "over_published_floor": round(total / published, 4),
    }


def row(kernel: str, arch: int) -> dict[str, Any]:
    """The table's line of a kernel."""
    tile, found, dynamic = gemm_tile(kernel), examine(kernel, arch), _dynamic(kernel, arch)
    line: dict[str, Any] = {
        "backend": "cuda",
        "kernel": kernel,
        "tile": "" if tile is None else tile.name(),
        "variant": "",
        "arch": arch,
        "registers": found.registers,
        "spill_bytes": found.spill_bytes,
        "shared_bytes": found.shared_bytes + max(dynamic, default=0),
        "least_shared_bytes": found.shared_bytes + min(dynamic, default=0),
    }
    if tile is not None:
        assert found.hot_loop is not None
        line |= {"output": tile.output, "norm": tile.norm, "threads": tile.threads, **_loop(tile, found.hot_loop)}
    return line


def with_unpacking(rows: Sequence[dict[str, Any]]) -> None:
    """Add ``unpack_per_weight`` to lines of 6-bit GEMMs: instructions of a lane for a weight that their loop has over
    that of the same tile in 8 bits, which has a load and a copy more per brick."""
    loops = {(line["arch"], line["kernel"]): line["sass_per_iteration"] for line in rows if "sass" in line}
    for line in rows:
        other = loops.get((line["arch"], line["kernel"].replace("_w6_", "_w8_")))
        if line.get("w_bits") == 6 and other is not None:
            tile = gemm_tile(line["kernel"])
            assert tile is not None
            more = line["sass_per_iteration"] - other + 2 * tile.depth
            line["unpack_per_weight"] = round(more / (WEIGHTS_PER_BRICK * tile.depth), 4)


def measure(archs: Sequence[int], kernels: Sequence[str] = ()) -> Iterator[list[dict[str, Any]]]:
    """Yields the lines of an architecture, one per kernel, in the order of ``archs``.

    Args:
        kernels: beginnings of the names of the kernels; empty for all.

    Raises:
        RuntimeError: the compiled module or nvcc is missing, or nvcc fails.
    """
    wanted = [name for name in native.module().kernels() if not kernels or name.startswith(tuple(kernels))]
    for arch in archs:
        compiled([arch], files_of(wanted))
        found = [row(kernel, arch) for kernel in wanted]
        with_unpacking(found)
        yield found
