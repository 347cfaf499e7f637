"""Who runs next: uniform execution while all threads agree, else the lowest program counter; barriers.

Schedules: "lockstep" runs all warps of the batch together and is fast; "warp_serial", "warp_reverse" and "random" run
one warp at a time up to its next barrier, so that a missing barrier also shows in the numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptxsim.errors import DeadlockError, ExecError, PTXError
from tests.ptxsim.machine import Machine
from tests.ptxsim.program import BasicBlock, bind
from tests.ptxsim.semantics.control import HANDLED
from tests.ptxsim.syntax import Instruction

SCHEDULES = ("lockstep", "warp_serial", "warp_reverse", "random")
RUN, AT_BARRIER, WAITING, EXITED = 0, 1, 2, 3
CHECK_LIMITS = 4096  # steps between looks at the clock
# Every so many steps the highest program counter runs instead of the lowest, so that a loop which waits for threads
# behind it ends.
YIELD = 1024


class Scheduler:
    """Runs one machine to its end.

    Attributes:
        counter, state: of each thread; ``counter`` is only kept while threads disagree.
        alive: threads that have not exited; ``whole``: None if that is all, so that masks can be left out.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine, self.options = machine, machine.state.options
        self.counter = np.zeros(machine.threads, np.int32)
        self.state = np.where(machine.exists, RUN, EXITED).astype(np.int8)
        self.alive = machine.exists
        self.whole = None if self.alive.all() else self.alive.copy()
        self.barrier_number = np.zeros(machine.threads, np.int16)
        self.barrier_count = np.zeros(machine.threads, np.int32)
        self.barrier_value = np.zeros(machine.threads, np.uint32)  # predicates of bar.red
        self.on_release: Callable[[np.ndarray], None] | None = None
        self.arrived: dict[tuple[int, int], np.ndarray] = {}  # (block, barrier): threads that did bar.arrive
        self.blocks = bind(machine, self)

    # -------------------------------------------------------------------------------- main loop
    def run(self) -> None:
        lockstep = self.options.schedule == "lockstep"
        uniform, at, steps, begin = lockstep, 0, 0, time.monotonic()
        rng = np.random.default_rng(self.options.seed)
        end = len(self.machine.program)
        while True:
            steps += 1
            if steps % CHECK_LIMITS == 0:
                self._check_limits(steps, begin, at)
            if uniform:
                mask = self.whole
                if at >= end:
                    break
                block = self.blocks[at]
                if block.gather and mask is not None:
                    ready = self._gather(block, mask)
                    if ready is None or (ready != mask).any():
                        uniform = False
                        self.counter[:] = at
                        continue
            else:
                running = self.state == RUN
                if not running.any():
                    if (self.state == EXITED).all():
                        break
                    self._deadlock()
                candidates = running if lockstep else running & (self.machine.warp == self._pick(running, rng))
                counters = self.counter[candidates]
                at = int(counters.max() if steps % YIELD == 0 else counters.min())
                mask = candidates & (self.counter == at)
                if at >= end:
                    self.state[mask] = EXITED
                    self.try_release()
                    continue
                block = self.blocks[at]
                if block.gather:
                    mask = self._gather_waiting(block, mask)
                    if mask is None:
                        continue
            self._execute(block, mask)
            at, uniform = self._advance(block, mask, uniform, at)
            if not uniform and lockstep:
                alive = self.state != EXITED
                if not alive.any():
                    break
                joined = self._joined(alive)
                if joined is not None:
                    uniform, at = True, joined
        never = sum(len(copy.threads) for copy in self.machine.memory.in_flight)
        if never:
            self.machine.counters.stat["cp_async_unwaited_at_exit"] += never

    def _pick(self, running: np.ndarray, rng: np.random.Generator) -> int:
        warps = np.unique(self.machine.warp[running])
        if self.options.schedule == "random":
            return int(rng.choice(warps))
        return int(warps[0] if self.options.schedule == "warp_serial" else warps[-1])

    def _execute(self, block: BasicBlock, mask: np.ndarray | None) -> None:
        if mask is None:
            block.executed_warps += self.machine.warps
            block.executed_threads += self.machine.threads
        else:
            block.executed_warps += int(mask.reshape(-1, 32).any(1).sum())
            block.executed_threads += int(mask.sum())
        for execute, instruction in block.body:
            try:
                execute(mask)
            except PTXError:
                raise
            except Exception as error:
                message = f"internal error {type(error).__name__}: {error}\n  at {instruction.where()}"
                raise ExecError(message) from error

    def _advance(self, block: BasicBlock, mask: np.ndarray | None, uniform: bool, at: int) -> tuple[int, bool]:
        """Next index and whether execution is still uniform."""
        target = block.terminator[0](mask, uniform) if block.terminator else None
        if target is HANDLED:
            return at, False
        if isinstance(target, np.ndarray):
            active = self.alive if mask is None else mask
            self.counter[active] = target[active]
            return at, False
        target = block.next if target is None else target
        if uniform:
            return target, True
        self.counter[mask] = target
        return at, False

    def _joined(self, alive: np.ndarray) -> int | None:
        """Index at which all living threads stand, if none of them waits."""
        if ((self.state == AT_BARRIER) | (self.state == WAITING)).any():
            return None
        counters = self.counter[alive]
        if counters.min() != counters.max():
            return None
        self.alive = alive
        self.whole = None if alive.all() else alive.copy()
        return int(counters[0])

    def _check_limits(self, steps: int, begin: float, at: int) -> None:
        if steps > self.options.max_steps or time.monotonic() - begin > self.options.timeout_s:
            line = self.machine.program[min(at, len(self.machine.program) - 1)].line
            raise ExecError(f"step or time limit reached (infinite loop?) near PTX line {line}")

    # -------------------------------------------------------------------------------- warps
    def _gather(self, block: BasicBlock, mask: np.ndarray) -> np.ndarray | None:
        """The active groups of lanes (warps, warpgroups) that are complete; others are parked. None: no group is."""
        required, size = block.gather
        missing = required(mask) & (self.state != EXITED) & ~mask
        incomplete = mask.reshape(-1, size).any(1) & missing.reshape(-1, size).any(1)
        if not incomplete.any():
            return mask
        park = mask & np.repeat(incomplete, size)
        self.state[park], self.counter[park] = WAITING, block.start
        mask = mask & ~park
        return mask if mask.any() else None

    def _gather_waiting(self, block: BasicBlock, mask: np.ndarray) -> np.ndarray | None:
        """As :meth:`_gather`, with the lanes of the same groups that were parked here before."""
        size = block.gather[1]
        groups = np.repeat(mask.reshape(-1, size).any(1), size)
        complete = self._gather(block, mask | ((self.state == WAITING) & (self.counter == block.start) & groups))
        if complete is not None:
            self.state[complete] = RUN
        return complete

    def exit(self, threads: np.ndarray) -> None:
        """Exited threads count as arrived at every barrier (PTX ISA, "bar")."""
        self.state[threads] = EXITED
        self.alive = self.state != EXITED
        self.whole = self.alive.copy()
        self.try_release()

    def _deadlock(self) -> None:
        lines = []
        for state, what in ((AT_BARRIER, "waiting at a barrier"), (WAITING, "waiting for the other lanes of its warp")):
            threads = np.flatnonzero(self.state == state)
            for counter in np.unique(self.counter[threads]):
                here = threads[self.counter[threads] == counter]
                where, first = self.machine.program[int(counter)].where(), self.machine.name_thread(here[0])
                lines.append(f"{len(here)} thread(s) {what} at {where} (first: {first})")
        head = f"deadlock in {self.machine.function.name}: no thread can run\n  "
        raise DeadlockError(head + "\n  ".join(lines))

    # -------------------------------------------------------------------------------- barriers
    def arrive(
        self,
        instruction: Instruction,
        mask: np.ndarray | None,
        uniform: bool,
        number: np.ndarray,
        count: np.ndarray | None,
        wait: bool,
        on_release: Callable[[np.ndarray], None] | None = None,
    ) -> Any:
        """bar.sync, bar.arrive (``wait`` False) and bar.red of the threads in ``mask``; a terminator's result."""
        machine = self.machine
        whole_warps = machine.warps if mask is None else int(mask.reshape(-1, 32).any(1).sum())
        machine.counters.stat["barrier"] += whole_warps
        if uniform and wait and count is None and (number == number.flat[0]).all():
            if machine.races is not None:
                machine.races.barrier_all()
            if on_release:
                on_release(self.alive)
            return None
        active = self.alive if mask is None else mask
        if uniform:
            self.counter[:] = instruction.index
        self.barrier_number[active] = np.broadcast_to(number, machine.threads)[active]
        self.barrier_count[active] = 0 if count is None else np.broadcast_to(count, machine.threads)[active]
        if wait:
            self.state[active], self.counter[active] = AT_BARRIER, instruction.index
        else:
            for block in np.unique(machine.block_of[active]):
                here = active & (machine.block_of == block)
                for barrier in np.unique(self.barrier_number[here]):
                    key = int(block), int(barrier)
                    before = self.arrived.get(key, np.zeros(machine.threads, bool))
                    self.arrived[key] = before | (here & (self.barrier_number == barrier))
            self.counter[active] = instruction.index + 1
        self.try_release(on_release)
        return HANDLED

    def try_release(self, on_release: Callable[[np.ndarray], None] | None = None) -> None:
        """Let go the threads whose barrier is complete."""
        if on_release is not None:
            self.on_release = on_release
        at_barrier = self.state == AT_BARRIER
        for block in np.unique(self.machine.block_of[at_barrier]):
            in_block = self.machine.block_of == block
            for number in np.unique(self.barrier_number[at_barrier & in_block]):
                waiting = at_barrier & in_block & (self.barrier_number == number)
                self._release_if_complete(int(block), int(number), in_block, waiting)

    def _release_if_complete(self, block: int, number: int, in_block: np.ndarray, waiting: np.ndarray) -> None:
        machine = self.machine
        arrived = self.arrived.get((block, number))
        present = waiting if arrived is None else waiting | arrived
        expected = int(self.barrier_count[waiting].max())  # threads; 0: all of the block
        alive = in_block & (self.state != EXITED)
        warps_present = present.reshape(-1, 32).any(1)
        if expected == 0:
            if (alive & ~present).any():
                return
        elif int(warps_present.sum()) * 32 < min(expected, machine.threads_per_block):
            return
        torn = warps_present & (alive & ~present).reshape(-1, 32).any(1)
        if torn.any():
            first = np.flatnonzero(waiting)[0]
            message = "barrier reached by only a part of the lanes of a warp (divergent bar.sync is undefined)"
            machine.fault(machine.program[int(self.counter[first])], first, message, ExecError)
        counters, lanes = self.counter.reshape(-1, 32), waiting.reshape(-1, 32)
        for warp in np.flatnonzero(lanes.any(1)):
            here = counters[warp][lanes[warp]]
            if here.min() != here.max():
                message = "lanes of one warp wait at different bar.sync instructions"
                machine.fault(machine.program[int(here[0])], warp * 32, message, ExecError)
        if machine.races is not None:
            own = slice(block * machine.warps_per_block, (block + 1) * machine.warps_per_block)
            machine.races.barrier(block, warps_present[own] if expected else np.ones(machine.warps_per_block, bool))
        if self.on_release:
            self.on_release(waiting)
        self.state[waiting] = RUN
        self.counter[waiting] += 1
        self.arrived.pop((block, number), None)
