"""A function bound to a machine: basic blocks of closures, so that decoding happens once per batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptxsim.errors import PTXError, UnsupportedInstruction
from tests.ptxsim.machine import Machine
from tests.ptxsim.semantics import compile_instruction, control
from tests.ptxsim.syntax import Instruction

Execute = Callable[[np.ndarray | None], None]
# What a handler trips over when an instruction has a form that it was not written for.
MALFORMED = (KeyError, IndexError, ValueError, TypeError, AttributeError)


class BasicBlock:
    """Instructions that run one after the other.

    Attributes:
        body: closures and their instructions; ``terminator``: (closure, instruction) that decides where to go on.
        gather: lanes that must arrive together before the block runs, see :func:`control.required_lanes`.
        next: index of the instruction after it.
        executed_warps, executed_threads: how often it ran.
    """

    __slots__ = ("body", "executed_threads", "executed_warps", "gather", "instructions", "next", "start", "terminator")

    def __init__(self, instructions: list[Instruction], start: int, end: int) -> None:
        self.instructions, self.start, self.next = instructions[start:end], start, end
        self.body: list[tuple[Execute, Instruction]] = []
        self.terminator: tuple[Any, Instruction] | None = None
        self.gather: tuple[Any, int] | None = None
        self.executed_warps = self.executed_threads = 0


def _leaders(machine: Machine, kinds: list[str]) -> list[int]:
    leaders = {0} | set(machine.function.labels.values())
    for index, kind in enumerate(kinds):
        if kind in ("branch", "indexed branch", "exit", "barrier", "call"):
            leaders.add(index + 1)
        if kind in ("warp", "barrier"):
            leaders.add(index)
    return sorted(leader for leader in leaders if leader < len(kinds))


def bind(machine: Machine, scheduler: Any) -> dict[int, BasicBlock]:
    """Basic blocks by index of their first instruction.

    Raises:
        UnsupportedInstruction: all that have no semantics here; with ``lazy_unsupported`` only when one executes.
    """
    program = machine.program
    kinds = [control.kind(instruction) for instruction in program]
    starts = _leaders(machine, kinds)
    blocks: dict[int, BasicBlock] = {}
    unsupported: list[str] = []
    for start, end in zip(starts, [*starts[1:], len(program)], strict=True):
        block = blocks[start] = BasicBlock(program, start, end)
        for instruction, kind in zip(block.instructions, kinds[start:end], strict=True):
            try:
                if kind in ("branch", "indexed branch", "exit", "barrier"):
                    block.terminator = control.terminator(machine, scheduler, instruction, kind), instruction
                    continue
                execute = compile_instruction(machine, instruction)
                if kind == "warp":
                    block.gather = control.required_lanes(machine, instruction)
            except UnsupportedInstruction as error:
                unsupported.append(f"{instruction.where()}   [{error}]")
                execute = _refuse(instruction, error)
            except PTXError as error:
                raise PTXError(f"{error}\n  at {instruction.where()}") from None
            except MALFORMED as error:
                unsupported.append(f"{instruction.where()}   [{type(error).__name__}: {error}]")
                execute = _refuse(instruction, error)
            block.body.append((_guarded(machine, execute, instruction), instruction))
    if unsupported and not machine.state.options.lazy_unsupported:
        head = f"{len(unsupported)} unsupported instruction(s) in {machine.function.name}:\n  "
        raise UnsupportedInstruction(head + "\n  ".join(unsupported[:10]))
    return blocks


def _refuse(instruction: Instruction, reason: Exception) -> Execute:
    def execute(mask: np.ndarray | None) -> None:
        raise UnsupportedInstruction(f"executed unsupported instruction {instruction.where()} [{reason}]")

    return execute


def _guarded(machine: Machine, execute: Execute, instruction: Instruction) -> Execute:
    """Only for the threads whose @p or @!p holds."""
    if not instruction.guard:
        return execute
    predicate, negated = machine.register(instruction.guard[0]), instruction.guard[1]

    def guarded(mask: np.ndarray | None) -> None:
        chosen = ~predicate if negated else predicate
        if mask is not None:
            chosen = chosen & mask
        elif chosen.all():
            execute(None)
            return
        if chosen.any():
            execute(chosen.copy() if chosen is predicate else chosen)

    return guarded
