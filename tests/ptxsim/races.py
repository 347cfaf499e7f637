"""Race detector for shared memory: who wrote and read each byte last, and whether a barrier came between.

Vector clocks. Every warp has a clock that advances at its barriers; ``known[block, w, v]`` is the clock of warp v that
warp w has heard of through barriers. An access conflicts with an earlier one of another warp whose clock it has not
heard of (PTX ISA, "Memory Consistency Model": causality order through bar.sync). Bytes whose cp.async has not been
waited for by the thread that issued it may not be touched at all ("Asynchronous copy operations").
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tests.ptxsim.ptx_types import SHARED_BASE

if TYPE_CHECKING:
    from tests.ptxsim.machine import Machine
    from tests.ptxsim.syntax import Instruction

# Owners that are no single warp, in the same 8 bits.
SEVERAL, ATOMIC = 254, 253
NAMES = {SEVERAL: "(several)", ATOMIC: "(atomic)"}


class RaceDetector:
    """Shadow of the shared memory of all blocks of a batch, one cell per ``granule`` bytes.

    Attributes:
        writer, reader: clock << 8 | warp + 1 of the last access; 0 for none.
        writer_index, reader_index: the instructions that made them.
        pending: index + 1 of a cp.async that has not been waited for, or 0.
    """

    def __init__(self, machine: Machine, granule: int) -> None:
        cells = machine.blocks * machine.shared_stride // granule
        warps = machine.warps_per_block
        self.machine, self.granule = machine, granule
        self.writer, self.reader = np.zeros(cells, np.uint32), np.zeros(cells, np.uint32)
        self.writer_index, self.reader_index = np.zeros(cells, np.int32), np.zeros(cells, np.int32)
        self.pending = np.zeros(cells, np.int32)
        self.clock = np.ones((machine.blocks, warps), np.uint32)
        self.known = np.zeros((machine.blocks, warps, warps), np.uint32)
        self.partial = False  # a barrier that not all warps of a block take part in has been seen

    def rows(self, cells: np.ndarray, offsets: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Cells grouped by accesses of ``size`` bytes, and the group of each access."""
        per_access = max(size // self.granule, 1)
        return cells.reshape(-1, per_access), offsets // (per_access * self.granule)

    def owners(self, threads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Block and warp within the block of each thread."""
        warp = threads >> 5
        block = warp // self.machine.warps_per_block
        return block, warp - block * self.machine.warps_per_block

    # -------------------------------------------------------------------------------- barriers
    def barrier(self, block: int, warps: np.ndarray) -> None:
        """Join what ``warps`` (bool per warp) of a block know."""
        here = np.flatnonzero(warps)
        self.partial |= len(here) < self.machine.warps_per_block
        own = self.clock[block, here]
        joined = self.known[block, here].max(axis=0)
        joined[here] = np.maximum(joined[here], own)
        self.known[block, here] = joined
        self.clock[block, here] = own.max() + 1

    def barrier_all(self) -> None:
        """Every warp of every block, each block for itself."""
        self.known[:] = self.clock[:, None, :]
        self.clock[:] = self.clock.max(1, keepdims=True) + 1

    # -------------------------------------------------------------------------------- accesses
    def check(
        self,
        instruction: Instruction,
        offsets: np.ndarray,
        size: int,
        threads: np.ndarray,
        write: bool,
        atomic: bool = False,
        unchanged: np.ndarray | None = None,
        as_written: np.ndarray | None = None,
    ) -> None:
        """Report conflicts of an access and book it.

        Args:
            offsets: first byte of each access, in the shared memory of all blocks; multiples of ``size``.
            threads: who makes them.
            unchanged: per byte, whether a write leaves it as it was: writing the same value is no race.
            as_written: per byte, whether memory holds what this access wrote: two warps may write one value at once.
        """
        block, warp = self.owners(threads)
        mine = (warp + 1).astype(np.uint32)[:, None]
        me = np.uint32(ATOMIC + 1) if atomic else mine
        clock = self.clock[block, warp][:, None]
        writers, row = self.rows(self.writer, offsets, size)
        access = _Access(self, instruction, offsets, block, warp, row)

        pending = self.pending.reshape(writers.shape)[row]
        if pending.any():
            what = "write to" if write else "read of"
            text = f"{what} bytes whose cp.async has not been waited for"
            access.report("cp.async-pending", pending != 0, text, pending - 1, np.broadcast_to(mine, pending.shape))
        last_write = writers[row]
        if not write or atomic:
            never = (last_write == 0) & (pending == 0)
            if never.any():
                access.report("uninitialised", never, "read of shared bytes never written")
        owner = last_write & np.uint32(255)
        race = (last_write != 0) & (owner != me) & (owner != mine)
        race = self._unheard(race, last_write, owner, block, warp, clock)
        if write and unchanged is not None and not atomic and race.any():
            race &= ~unchanged.reshape(*race.shape, -1).all(2)
        if race.any():
            kind, what = ("race-WAW", "write") if write else ("race-RAW", "read")
            access.report(kind, race, what, self.writer_index.reshape(writers.shape)[row], owner)

        readers = self.reader.reshape(writers.shape)
        last_read = readers[row]
        reader = last_read & np.uint32(255)
        if not write:
            self._book_read(instruction, readers, row, last_read, reader, clock << np.uint32(8), mine)
            return
        race = (last_read != 0) & (reader != me) & (reader != mine)
        race = self._unheard(race, last_read, reader, block, warp, clock, by_others=True)
        if race.any():
            access.report("race-WAR", race, "write", self.reader_index.reshape(writers.shape)[row], reader)
        booked = np.broadcast_to((clock << np.uint32(8)) | me, last_write.shape)
        writers[row] = booked
        after = writers[row]
        if not atomic and len(threads) > 1 and (after != booked).any():  # two warps wrote the same byte in one step
            race = after != booked
            if as_written is not None:
                race &= ~as_written.reshape(*race.shape, -1).all(2)
            if race.any():
                others = np.full(race.shape, instruction.index)
                access.report("race-WAW", race, "write", others, after & np.uint32(255))
        self.writer_index.reshape(writers.shape)[row] = instruction.index

    def _unheard(
        self,
        race: np.ndarray,
        stamps: np.ndarray,
        owner: np.ndarray,
        block: np.ndarray,
        warp: np.ndarray,
        clock: np.ndarray,
        by_others: bool = False,
    ) -> np.ndarray:
        """``race`` without the accesses that a barrier has ordered before this one."""
        times = stamps >> np.uint32(8)
        if not self.partial:  # all warps of a block have the same clock
            return race & (times >= clock)
        if not race.any():
            return race
        known = self.known[block, warp]
        if by_others:
            known[np.arange(len(warp)), warp] = 1 << 30
        everyone = owner > ATOMIC  # atomics or several readers: ordered when every warp has been heard of
        single = np.minimum(owner.astype(np.int64) - 1, self.machine.warps_per_block - 1)
        heard = self.known[block[:, None], warp[:, None], single]
        return race & (times > np.where(everyone, known.min(1)[:, None], heard))

    def _book_read(
        self,
        instruction: Instruction,
        readers: np.ndarray,
        row: np.ndarray,
        last_read: np.ndarray,
        reader: np.ndarray,
        now: np.ndarray,
        mine: np.ndarray,
    ) -> None:
        shared = (reader != mine) & (last_read >= now) & (last_read != 0)
        booked = np.where(shared, now | np.uint32(SEVERAL + 1), now | mine)
        readers[row] = booked
        lost = readers[row] != booked
        if lost.any():  # several warps read the same byte in one step
            readers[row[lost.any(1)]] |= np.uint32(255)
        self.reader_index.reshape(readers.shape)[row] = instruction.index

    # -------------------------------------------------------------------------------- cp.async
    def book_pending(self, instruction: Instruction, offsets: np.ndarray, size: int) -> None:
        cells, row = self.rows(self.pending, offsets, size)
        cells[row] = instruction.index + 1

    def book_arrived(self, offsets: np.ndarray, size: int, threads: np.ndarray) -> None:
        """The bytes now count as written by the waiting warp: others need a barrier."""
        cells, row = self.rows(self.pending, offsets, size)
        cells[row] = 0
        block, warp = self.owners(threads)
        writers, _ = self.rows(self.writer, offsets, size)
        writers[row] = ((self.clock[block, warp] << np.uint32(8)) | (warp + 1).astype(np.uint32))[:, None]


class _Access:
    """What a report needs of the access being checked."""

    def __init__(
        self,
        detector: RaceDetector,
        instruction: Instruction,
        offsets: np.ndarray,
        block: np.ndarray,
        warp: np.ndarray,
        row: np.ndarray,
    ) -> None:
        self.detector, self.instruction, self.offsets = detector, instruction, offsets
        self.block, self.warp, self.row = block, warp, row

    def report(
        self, kind: str, bad: np.ndarray, what: str, other_index: Any = None, other_owner: np.ndarray | None = None
    ) -> None:
        """Describe the first bad cell; ``other_*``: instruction and warp it conflicts with."""
        machine, granule = self.detector.machine, self.detector.granule
        access, cell = (int(axis[0]) for axis in np.nonzero(bad))
        other, against = None, ""
        if other_index is not None and other_owner is not None:
            other = machine.program[int(other_index[access, cell])]
            warp = int(other_owner[access, cell]) - 1
            against = f" vs warp {NAMES.get(warp, warp)} {other.where()}"
        byte = int(self.offsets[access]) % machine.shared_stride + cell * granule + SHARED_BASE
        text = (
            f"{kind}: block {machine.block_ids[int(self.block[access])]} warp {int(self.warp[access])}, "
            f"shared byte {byte}: {what} at {self.instruction.where()}{against}"
        )
        machine.finding(kind, self.instruction, other, text, int(bad.sum()) * granule)
