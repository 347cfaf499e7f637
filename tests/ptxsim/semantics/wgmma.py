"""wgmma.mma_async (PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions").

Executes when it is issued, and books its reads of shared memory on the first warp of the warpgroup: a missing
wgmma.wait_group or fence.proxy.async is not found.
"""

from __future__ import annotations

import numpy as np

from tests.ptxsim.errors import ExecError, PTXError
from tests.ptxsim.semantics.addresses import items, whole_warps
from tests.ptxsim.semantics.decoder import Decoder, Execute
from tests.ptxsim.semantics.mma import ELEMENT_BITS, INT32, decode, fragment_a
from tests.ptxsim.syntax import Vector

CHUNK = 16  # bytes that a swizzle moves as one
SWIZZLE_WIDTH = {0: 16, 1: 128, 2: 64, 3: 32}  # by the descriptor's mode: bytes of a row
SWIZZLE_MASK = {1: 7, 2: 3, 3: 1}
TYPES = ("s8", "u8", "f16", "bf16", "tf32", "e4m3", "e5m2")


class _SharedOperand:
    """A matrix in shared memory, found through a 64-bit descriptor (PTX ISA, "Matrix Descriptor Format"): bits 0-13
    start, 16-29 leading and 32-45 stride byte offset, each in units of 16 bytes, 62-63 swizzle mode.

    ``transposed``: of 16-bit types the matrix may lie MN-major, that is, with rows along K.
    """

    def __init__(self, op: Decoder, rows: int, inner: int, ty: str, transposed: bool) -> None:
        self.op, self.ty, self.transposed = op, ty, transposed
        row_bytes = inner * ELEMENT_BITS[ty] // 8
        self.shape = (inner, 2 * rows) if transposed else (rows, row_bytes)
        self.row = np.arange(self.shape[0])[None, :, None]
        self.chunk = np.arange(0, self.shape[1], CHUNK)[None, None, :]

    def read(self, descriptor: np.ndarray, groups: np.ndarray) -> np.ndarray:
        """(warpgroups, rows, K) elements, or (warpgroups, K, rows) of a transposed one."""
        machine = self.op.machine
        addresses = self._addresses(descriptor.astype(np.int64)).reshape(-1)
        threads = np.repeat(groups * 128, len(addresses) // len(groups))
        offsets = machine.memory.shared_offsets(self.op.instruction, threads, addresses, CHUNK, "wgmma read")
        offsets = machine.memory.in_all_blocks(offsets, threads)
        machine.counters.stat["wgmma_smem_bytes"] += len(threads) * CHUNK
        if machine.races is not None:
            machine.races.check(self.op.instruction, offsets, CHUNK, threads, False)
        data = machine.shared.reshape(-1, CHUNK)[offsets // CHUNK].reshape(len(groups), *self.shape)
        return decode(data, self.ty)

    def _addresses(self, descriptor: np.ndarray) -> np.ndarray:
        """Of every 16-byte chunk: (warpgroups, rows, chunks)."""
        start, leading, stride = ((((descriptor >> shift) & 0x3FFF) << 4)[:, None, None] for shift in (0, 16, 32))
        if ((descriptor >> 49) & 7).any():
            raise self.op.unsupported(" with a descriptor base offset")
        mode = int((descriptor[0] >> 62) & 3)
        width = SWIZZLE_WIDTH[mode]
        group, within = self.chunk // width, self.chunk % width
        if self.transposed:
            across, down = (stride, leading) if mode == 0 else (leading, stride)
        elif mode == 0:
            across, down = leading, stride
        else:  # a row along K lies within one swizzled row
            across, down, within = 0, stride, self.chunk
        address = start + group * across + (self.row // 8) * down + (self.row % 8) * width + within
        return address ^ (((address >> 7) & SWIZZLE_MASK[mode]) << 4) if mode else address


def wgmma(op: Decoder) -> Execute:
    """D = A*B or D += A*B of a warpgroup: D 64 x N in registers, A there or in shared memory, B in shared memory."""
    if op.flag("fence", "commit_group", "wait_group"):
        op.modifiers.clear()
        return lambda mask: None
    op.flags("mma_async", "sync", "aligned")
    shape, saturating = op.modifiers.pop(0), bool(op.flag("satfinite"))
    type_d, type_a, type_b = op.modifiers[-3:]
    del op.modifiers[-3:]
    if not shape.startswith("m64n") or type_a not in TYPES or type_d not in ("s32", "f32"):
        raise op.unsupported()
    columns, inner = (int(number) for number in shape[4:].split("k"))
    machine = op.machine
    if machine.warps_per_block % 4:
        raise PTXError("wgmma needs whole warpgroups")
    d = [machine.destination(item, "b32") for item in items(op.operands[0])]
    if len(d) != columns // 2:
        raise PTXError(f"{op.instruction.opcode}: {len(d)} accumulators instead of {columns // 2}")
    a_in_registers = isinstance(op.operands[1], Vector)
    accumulate = op.predicate(3)
    flags = [operand.value for operand in op.operands[4:]]
    if any(sign != 1 for sign in flags[:2]):
        raise op.unsupported(" with negated operands")
    transposed = [bool(flag) for flag in flags[2:]]
    b_transposed = bool(transposed and transposed[-1])
    a_transposed = len(transposed) == 2 and transposed[0]
    a_registers = [machine.source(item, "b32") for item in items(op.operands[1])] if a_in_registers else []
    a_descriptor = None if a_in_registers else op.source(1, "u64")
    b_descriptor = op.source(2, "u64")
    a_shared = _SharedOperand(op, 64, inner, type_a, a_transposed)
    b_shared = _SharedOperand(op, columns, inner, type_b, b_transposed)
    dtype = np.int32 if type_d == "s32" else np.float32

    def operand_a(warps: np.ndarray, groups: np.ndarray) -> np.ndarray:
        if a_descriptor is None:
            words = np.stack([op.broadcast(source).reshape(-1, 32)[warps].reshape(-1) for source in a_registers])
            return fragment_a(words, len(warps), 16, type_a).reshape(len(groups), 64, inner)
        values = a_shared.read(op.broadcast(a_descriptor)[groups * 128], groups)
        return values.swapaxes(1, 2) if a_transposed else values

    def execute(mask: np.ndarray | None) -> None:
        warps = whole_warps(op, mask)
        if len(warps) % 4 or (warps[::4] % 4).any():
            machine.fault(op.instruction, int(warps[0]) * 32, "wgmma executed by a part of a warpgroup", ExecError)
        groups = warps[::4] // 4
        right = b_shared.read(op.broadcast(b_descriptor)[groups * 128], groups)
        product = np.matmul(operand_a(warps, groups), right if b_transposed else right.swapaxes(1, 2))
        # Register 4*j + 2*h + l of warp v: row 16 v + g + 8 h, column 8 j + 2 t + l, of lane 4 g + t.
        product = product.reshape(len(groups), 4, 2, 8, columns // 8, 4, 2)
        words = product.transpose(4, 2, 6, 0, 1, 3, 5).reshape(columns // 2, -1)
        keep = op.broadcast(accumulate()).reshape(-1, 32)[warps].reshape(-1)
        for destination, word in zip(d, words, strict=True):
            register = destination.view(dtype).reshape(-1, 32)
            before = np.where(keep, register[warps].reshape(-1), dtype(0))
            if dtype == np.float32:
                result = (word + before).astype(dtype)
            elif saturating:
                result = np.clip(word.astype(np.int64) + before, *INT32).astype(dtype)
            else:
                result = word.astype(dtype) + before
            register[warps] = result.reshape(-1, 32)

    return execute


HANDLERS = {"wgmma": wgmma}
