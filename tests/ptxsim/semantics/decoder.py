"""What a handler sees of an instruction, and how it writes results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptxsim.errors import UnsupportedInstruction
from tests.ptxsim.machine import Machine, Predicate
from tests.ptxsim.ptx_types import DTYPE
from tests.ptxsim.syntax import Immediate, Instruction, Pair

# A bound instruction: executes for the threads of a mask, or for all without one.
Execute = Callable[[np.ndarray | None], None]
Values = Callable[[], np.ndarray]


class Decoder:
    """An instruction being bound. Handlers take the modifiers that they know; what is left over is unsupported, so that
    an unknown variant never runs silently."""

    def __init__(self, machine: Machine, instruction: Instruction) -> None:
        self.machine, self.instruction = machine, instruction
        self.operands, self.modifiers = instruction.operands, list(instruction.modifiers)
        self.base = instruction.base

    def unsupported(self, why: str = "") -> UnsupportedInstruction:
        return UnsupportedInstruction(self.instruction.opcode + why)

    # -------------------------------------------------------------------------------- modifiers
    def flag(self, *names: str) -> str | None:
        """Take the first of these modifiers that is there."""
        for name in names:
            if name in self.modifiers:
                self.modifiers.remove(name)
                return name
        return None

    def flags(self, *names: str) -> None:
        """Take all of these modifiers."""
        while self.flag(*names):
            pass

    def type(self) -> str:
        """Take the last modifier, which must be a type."""
        if not self.modifiers or self.modifiers[-1] not in DTYPE:
            raise self.unsupported(": a type is missing")
        return self.modifiers.pop()

    def done(self) -> None:
        if self.modifiers:
            raise self.unsupported(f": modifier(s) .{' .'.join(self.modifiers)} not supported")

    # -------------------------------------------------------------------------------- operands
    def source(self, index: int, ty: str) -> np.ndarray:
        return self.machine.source(self.operands[index], ty)

    def destination(self, index: int, ty: str) -> np.ndarray:
        return self.machine.destination(self.operands[index], ty)

    def predicate(self, index: int) -> Predicate:
        """Values of p, !p or a literal."""
        operand = self.operands[index]
        if isinstance(operand, Immediate):
            constant = np.array([bool(operand.value)])
            return lambda: constant
        return self.machine.predicate(operand)

    def destinations(self, ty: str, second: str = "pred") -> tuple[np.ndarray, np.ndarray | None]:
        """The first operand, d or d|p."""
        operand = self.operands[0]
        if isinstance(operand, Pair):
            return self.machine.destination(operand.first, ty), self.machine.destination(operand.second, second)
        return self.machine.destination(operand, ty), None

    def broadcast(self, values: np.ndarray) -> np.ndarray:
        """One value per thread."""
        return np.broadcast_to(values, self.machine.threads)


def write(destination: np.ndarray, values: Any, mask: np.ndarray | None) -> None:
    """Assign where the mask is set."""
    if mask is None:
        destination[...] = values
    else:
        np.copyto(destination, values, where=mask, casting="unsafe")


def assign(destination: np.ndarray, compute: Values) -> Execute:
    """destination = compute()"""

    def execute(mask: np.ndarray | None) -> None:
        write(destination, compute(), mask)

    return execute


def apply(destination: np.ndarray, function: np.ufunc, a: np.ndarray, b: np.ndarray) -> Execute:
    """destination = function(a, b), without a temporary when all threads take part."""

    def execute(mask: np.ndarray | None) -> None:
        if mask is None:
            function(a, b, out=destination)
        else:
            np.copyto(destination, function(a, b), where=mask)

    return execute


def split(values: np.ndarray, dtype: Any) -> np.ndarray:
    """The parts of 32-bit registers: (n,) to (n, parts)."""
    return np.ascontiguousarray(values).view(dtype).reshape(-1, 4 // np.dtype(dtype).itemsize)


def join(parts: np.ndarray) -> np.ndarray:
    """Inverse of :func:`split`."""
    return np.ascontiguousarray(parts).view(np.uint32)[..., 0]
