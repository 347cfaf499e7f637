"""Branches, exits, barriers, and instructions that change no value (PTX ISA, "Control Flow Instructions", "bar")."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.ptxsim.errors import ExecError, PTXError, UnsupportedInstruction
from tests.ptxsim.machine import Machine
from tests.ptxsim.semantics.decoder import Decoder, Execute, assign
from tests.ptxsim.syntax import Immediate, Instruction, Symbol

if TYPE_CHECKING:
    from tests.ptxsim.scheduler import Scheduler

# The lanes that a member mask names run these together, or all lanes of the warp or warpgroup.
BY_MEMBER_MASK = ("shfl", "vote", "match", "redux", "elect", "bar", "barrier")
BY_WARP = ("ldmatrix", "stmatrix", "mma", "wgmma", "movmatrix")

# What a terminator returns when it has set program counters and states itself.
HANDLED = object()
# (mask, uniform) -> the index to go on at, of all active threads or an array of each; None to fall through; or HANDLED.
Terminator = Callable[["np.ndarray | None", bool], Any]


def kind(instruction: Instruction) -> str:
    """branch, indexed branch, exit, barrier, call, warp (lanes must arrive together) or plain."""
    base, modifiers = instruction.base, instruction.modifiers
    if base in ("bar", "barrier"):
        if "warp" in modifiers:
            return "warp"
        return "plain" if "cluster" in modifiers else "barrier"
    if base in BY_MEMBER_MASK or base in BY_WARP:
        return "warp"
    kinds = {"bra": "branch", "brx": "indexed branch", "ret": "exit", "exit": "exit", "call": "call"}
    return kinds.get(base, "plain")


def required_lanes(machine: Machine, instruction: Instruction) -> tuple[Callable[[np.ndarray], np.ndarray], int]:
    """(active lanes -> lanes that must arrive with them, lanes of a group)"""
    if instruction.base in BY_MEMBER_MASK:
        members = machine.source(instruction.operands[-1], "b32")
        numbers = np.arange(32, dtype=np.uint32)

        def by_member_mask(mask: np.ndarray) -> np.ndarray:
            named = np.where(mask, np.broadcast_to(members, machine.threads), np.uint32(0))
            words = np.bitwise_or.reduce(named.reshape(-1, 32), axis=1)
            return ((words[:, None] >> numbers) & np.uint32(1)).astype(bool).reshape(-1)

        return by_member_mask, 32
    size = 128 if instruction.base == "wgmma" and machine.threads_per_block % 128 == 0 else 32
    return (lambda mask: np.repeat(mask.reshape(-1, size).any(1), size)), size


def terminator(machine: Machine, scheduler: Scheduler, instruction: Instruction, kind: str) -> Terminator:
    """Closure for the instruction that ends a basic block."""
    guard = None
    if instruction.guard:
        register, negated = machine.register(instruction.guard[0]), instruction.guard[1]
        guard = (lambda: ~register) if negated else (lambda: register.copy())
    function = {"branch": _branch, "indexed branch": _indexed_branch, "exit": _exit, "barrier": _barrier}[kind]
    return function(Decoder(machine, instruction), scheduler, guard)


def _branch(op: Decoder, scheduler: Scheduler, guard: Callable[[], np.ndarray] | None) -> Terminator:
    op.flag("uni")
    op.done()
    target, following = op.machine.function.label(op.operands[0]), op.instruction.index + 1
    if guard is None:
        return lambda mask, uniform: target

    def branch(mask: np.ndarray | None, uniform: bool) -> Any:
        taken = guard()
        active = taken if mask is None else taken[mask]
        if active.all():
            return target
        if not active.any():
            return None
        return np.where(taken, target, following).astype(np.int32)

    return branch


def _indexed_branch(op: Decoder, scheduler: Scheduler, guard: Callable[[], np.ndarray] | None) -> Terminator:
    index, label, function = op.source(0, "u32"), op.operands[1], op.machine.function
    tables = (function.branch_targets.get((scope.number, label.name)) for scope in label.scope.chain())
    names = next((table for table in tables if table is not None), None)
    if names is None:
        raise PTXError(f"no .branchtargets {label!r}")
    targets = np.array([function.label(name) for name in names], np.int32)

    def branch(mask: np.ndarray | None, uniform: bool) -> Any:
        chosen = op.broadcast(index)
        taken = scheduler.alive if mask is None else mask
        if guard:
            taken = taken & guard()
        if (chosen[taken] >= len(targets)).any():
            raise ExecError("brx.idx index out of range at " + op.instruction.where())
        result = np.full(op.machine.threads, op.instruction.index + 1, np.int32)
        result[taken] = targets[chosen[taken]]
        return result

    return branch


def _exit(op: Decoder, scheduler: Scheduler, guard: Callable[[], np.ndarray] | None) -> Terminator:
    def leave(mask: np.ndarray | None, uniform: bool) -> Any:
        active = scheduler.alive if mask is None else mask
        leaving = active & guard() if guard else active.copy()
        if not leaving.any():
            return None
        scheduler.counter[active & ~leaving] = op.instruction.index + 1
        scheduler.exit(leaving)
        return HANDLED

    return leave


def _barrier(op: Decoder, scheduler: Scheduler, guard: Callable[[], np.ndarray] | None) -> Terminator:
    """bar.sync, bar.arrive and bar.red; without a count all threads of the block take part."""
    op.flags("aligned", "cta")
    what = op.flag("sync", "arrive", "red")
    machine, operands = op.machine, op.operands
    number, count = operands[0] if operands else Immediate(0), None
    on_release = predicate = None
    if what == "red":
        operation, ty = op.flag("popc", "and", "or"), op.type()
        predicate, number = op.predicate(len(operands) - 1), operands[1]
        count = operands[2] if len(operands) == 4 else None
        on_release = _reduction(machine, scheduler, op.destination(0, ty), operation)
    elif len(operands) > 1:
        count = operands[1]
    op.done()
    numbers = machine.source(number, "u32")
    if isinstance(count, Immediate) and count.value == machine.threads_per_block and what != "arrive":
        count = None
    counts = None if count is None else machine.source(count, "u32")
    following = op.instruction.index + 1

    def arrive(mask: np.ndarray | None, uniform: bool) -> Any:
        if predicate is not None:
            scheduler.barrier_value[:] = predicate()
        if guard:
            active = scheduler.alive if mask is None else mask
            arriving = active & guard()
            if not arriving.any():
                return None
            scheduler.counter[active & ~arriving] = following
            if not (arriving == active).all():
                if uniform:
                    scheduler.counter[~active] = following
                return scheduler.arrive(op.instruction, arriving, False, numbers, counts, what != "arrive", on_release)
        return scheduler.arrive(op.instruction, mask, uniform, numbers, counts, what != "arrive", on_release)

    return arrive


def _reduction(
    machine: Machine, scheduler: Scheduler, destination: np.ndarray, operation: str | None
) -> Callable[[np.ndarray], None]:
    """bar.red: what the threads of each block get when they are let go."""
    function = {"popc": np.sum, "and": np.all, "or": np.any}[operation]

    def on_release(released: np.ndarray) -> None:
        for block in np.unique(machine.block_of[released]):
            here = released & (machine.block_of == block)
            destination[here] = function(scheduler.barrier_value[here].astype(bool))

    return on_release


# ------------------------------------------------------------------------------------ without effect
def nothing(op: Decoder) -> Execute:
    """Fences, hints and the like: memory is sequentially consistent here."""
    op.modifiers.clear()
    return lambda mask: None


def create_policy(op: Decoder) -> Execute:
    """createpolicy: an L2 cache policy is opaque and changes no value."""
    op.modifiers.clear()
    return assign(op.machine.register(op.operands[0]), lambda: np.uint64(0))


def warp_barrier(op: Decoder) -> Execute:
    """bar.warp.sync: the scheduler has done it."""
    if "warp" not in op.modifiers:
        raise op.unsupported()
    return nothing(op)


def trap(op: Decoder) -> Execute:
    def execute(mask: np.ndarray | None) -> None:
        op.machine.fault(op.instruction, op.machine.active(mask)[0], "trap executed", ExecError)

    return execute


def call(op: Decoder) -> Execute:
    """Only a failing assert and printf, which is counted; compilers inline the rest."""
    op.flag("uni")
    machine = op.machine
    name = next((operand.name for operand in op.operands if isinstance(operand, Symbol)), "?")
    if name in ("__assertfail", "__assert_fail"):

        def fail(mask: np.ndarray | None) -> None:
            machine.fault(op.instruction, machine.active(mask)[0], "device assert failed", ExecError)

        return fail
    if name == "vprintf":

        def count(mask: np.ndarray | None) -> None:
            machine.counters.stat["vprintf_calls"] += 1

        return count
    raise UnsupportedInstruction(f"call of {name} (device functions are not supported; let the compiler inline them)")


WITHOUT_EFFECT = (
    *("membar", "fence", "nanosleep", "prefetch", "prefetchu"),
    *("griddepcontrol", "setmaxnreg", "discard", "applypriority"),
)
HANDLERS = {
    **dict.fromkeys(WITHOUT_EFFECT, nothing),
    **dict.fromkeys(("bar", "barrier"), warp_barrier),
    "createpolicy": create_policy,
    "trap": trap,
    "call": call,
}
