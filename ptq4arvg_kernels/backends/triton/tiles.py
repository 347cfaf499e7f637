"""Choice of tiles: a pure function of a layer's shape and of what a device is, the same for production, tests, tables.

What was measured on the device comes first (:func:`tune`, or ``measured`` in tiles.json), then the tiles of its compute
capability in tiles.json, then those of :func:`_fallback`, with the heuristic below. They are shrunk until they fit into
the shared memory of a block.

The heuristic. Rows go into buckets of 16, 32, 64 and more. Every bucket has tiles from wide to narrow: the widest one
that keeps most multiprocessors busy is taken, because wide tiles read the operands less often. Where the device is
busy, BN > BM on sm_8x: Triton then lays the warps along N, and each unpacks its own weights (warps along M repeat it).
A grid that still leaves multiprocessors idle is split along K, as long as every part keeps ``MIN_STEPS`` K tiles:
shorter parts cost more in partial sums and in filling the pipeline than the idle multiprocessors would give.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..gpu import Device
from ..gpu_weights import padded
from .weights import K_TILE, N_ALIGN

BUCKETS: tuple[int, ...] = (16, 32, 64)
LARGE = 128  # the bucket of more rows than those
BUSY = 0.8
MIN_STEPS = 8
MAX_SPLIT = 16
GROUP_M = 8
RESERVED = 1024  # bytes kept free: the driver's share of a block, and scratch for reductions


@dataclass(frozen=True)
class Tile:
    """Tile ``[BM, BN]`` of the result, a step BK along K, warps of a block, stages of the pipeline."""

    bm: int
    bn: int
    bk: int
    num_warps: int
    num_stages: int

    def shared_bytes(self, bits: int, capability: int) -> int:
        """Shared memory of a block, at most: that of the pipeline, which the epilogue uses again to exchange the tile.

        The pipeline has one buffer less than stages. Where the matrix instructions read shared memory by themselves
        (wgmma, tcgen05), it has one more, and unpacked weights are written back to a tile of their own.
        """
        behind = capability // 10 in (9, 10)
        buffers = self.num_stages - (not behind)
        unpacked = self.bn * self.bk if behind and bits == 6 else 0
        return max(buffers * self.bk * (self.bm * 8 + self.bn * bits) // 8 + unpacked, 4 * self.bm * self.bn)


@dataclass(frozen=True)
class Plan:
    """How one product is launched.

    Attributes:
        tile: see :class:`Tile`.
        split: parts of K, each computed by a block of its own.
        tiles_m, tiles_n: tiles along the rows and the channels.
        steps: K tiles per part.
    """

    tile: Tile
    split: int
    tiles_m: int
    tiles_n: int
    steps: int

    @property
    def grid(self) -> tuple[int, int]:
        return self.tiles_m * self.tiles_n, self.split

    @property
    def group_m(self) -> int:
        """GROUP_M of the kernel; 0 says that there is one row tile."""
        return GROUP_M if self.tiles_m > 1 else 0

    def requested_bytes(self, rows: int, out_features: int, in_features: int, bits: int, written: int) -> int:
        """Bytes the blocks ask memory for: every row tile reads the packed weights of its columns once, every column
        tile the activations; ``written`` is the size of the results; the partial sums of a split are written by all
        parts and read by the last one."""
        weights = self.tiles_n * self.tile.bn * padded(in_features, K_TILE) * bits // 8
        partial = 4 * rows * self.tiles_n * self.tile.bn * (2 * self.split - 1 if self.split > 1 else 0)
        return self.tiles_m * weights + self.tiles_n * rows * in_features + written + partial


def bucket(rows: int) -> int:
    """16, 32, 64 or LARGE."""
    return next((limit for limit in BUCKETS if rows <= limit), LARGE)


def _fallback(bits: int) -> dict[int, tuple[Tile, ...]]:
    """Tiles for a compute capability that the table does not know, from wide to narrow."""
    return {
        16: (Tile(16, 64, 128, 4, 4), Tile(16, 32, 128, 2, 4)),
        32: (Tile(32, 64, 128, 4, 4),),
        64: (Tile(64, 128, 128, 4, 3),),
        LARGE: (Tile(64, 128, 128, 4, 3),),
    }


@functools.cache
def _file() -> dict[str, Any]:
    table = json.loads(Path(__file__).with_name("tiles.json").read_text())
    if table.get("format") != 1:
        raise ValueError(f"tiles.json has format {table.get('format')}, this version reads format 1")
    return table


def candidates(rows: int, bits: int, capability: int) -> tuple[Tile, ...]:
    """Tiles of a bucket, from wide to narrow: of the compute capability, or of its generation, or the fallback."""
    tables = _file()["tiles"]
    for name in (f"sm_{capability}", f"sm_{capability // 10 * 10}"):
        if name in tables:
            table = tables[tables[name]] if isinstance(tables[name], str) else tables[name]
            return tuple(Tile(*sizes) for sizes in table[f"w{bits}"][str(bucket(rows))])
    return _fallback(bits)[bucket(rows)]


def fitted(tile: Tile, bits: int, device: Device) -> Tile:
    """``tile`` with fewer stages, then narrower, until it fits into the shared memory of a block.

    Raises:
        ValueError: not even a tile of 16 channels without a pipeline fits.
    """
    limit = device.shared_bytes - RESERVED
    while tile.shared_bytes(bits, device.capability) > limit:
        if tile.num_stages > 2:
            tile = Tile(tile.bm, tile.bn, tile.bk, tile.num_warps, tile.num_stages - 1)
        elif tile.bn > 16:
            tile = Tile(tile.bm, tile.bn // 2, tile.bk, max(1, tile.num_warps // 2), tile.num_stages)
        else:
            raise ValueError(
                f"a tile of {tile.bm} rows needs {tile.shared_bytes(bits, device.capability)} bytes of shared memory, "
                f"{device.name or 'the device'} has {device.shared_bytes} per block; choose another backend"
            )
    return tile


def _inside(tile: Tile, out_features: int) -> bool:
    """Whether the last tile along N ends inside the packed weights."""
    return padded(out_features, tile.bn) <= padded(out_features, N_ALIGN)


def _with_split(tile: Tile, split: int, rows: int, out_features: int, in_features: int) -> Plan:
    tiles_k = padded(in_features, tile.bk) // tile.bk
    steps = -(-tiles_k // split)
    return Plan(tile, -(-tiles_k // steps), -(-rows // tile.bm), -(-out_features // tile.bn), steps)


def _parts(blocks: int, tiles_k: int, multiprocessors: int) -> int:
    """Parts of K: as many as fill the device once, none if it is busy already."""
    if blocks == 0 or blocks >= BUSY * multiprocessors:
        return 1
    return max(1, min(multiprocessors // blocks, tiles_k // MIN_STEPS, MAX_SPLIT))


def _key(rows: int, out_features: int, in_features: int, bits: int) -> str:
    return f"w{bits} {out_features}x{in_features} {bucket(rows)}"


_MEASURED: dict[tuple[str, str], tuple[Tile, int]] = {}


def _measured(rows: int, out_features: int, in_features: int, bits: int, device: Device) -> tuple[Tile, int] | None:
    key = _key(rows, out_features, in_features, bits)
    if (device.name, key) in _MEASURED:
        return _MEASURED[device.name, key]
    entry = _file()["measured"].get(device.name, {}).get(key)
    return None if entry is None else (Tile(*entry["tile"]), entry["split"])


@functools.lru_cache(maxsize=4096)
def plan(rows: int, out_features: int, in_features: int, bits: int, device: Device) -> Plan:
    """Tiles and grid for ``x [M, K] . w [N, K]^T``.

    Args:
        rows, out_features, in_features: M, N (both halves of a paired weight), K.
        bits: 6 or 8, of the weights.
        device: see :class:`Device`.
    """
    measured = _measured(rows, out_features, in_features, bits, device)
    if measured is not None:
        tile, split = fitted(measured[0], bits, device), measured[1]
        if not _inside(tile, out_features):
            raise ValueError(
                f"tiles.json: {_key(rows, out_features, in_features, bits)} of {device.name} has tiles of {tile.bn} "
                f"channels, the last of which would end behind the weights; measure again with tune"
            )
        return _with_split(tile, split, rows, out_features, in_features)
    chosen = None
    for tile in candidates(rows, bits, device.capability):
        tile = fitted(tile, bits, device)
        if not _inside(tile, out_features):
            continue
        chosen = _with_split(tile, 1, rows, out_features, in_features)
        if chosen.grid[0] >= BUSY * device.multiprocessors:
            break
    if chosen is None:
        raise ValueError(
            f"no tile for {rows} rows, {out_features} channels: tiles.json lists none of at most {N_ALIGN}"
        )
    tiles_k = padded(in_features, chosen.tile.bk) // chosen.tile.bk
    split = _parts(chosen.grid[0], tiles_k, device.multiprocessors)
    return _with_split(chosen.tile, split, rows, out_features, in_features)


def options(rows: int, out_features: int, in_features: int, bits: int, device: Device) -> list[Plan]:
    """Every plan for a shape that :func:`plan` could choose, and the splits around it."""
    found: dict[Plan, None] = {}
    for tile in candidates(rows, bits, device.capability):
        tile = fitted(tile, bits, device)
        if _inside(tile, out_features):
            for split in (1, 2, 3, 4, 6, 8, 12, 16):
                found[_with_split(tile, split, rows, out_features, in_features)] = None
    return list(found)


def tune(
    rows: int, out_features: int, in_features: int, bits: int, device: Device, time: Callable[[Plan], float]
) -> Plan:
    """Measure all :func:`options` for a shape and use the fastest from now on, in this process.

    Nothing calls this by itself: a first call never stalls, and a capture never tunes. The choice holds for the bucket
    of ``rows``; :func:`measurements` gives what to put into tiles.json. :func:`.linear.tune` times real launches.

    Args:
        time: seconds (or any measure that is smaller for a faster kernel) of a launch with a plan.

    Raises:
        RuntimeError: the current stream is being captured into a graph.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("tune: the current stream is being captured; measure before capturing the model")
    best = min(options(rows, out_features, in_features, bits, device), key=time)
    _MEASURED[device.name, _key(rows, out_features, in_features, bits)] = (best.tile, best.split)
    plan.cache_clear()
    return best


def measurements() -> dict[str, dict[str, Any]]:
    """What :func:`tune` found in this process, in the form of ``measured`` in tiles.json."""
    found: dict[str, dict[str, Any]] = {}
    for (name, key), (tile, split) in _MEASURED.items():
        found.setdefault(name, {})[key] = {"tile": list(asdict(tile).values()), "split": split}
    return found
