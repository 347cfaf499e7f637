"""ldmatrix, stmatrix, movmatrix: 8x8 matrices of 16-bit elements, rows of 16 bytes (PTX ISA, "Warp-level Matrix
Instructions"). Lane l holds the elements 2*(l%4) and 2*(l%4)+1 of row l/4."""

from __future__ import annotations

import numpy as np

from tests.ptxsim.errors import PTXError
from tests.ptxsim.ptx_types import SHARED_WINDOW, WINDOW_BYTES
from tests.ptxsim.semantics.addresses import address, items, whole_warps
from tests.ptxsim.semantics.decoder import Decoder, Execute

ROW = 16  # bytes


def _modifiers(op: Decoder) -> tuple[int, bool]:
    """Number of matrices, and .trans"""
    op.flags("sync", "aligned", "shared", "shared::cta")
    shape, number = op.flag("m8n8"), int((op.flag("x1", "x2", "x4") or "x1")[1])
    transposed = bool(op.flag("trans"))
    if shape is None or op.type() != "b16":
        raise op.unsupported()
    return number, transposed


def _rows(op: Decoder, warps: np.ndarray, addresses: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Threads that supply row addresses, lane 8*i + r for row r of matrix i, and the rows' offsets, booked."""
    machine = op.machine
    threads = (warps[:, None] * 32 + np.arange(8 * number)).reshape(-1)
    rows = op.broadcast(addresses)[threads].astype(np.int64)
    generic = (rows >= SHARED_WINDOW) & (rows < SHARED_WINDOW + WINDOW_BYTES)
    rows = np.where(generic, rows - SHARED_WINDOW, rows)
    offsets = machine.memory.shared_offsets(op.instruction, threads, rows, ROW, op.base)
    machine.counters.shared_access(op.instruction, threads, offsets, ROW, op.base, machine.threads, phase=8)
    return threads, machine.memory.in_all_blocks(offsets, threads)


def load_matrix(op: Decoder) -> Execute:
    """ldmatrix"""
    number, transposed = _modifiers(op)
    machine = op.machine
    destinations = [machine.destination(item, "b32") for item in items(op.operands[0])]
    if len(destinations) != number:
        raise PTXError(f"ldmatrix.x{number} with {len(destinations)} destinations")
    where = address(op, op.operands[1], "shared")

    def execute(mask: np.ndarray | None) -> None:
        warps = whole_warps(op, mask)
        threads, offsets = _rows(op, warps, where(), number)
        if machine.races is not None:
            machine.races.check(op.instruction, offsets, ROW, threads, False)
        rows = machine.shared.reshape(-1, ROW)[offsets // ROW].reshape(len(warps), number, 8, ROW)
        if transposed:
            rows = np.ascontiguousarray(rows.view(np.uint16).swapaxes(2, 3))
        fragments = rows.view(np.uint32).reshape(len(warps), number, 32)
        for i, d in enumerate(destinations):
            d.reshape(-1, 32)[warps] = fragments[:, i]

    return execute


def store_matrix(op: Decoder) -> Execute:
    """stmatrix"""
    number, transposed = _modifiers(op)
    machine = op.machine
    sources = [machine.source(item, "b32") for item in items(op.operands[1])]
    where = address(op, op.operands[0], "shared")

    def execute(mask: np.ndarray | None) -> None:
        warps = whole_warps(op, mask)
        threads, offsets = _rows(op, warps, where(), number)
        rows = np.stack([op.broadcast(source).reshape(-1, 32)[warps] for source in sources], 1)
        if transposed:
            rows = rows.view(np.uint16).reshape(len(warps), number, 8, 8).swapaxes(2, 3)
        data = np.ascontiguousarray(rows).view(np.uint8).reshape(-1, ROW)
        machine.memory.write_shared(op.instruction, threads, offsets, ROW, data)

    return execute


def move_matrix(op: Decoder) -> Execute:
    """movmatrix: transpose one matrix held in registers."""
    op.flags("sync", "aligned", "m8n8", "trans")
    op.type()
    d, a = op.destination(0, "b32"), op.source(1, "b32")

    def execute(mask: np.ndarray | None) -> None:
        warps = whole_warps(op, mask)
        rows = np.ascontiguousarray(op.broadcast(a).reshape(-1, 32)[warps]).view(np.uint16).reshape(len(warps), 8, 8)
        d.reshape(-1, 32)[warps] = np.ascontiguousarray(rows.swapaxes(1, 2)).view(np.uint32).reshape(len(warps), 32)

    return execute


HANDLERS = {"ldmatrix": load_matrix, "stmatrix": store_matrix, "movmatrix": move_matrix}
