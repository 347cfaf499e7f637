"""Instruction semantics: one module per group of the PTX ISA, each with its table of handlers."""

from __future__ import annotations

from tests.ptxsim.errors import UnsupportedInstruction
from tests.ptxsim.machine import Machine
from tests.ptxsim.semantics import (
    arithmetic,
    bits,
    comparison,
    control,
    conversion,
    elementary,
    loads,
    matrix,
    mma,
    warp,
    wgmma,
)
from tests.ptxsim.semantics.decoder import Decoder, Execute
from tests.ptxsim.syntax import Instruction

GROUPS = (arithmetic, bits, comparison, control, conversion, elementary, loads, matrix, mma, warp, wgmma)
HANDLERS = {base: handler for group in GROUPS for base, handler in group.HANDLERS.items()}


def compile_instruction(machine: Machine, instruction: Instruction) -> Execute:
    """Closure that executes an instruction; every modifier is understood or it is unsupported."""
    handler = HANDLERS.get(instruction.base)
    if handler is None:
        raise UnsupportedInstruction(f"unknown instruction {instruction.opcode}")
    op = Decoder(machine, instruction)
    execute = handler(op)
    op.done()
    return execute
