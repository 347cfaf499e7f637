"""One batch of thread blocks executed side by side.

Every register is a numpy array over all threads of the batch. Blocks are padded to whole warps; padding threads have
exited from the beginning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from tests.ptxsim.counters import Counters
from tests.ptxsim.errors import MemFault, PTXError, UnsupportedInstruction
from tests.ptxsim.memory import POISON_SHARED, GlobalMemory, Memory
from tests.ptxsim.ptx_types import DTYPE, UINT, WIDTH
from tests.ptxsim.races import RaceDetector
from tests.ptxsim.syntax import Function, Immediate, Instruction, Negated, Register, Sink, Special, Symbol

if TYPE_CHECKING:
    from tests.ptxsim.launcher import LaunchState

Predicate = Callable[[], np.ndarray]
UNINITIALISED = 0xA5A5A5A5A5A5A5A5
ZERO_SPECIALS = ("smid", "gridid", "cluster_ctaid", "cluster_ctarank", "is_explicit_cluster")
ONE_SPECIALS = ("cluster_nctaid", "cluster_nctarank", "nsmid")


class Machine:
    """Registers and memories of a batch; instructions are bound to it in program.py, scheduler.py runs it.

    Attributes:
        blocks, warps, threads: in the batch; ``warps_per_block``, ``threads_per_block`` (padded).
        thread_in_block, block_of, lane, warp: of every thread; ``exists``: no padding.
        shared: of all blocks, ``shared_stride`` bytes apart, of which ``shared_bytes`` belong to the block.
        races: None when hazards are off.
    """

    def __init__(self, state: LaunchState, block_ids: list[tuple[int, int, int]]) -> None:
        self.state, self.function = state, state.function
        self.program = state.function.instructions
        self.block_ids, self.blocks = block_ids, len(block_ids)
        self.counters: Counters = state.counters
        self.global_memory: GlobalMemory = state.global_memory
        self.parameters = state.parameters

        real = state.block[0] * state.block[1] * state.block[2]
        self.warps_per_block = -(-real // 32)
        self.threads_per_block = self.warps_per_block * 32
        self.threads = self.threads_per_block * self.blocks
        self.warps = self.warps_per_block * self.blocks
        self.everyone = np.arange(self.threads)
        self.thread_in_block = self.everyone % self.threads_per_block
        self.block_of = self.everyone // self.threads_per_block
        self.lane = (self.everyone % 32).astype(np.uint32)
        self.warp = self.everyone >> 5
        self.exists = self.thread_in_block < real

        self.registers: dict[tuple[int, str], np.ndarray] = {}
        self.carry = np.zeros(self.threads, np.uint64)  # the condition code of add.cc and its kin
        self.shared_bytes = state.shared_bytes
        self.shared_stride = -(-self.shared_bytes // 128) * 128 or 128
        self.shared = np.full(self.blocks * self.shared_stride, POISON_SHARED, np.uint8)
        self.local_addresses, self.local_bytes = _lay_out_locals(state.function)
        self.local = np.full(self.threads * self.local_bytes, POISON_SHARED, np.uint8)
        self.races = RaceDetector(self, state.granule) if state.options.hazards != "off" else None
        self.memory = Memory(self)

    # -------------------------------------------------------------------------------- errors
    def name_thread(self, thread: int) -> str:
        index = int(thread) % self.threads_per_block
        x, y, _ = self.state.block
        block = self.block_ids[int(thread) // self.threads_per_block]
        return f"block {block} thread ({index % x},{index // x % y},{index // (x * y)})"

    def fault(self, instruction: Instruction, thread: int, message: str, error: type[PTXError] = MemFault) -> NoReturn:
        where = f"\n  at {instruction.where()}\n  in {self.function.name}, {self.name_thread(thread)}"
        raise error(message + where)

    def finding(self, kind: str, instruction: Instruction, other: Instruction | None, text: str, size: int) -> None:
        """Book a hazard once per pair of instructions, with counts."""
        findings = self.state.findings
        key = (kind, instruction.index, -1 if other is None else other.index)
        if key in findings:
            findings[key]["count"] += 1
            findings[key]["bytes"] += size
            return
        findings[key] = {
            "kind": kind,
            "line": instruction.line,
            "other_line": None if other is None else other.line,
            "loc": instruction.source,
            "text": text,
            "count": 1,
            "bytes": size,
        }

    def active(self, mask: np.ndarray | None) -> np.ndarray:
        """Indices of the active threads; no mask: all."""
        return self.everyone if mask is None else np.flatnonzero(mask)

    # -------------------------------------------------------------------------------- operands
    def register(self, register: Register) -> np.ndarray:
        """The whole register as unsigned integers or bools."""
        values = self.registers.get(register.key)
        if values is None:
            bits = WIDTH[register.ty]
            if bits == 128:
                raise UnsupportedInstruction(f".b128 registers ({register.key[1]})")
            if register.ty == "pred":
                values = np.zeros(self.threads, np.bool_)
            else:
                values = np.full(self.threads, UNINITIALISED & ((1 << bits) - 1), UINT[bits])
            self.registers[register.key] = values
        return values

    @staticmethod
    def _constant(value: int, ty: str) -> np.ndarray:
        if ty == "pred":
            return np.array([bool(value)])
        bits = WIDTH[ty]
        return np.array([value & ((1 << bits) - 1)], UINT[bits]).view(DTYPE[ty])

    def source(self, operand: Any, ty: str) -> np.ndarray:
        """Live view, (threads,) or (1,), of an operand as a type; a wider register gives its low part."""
        if isinstance(operand, Register):
            return self._source_register(operand, ty)
        if isinstance(operand, Immediate):
            if operand.bits and ty in ("f32", "f64") and WIDTH[ty] != operand.bits:
                literal = np.array([operand.value], UINT[operand.bits])
                return literal.view(np.float32 if operand.bits == 32 else np.float64).astype(DTYPE[ty])
            if not operand.bits and ty in ("f32", "f64", "f16"):
                return np.array([operand.value]).astype(DTYPE[ty])
            return self._constant(operand.value, ty)
        if isinstance(operand, Special):
            return self._special(operand.name, ty)
        if isinstance(operand, Symbol):
            return self._constant(self.symbol(operand)[1] + operand.offset, ty)
        raise PTXError(f"cannot read operand {operand!r}")

    def _source_register(self, register: Register, ty: str) -> np.ndarray:
        values = self.register(register)
        if ty == "pred" or register.ty == "pred":
            if ty != register.ty:
                raise PTXError(f"predicate/typed operand mismatch: {register!r} as .{ty}")
            return values
        bits, have = WIDTH[ty], WIDTH[register.ty]
        if bits > have:
            raise PTXError(f"register {register!r} (.{register.ty}) is narrower than .{ty}")
        return values.view(DTYPE[ty])[:: have // bits] if bits < have else values.view(DTYPE[ty])

    def predicate(self, operand: Any) -> Predicate:
        """Callable giving the bools of p or !p."""
        if isinstance(operand, Negated):
            negated = self.source(operand.register, "pred")
            return lambda: ~negated
        values = self.source(operand, "pred")
        return lambda: values

    def destination(self, operand: Any, ty: str) -> np.ndarray:
        """View of a whole register to assign to; signed when the type is, so that assignment extends the sign."""
        if isinstance(operand, Sink):
            return np.empty(self.threads, DTYPE[ty])
        if not isinstance(operand, Register):
            raise PTXError(f"bad destination {operand!r}")
        values = self.register(operand)
        if ty == "pred" or operand.ty == "pred":
            if ty != operand.ty:
                raise PTXError(f"predicate/typed destination mismatch: {operand!r} as .{ty}")
            return values
        bits, have = WIDTH[ty], WIDTH[operand.ty]
        if bits > have:
            raise PTXError(f"destination {operand!r} (.{operand.ty}) is narrower than .{ty}")
        if bits == have:
            return values.view(DTYPE[ty])
        return values.view({16: np.int16, 32: np.int32, 64: np.int64}[have]) if ty[0] == "s" else values

    def symbol(self, symbol: Symbol) -> tuple[str, int]:
        """Space and address of a variable or parameter."""
        for scope in symbol.scope.chain():
            key = (scope.number, symbol.name)
            if key in self.state.symbols:
                return self.state.symbols[key]
            if key in self.local_addresses:
                return "local", self.local_addresses[key]
        if symbol.name in self.state.symbols:
            return self.state.symbols[symbol.name]
        for parameter in self.function.parameters:
            if parameter.name == symbol.name:
                return "kparam", parameter.offset
        raise PTXError(f"unknown symbol {symbol.name}")

    def _special(self, name: str, ty: str) -> np.ndarray:
        """Special registers (PTX ISA, "Special Registers"); clocks and identities of hardware read 0."""
        stem, _, component = name[1:].partition(".")
        axis = "xyz".index(component) if component else 0
        x, y, _ = self.state.block
        if stem == "tid":
            values = (self.thread_in_block % x, self.thread_in_block // x % y, self.thread_in_block // (x * y))[axis]
        elif stem == "ntid":
            values = np.array([self.state.block[axis]])
        elif stem in ("ctaid", "clusterid"):
            values = np.array([block[axis] for block in self.block_ids])[self.block_of]
        elif stem in ("nctaid", "nclusterid"):
            values = np.array([self.state.grid[axis]])
        elif stem == "laneid":
            values = self.lane
        elif stem == "warpid":
            values = self.thread_in_block // 32
        elif stem == "nwarpid":
            values = np.array([self.warps_per_block])
        elif stem.startswith("lanemask_"):
            own = np.uint64(1) << self.lane.astype(np.uint64)
            below = own - np.uint64(1)
            values = {"eq": own, "lt": below, "le": own | below, "gt": ~(own | below), "ge": ~below}[stem[9:]]
        elif stem in ZERO_SPECIALS or stem.startswith(("clock", "globaltimer", "pm", "envreg")):
            values = np.array([0])
        elif stem in ONE_SPECIALS:
            values = np.array([1])
        elif stem == "dynamic_smem_size":
            values = np.array([self.state.dynamic_shared_bytes])
        elif stem == "total_smem_size":
            values = np.array([self.shared_bytes])
        else:
            raise UnsupportedInstruction(f"special register {name}")
        return values.astype(np.uint64).astype(UINT[WIDTH[ty]]).view(DTYPE[ty])


def _lay_out_locals(function: Function) -> tuple[dict[tuple[int, str], int], int]:
    """Address of every local variable in a thread's local memory, and the bytes of that; address 0 stays invalid."""
    addresses, end = {}, 16
    for key, variable in function.variables.items():
        if variable.space in ("local", "param"):
            align = max(variable.align, 1)
            addresses[key] = -(-end // align) * align
            end = addresses[key] + variable.size
    return addresses, -(-end // 16) * 16
