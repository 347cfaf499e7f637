"""Memory of a launch: bounds, alignment, traffic, and cp.async.

Addresses are arrays with one entry per thread. A space is "global", "const", "shared", "local", "kparam" (kernel
parameters) or "generic"; see ptx_types.py for their layout.
"""

from __future__ import annotations

import dataclasses
import mmap
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.ptxsim.errors import UnsupportedInstruction
from tests.ptxsim.ptx_types import (
    GLOBAL_BASE,
    LOCAL_WINDOW,
    PARAM_WINDOW,
    RED_ZONE,
    SHARED_BASE,
    SHARED_WINDOW,
    WINDOW_BYTES,
)

if TYPE_CHECKING:
    from tests.ptxsim.machine import Machine
    from tests.ptxsim.syntax import Instruction

POISON = 0xE7  # global memory outside of the arguments
POISON_SHARED = 0xA5  # shared and local memory before it is written
POISON_PENDING = 0xCD  # shared memory while a cp.async is on its way


@dataclasses.dataclass(frozen=True)
class Allocation:
    """``size`` bytes at ``offset`` of the global buffer."""

    name: str
    offset: int
    size: int

    def distance(self, offset: int) -> int:
        end = self.offset + self.size
        return 0 if self.offset <= offset < end else min(abs(offset - self.offset), abs(offset - end))


class GlobalMemory:
    """One flat byte buffer with all allocations and red zones between them.

    ``owner``: for each byte the number of its allocation, counted from 1, or 0 where no access is allowed.
    """

    def __init__(self) -> None:
        self.allocations: list[Allocation] = []
        self.size = RED_ZONE
        self.buffer = self.owner = np.zeros(0, np.uint8)

    def reserve(self, name: str, size: int, align: int = 256) -> int:
        """Offset of a new allocation."""
        offset = -(-self.size // align) * align
        self.allocations.append(Allocation(name, offset, size))
        self.size = offset + size + RED_ZONE
        return offset

    def build(self, windows: dict[int, list[tuple[int, int]]], between_processes: bool) -> None:
        """Make the buffer. ``windows``: by offset of an allocation, the (begin, end) that may be touched, else all."""
        self.size = -(-(self.size + 256) // 256) * 256
        raw = mmap.mmap(-1, self.size) if between_processes else bytearray(self.size)
        self.buffer = np.frombuffer(raw, dtype=np.uint8)
        self.buffer[:] = POISON
        self.owner = np.zeros(self.size, dtype=np.uint16)
        for number, allocation in enumerate(self.allocations, 1):
            whole = [(allocation.offset, allocation.offset + allocation.size)]
            for begin, end in windows.get(allocation.offset, whole):
                self.owner[begin:end] = number

    def allowed(self, offset: int, size: int) -> bool:
        if offset < 0 or offset + size > self.size:
            return False
        owner = self.owner[offset : offset + size]
        return bool(owner[0] != 0 and (owner == owner[0]).all())

    def describe(self, offset: int) -> str:
        """Where an offset lies, for people."""
        if not 0 <= offset < self.size or not self.allocations:
            return f"not inside any allocation (address 0x{offset + GLOBAL_BASE:x})"
        nearest = min(self.allocations, key=lambda allocation: allocation.distance(offset))
        if offset < nearest.offset:
            return f"{nearest.offset - offset} bytes before the start of {nearest.name} ({nearest.size} bytes)"
        return f"byte offset {offset - nearest.offset} of {nearest.name}, which has {nearest.size} bytes"


@dataclasses.dataclass
class AsyncCopy:
    """A cp.async on its way: ``data`` reaches shared memory when its threads wait for their group."""

    instruction: Instruction
    threads: np.ndarray
    group: np.ndarray
    offsets: np.ndarray
    size: int
    data: np.ndarray

    def part(self, chosen: np.ndarray) -> AsyncCopy:
        return dataclasses.replace(
            self,
            threads=self.threads[chosen],
            group=self.group[chosen],
            offsets=self.offsets[chosen],
            data=self.data[chosen],
        )


class Memory:
    """Accesses of the threads of a :class:`Machine`."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.in_flight: list[AsyncCopy] = []
        self.committed = np.zeros(machine.threads, np.int64)  # groups committed by each thread

    # -------------------------------------------------------------------------------- checks
    def _align(self, instruction: Instruction, threads: np.ndarray, address: np.ndarray, size: int, space: str) -> None:
        bad = (address & (size - 1)) != 0
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            self.machine.fault(
                instruction,
                threads[first],
                f"misaligned {space} address 0x{int(address[first]):x} for a {size}-byte access",
            )

    def global_offsets(
        self,
        instruction: Instruction,
        threads: np.ndarray,
        address: np.ndarray,
        size: int,
        what: str,
        store: bool | None = None,
    ) -> np.ndarray:
        """Offsets into the global buffer, checked; booked as traffic unless ``store`` is None."""
        memory = self.machine.global_memory
        offsets = address.view(np.int64) - GLOBAL_BASE
        self._align(instruction, threads, offsets, size, "global")
        bad = (offsets < 0) | (offsets > memory.size - size)
        if not bad.any():
            owner = memory.owner[offsets]
            bad = (owner == 0) | (owner != memory.owner[offsets + (size - 1)])
            if not bad.any():
                if store is not None:
                    self.machine.counters.global_access(
                        instruction, threads, offsets, size, store, self.machine.threads
                    )
                return offsets
        first = int(np.flatnonzero(bad)[0])
        self.machine.fault(
            instruction,
            threads[first],
            f"out-of-bounds global {what} of {size} bytes: address 0x{int(address[first]):x} is "
            f"{memory.describe(int(offsets[first]))}; {int(bad.sum())} of {len(threads)} active threads affected",
        )

    def shared_offsets(
        self, instruction: Instruction, threads: np.ndarray, address: np.ndarray, size: int, what: str
    ) -> np.ndarray:
        """Offsets within the block's shared memory, checked."""
        offsets = address.astype(np.int64) - SHARED_BASE
        self._align(instruction, threads, offsets, size, "shared")
        limit = self.machine.shared_bytes
        bad = (offsets < 0) | (offsets > limit - size)
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            self.machine.fault(
                instruction,
                threads[first],
                f"out-of-bounds shared {what} of {size} bytes at window address {int(address[first])}: this block has "
                f"bytes [{SHARED_BASE}, {SHARED_BASE + limit}); {int(bad.sum())} threads affected",
            )
        return offsets

    def in_all_blocks(self, offsets: np.ndarray, threads: np.ndarray) -> np.ndarray:
        """Offsets within a block to offsets into the shared memory of all blocks."""
        return offsets + self.machine.block_of[threads] * self.machine.shared_stride

    def _local_offsets(
        self, instruction: Instruction, threads: np.ndarray, address: np.ndarray, size: int
    ) -> np.ndarray:
        offsets = address.astype(np.int64)
        self._align(instruction, threads, offsets, size, "local")
        bad = (offsets < 16) | (offsets > self.machine.local_bytes - size)
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            message = f"out-of-bounds local access of {size} bytes at {int(address[first])}"
            self.machine.fault(instruction, threads[first], message)
        return offsets + threads.astype(np.int64) * self.machine.local_bytes

    @staticmethod
    def spaces(address: np.ndarray) -> list[tuple[str, np.ndarray, np.ndarray]]:
        """Generic addresses by space: (space, which threads, addresses in that space)."""
        out = []
        rest = np.ones(len(address), bool)
        for space, base in (("shared", SHARED_WINDOW), ("local", LOCAL_WINDOW), ("kparam", PARAM_WINDOW)):
            inside = (address >= base) & (address < base + WINDOW_BYTES)
            if inside.any():
                out.append((space, inside, address[inside] - np.uint64(base)))
                rest &= ~inside
        if rest.any():
            out.append(("global", rest, address[rest]))
        return out

    # -------------------------------------------------------------------------------- loads and stores
    def load(
        self,
        instruction: Instruction,
        space: str,
        mask: np.ndarray | None,
        address: np.ndarray,
        size: int,
        dtype: Any,
        count: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Threads that load and their values (n, count); ``size`` bytes each."""
        threads = self.machine.active(mask)
        address = np.broadcast_to(address, self.machine.threads)[threads]
        if space != "generic":
            return threads, self._load(instruction, space, threads, address, size, dtype, count)
        values = np.empty((len(threads), count), dtype)
        for part, chosen, inside in self.spaces(address):
            values[chosen] = self._load(instruction, part, threads[chosen], inside, size, dtype, count)
        return threads, values

    def _load(
        self,
        instruction: Instruction,
        space: str,
        threads: np.ndarray,
        address: np.ndarray,
        size: int,
        dtype: Any,
        count: int,
    ) -> np.ndarray:
        machine = self.machine
        if space in ("global", "const"):
            buffer = machine.global_memory.buffer
            store = False if space == "global" else None
            offsets = self.global_offsets(instruction, threads, address.astype(np.uint64), size, "load", store)
        elif space == "shared":
            buffer = machine.shared
            offsets = self.shared_offsets(instruction, threads, address, size, "load")
            machine.counters.shared_access(instruction, threads, offsets, size, "sld", machine.threads)
            offsets = self.in_all_blocks(offsets, threads)
            if machine.races is not None:
                machine.races.check(instruction, offsets, size, threads, False)
        elif space == "local":
            buffer, offsets = machine.local, self._local_offsets(instruction, threads, address, size)
        elif space == "kparam":
            buffer, offsets = machine.parameters, address.astype(np.int64)
            if (offsets < 0).any() or (offsets + size > len(buffer)).any():
                machine.fault(instruction, threads[0], "kernel parameter access outside the parameter block")
        else:
            raise UnsupportedInstruction(f"load from .{space}")
        values = buffer.reshape(-1, size)[offsets // size].view(dtype)
        return values[:, :count] if count > 1 else values

    def store(
        self,
        instruction: Instruction,
        space: str,
        mask: np.ndarray | None,
        address: np.ndarray,
        size: int,
        values: np.ndarray,
    ) -> None:
        """``values``: (threads, count) of the element type, for all threads."""
        threads = self.machine.active(mask)
        address = np.broadcast_to(address, self.machine.threads)[threads]
        values = values[threads]
        if space != "generic":
            self._store(instruction, space, threads, address, size, values)
            return
        for part, chosen, inside in self.spaces(address):
            self._store(instruction, part, threads[chosen], inside, size, values[chosen])

    def _store(
        self,
        instruction: Instruction,
        space: str,
        threads: np.ndarray,
        address: np.ndarray,
        size: int,
        values: np.ndarray,
    ) -> None:
        machine = self.machine
        data = np.ascontiguousarray(values).view(np.uint8).reshape(-1, size)
        if space == "global":
            offsets = self.global_offsets(instruction, threads, address.astype(np.uint64), size, "store", True)
            machine.global_memory.buffer.reshape(-1, size)[offsets // size] = data
        elif space == "shared":
            offsets = self.shared_offsets(instruction, threads, address, size, "store")
            machine.counters.shared_access(instruction, threads, offsets, size, "sst", machine.threads)
            self.write_shared(instruction, threads, self.in_all_blocks(offsets, threads), size, data)
        elif space == "local":
            offsets = self._local_offsets(instruction, threads, address, size)
            machine.local.reshape(-1, size)[offsets // size] = data
        else:
            raise UnsupportedInstruction(f"store to .{space}")

    def write_shared(
        self, instruction: Instruction, threads: np.ndarray, offsets: np.ndarray, size: int, data: np.ndarray
    ) -> None:
        """Write (n, size) bytes at checked offsets, through the race detector."""
        rows, row = self.machine.shared.reshape(-1, size), offsets // size
        if self.machine.races is None:
            rows[row] = data
            return
        before = rows[row]
        rows[row] = data
        self.machine.races.check(
            instruction, offsets, size, threads, True, unchanged=before == data, as_written=rows[row] == data
        )

    # -------------------------------------------------------------------------------- cp.async
    def copy_async(
        self,
        instruction: Instruction,
        mask: np.ndarray | None,
        destination: np.ndarray,
        source: np.ndarray,
        size: int,
        source_size: np.ndarray,
    ) -> None:
        """Start cp.async; bytes beyond ``source_size`` become zero (PTX ISA, "cp.async")."""
        machine = self.machine
        threads = machine.active(mask)
        destination, source, source_size = (
            np.broadcast_to(operand, machine.threads)[threads] for operand in (destination, source, source_size)
        )
        to = self.shared_offsets(instruction, threads, destination, size, "cp.async write")
        if (source_size > size).any():
            machine.fault(instruction, threads[0], "cp.async src-size larger than cp-size")
        taken, source = source_size.astype(np.int64), source.astype(np.uint64)
        data = np.zeros((len(threads), size), np.uint8)
        full = taken == size
        if full.any():
            offsets = self.global_offsets(instruction, threads[full], source[full], size, "cp.async read", False)
            data[full] = machine.global_memory.buffer.reshape(-1, size)[offsets // size]
        partial = np.flatnonzero((taken > 0) & ~full)
        for i in partial:
            data[i, : taken[i]] = self._partial_source(instruction, threads[i], int(source[i]), int(taken[i]), size)
        if len(partial):
            machine.counters.stat["gld_bytes"] += int(taken[partial].sum())
            machine.counters.stat["gld_sectors"] += len(partial)
        machine.counters.shared_access(instruction, threads, to, size, "cpasync", machine.threads)
        to = self.in_all_blocks(to, threads)
        if machine.races is not None:
            machine.races.check(instruction, to, size, threads, True)
            machine.races.book_pending(instruction, to, size)
        machine.shared.reshape(-1, size)[to // size] = POISON_PENDING
        self.in_flight.append(AsyncCopy(instruction, threads, self.committed[threads], to, size, data))

    def _partial_source(self, instruction: Instruction, thread: int, address: int, taken: int, size: int) -> np.ndarray:
        memory, offset = self.machine.global_memory, address - GLOBAL_BASE
        if address % size:
            self.machine.fault(instruction, thread, f"misaligned cp.async source 0x{address:x}")
        if not memory.allowed(offset, taken):
            message = f"out-of-bounds global cp.async read of {taken} bytes: address 0x{address:x} is "
            self.machine.fault(instruction, thread, message + memory.describe(offset))
        return memory.buffer[offset : offset + taken]

    def commit(self, mask: np.ndarray | None) -> None:
        """cp.async.commit_group"""
        self.committed[slice(None) if mask is None else mask] += 1

    def wait(self, mask: np.ndarray | None, may_stay: int | None) -> None:
        """cp.async.wait_group: at most ``may_stay`` groups of a thread stay in flight; None: wait_all, all arrive."""
        rest = []
        for copy in self.in_flight:
            arrives = np.ones(len(copy.threads), bool) if mask is None else mask[copy.threads]
            if may_stay is not None:
                arrives = arrives & (copy.group < self.committed[copy.threads] - may_stay)
            if not arrives.any():
                rest.append(copy)
                continue
            offsets = copy.offsets[arrives]
            self.machine.shared.reshape(-1, copy.size)[offsets // copy.size] = copy.data[arrives]
            if self.machine.races is not None:
                self.machine.races.book_arrived(offsets, copy.size, copy.threads[arrives])
            if not arrives.all():
                rest.append(copy.part(~arrives))
        self.in_flight = rest
