"""Counters of a launch: dynamic instructions by class, memory traffic in sectors, shared-memory wavefronts."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import numpy as np

from tests.ptxsim.errors import ExecError, HazardError
from tests.ptxsim.ptx_types import WIDTH
from tests.ptxsim.syntax import Function, Instruction

SPACES = ("global", "shared", "local", "const", "param")
SECTOR = 32  # bytes that a global request is served in
SHARED_PATHS = ("sld", "sst", "ldmatrix", "stmatrix", "cpasync")
# Entries kept of the address patterns seen: loops repeat a few.
REMEMBERED = 20000

CLASSES = {
    **dict.fromkeys(("ldmatrix",), "ldmatrix"),
    **dict.fromkeys(("stmatrix",), "stmatrix"),
    **dict.fromkeys(("movmatrix",), "movmatrix"),
    **dict.fromkeys(("bar", "barrier"), "barrier"),
    **dict.fromkeys(("shfl", "vote", "redux", "match", "elect", "activemask"), "warp"),
    **dict.fromkeys(("bra", "brx", "ret", "exit", "call"), "control"),
    **dict.fromkeys(("membar", "fence", "nanosleep", "griddepcontrol", "prefetch"), "sync"),
    **dict.fromkeys(("rcp", "sqrt", "rsqrt", "sin", "cos", "lg2", "ex2", "tanh"), "sfu"),
    "mma": "mma",
    "cvt": "cvt",
}
FLOAT_TYPES = {"f16", "f16x2", "bf16", "bf16x2", "f32", "f64"}


def space_of(modifiers: list[str]) -> str:
    """State space that an instruction names, or generic; without ::cta."""
    return next((m.split("::")[0] for m in modifiers if m.split("::")[0] in SPACES), "generic")


def classify(instruction: Instruction) -> str:
    """Class under which the counters book an instruction."""
    base, modifiers = instruction.base, instruction.modifiers
    if base in CLASSES:
        return CLASSES[base]
    if base == "wgmma":
        return "mma" if "mma_async" in modifiers else "sync"
    if base in ("ld", "ldu", "st", "atom", "red"):
        return f"{base}.{space_of(modifiers)}"
    if base == "cp":
        return "cp.async" if len(instruction.operands) > 1 else "cp.async.sync"
    if FLOAT_TYPES.intersection(modifiers):
        return "fp"
    return "mov" if base == "mov" else "alu"


def shared_granule(function: Function) -> int:
    """Bytes of the smallest access to shared memory: the race detector needs no finer shadow."""
    granule = 16
    for instruction in function.instructions:
        if instruction.base in ("ld", "st", "atom", "red"):
            if space_of(instruction.modifiers) not in ("shared", "generic"):
                continue
            count = 1
            if instruction.base in ("ld", "st"):
                count = next((int(m[1]) for m in instruction.modifiers if m in ("v2", "v4", "v8")), 1)
            granule = min(granule, WIDTH.get(instruction.modifiers[-1], 8) // 8 * count)
        elif instruction.base == "cp" and len(instruction.operands) > 2:
            granule = min(granule, instruction.operands[2].value)
    return max(granule, 1)


def line_counters() -> dict[int, list[int]]:
    """By instruction index: requests, bytes, sectors, wavefronts, ideal wavefronts."""
    return defaultdict(lambda: [0] * 5)


class Counters:
    """Memory counters of one batch of blocks.

    ``stat`` has, with the prefixes gld and gst (global), ``_bytes``, ``_sectors``, ``_requests``; with the prefixes of
    SHARED_PATHS ``_bytes``, ``_wavefronts``, ``_ideal_wavefronts``, ``_requests``.
    """

    def __init__(self) -> None:
        self.stat: Counter[str] = Counter()
        self.lines = line_counters()
        self._seen: dict[tuple[Any, ...], tuple[int, ...]] = {}

    def _remember(self, key: tuple[Any, ...] | None, counted: tuple[int, ...]) -> None:
        if key and len(self._seen) < REMEMBERED:
            self._seen[key] = counted

    def global_access(
        self, instruction: Instruction, threads: np.ndarray, offsets: np.ndarray, size: int, store: bool, total: int
    ) -> None:
        """Book a request: the 32-byte sectors that each warp touches. ``total``: threads of the batch."""
        if size > SECTOR:
            raise ExecError("access wider than a sector")
        relative = offsets - (int(offsets.min()) & ~(SECTOR - 1))
        count = len(threads)
        contiguous = count == total or (count % 32 == 0 and (threads[1:] - threads[:-1] == 1).all())
        key = ("global", size, count, threads[0] & 31, relative.tobytes()) if contiguous else None
        counted = self._seen.get(key) if key else None
        if counted is None:
            touched = np.unique(((threads >> 5).astype(np.int64) << 40) + (relative >> 5))
            counted = len(touched), len(np.unique(threads >> 5))
            self._remember(key, counted)
        sectors, requests = counted
        prefix = "gst" if store else "gld"
        self.stat[prefix + "_bytes"] += count * size
        self.stat[prefix + "_sectors"] += sectors
        self.stat[prefix + "_requests"] += requests
        line = self.lines[instruction.index]
        line[0] += requests
        line[1] += count * size
        line[2] += sectors

    def shared_access(
        self,
        instruction: Instruction,
        threads: np.ndarray,
        offsets: np.ndarray,
        size: int,
        path: str,
        total: int,
        phase: int | None = None,
    ) -> None:
        """Book wavefronts: in each phase (a warp, a half for 8-byte and a quarter for 16-byte accesses, or ``phase``
        lanes) the most different 32-bit words that fall on one of the 32 banks. ``offsets``: within the block."""
        relative = offsets - (int(offsets.min()) & ~127)
        key = ("shared", size, phase, relative.tobytes()) if len(threads) == total else None
        counted = self._seen.get(key) if key else None
        if counted is None:
            lanes = phase or {16: 8, 8: 16}.get(size, 32)
            phases = threads.astype(np.int64) // lanes
            words = np.unique((phases[:, None] << 24) + (relative[:, None] >> 2) + np.arange(max(size // 4, 1)))
            banks, count = np.unique((words >> 24) * 32 + (words & 31), return_counts=True)
            ideal, start = np.unique(banks // 32, return_index=True)
            wavefronts = int(np.maximum.reduceat(count, start).sum())
            counted = wavefronts, len(ideal), len(np.unique(threads >> 5))
            self._remember(key, counted)
        wavefronts, least, requests = counted
        self.stat[path + "_bytes"] += len(threads) * size
        self.stat[path + "_wavefronts"] += wavefronts
        self.stat[path + "_ideal_wavefronts"] += least
        self.stat[path + "_requests"] += requests
        line = self.lines[instruction.index]
        line[0] += requests
        line[3] += wavefronts
        line[4] += least


def _ratio(a: float, b: float) -> float | None:
    return round(a / b, 4) if b else None


class Result:
    """What one launch left behind.

    Attributes:
        classes: dynamic warp instructions by class (see :func:`classify`); ``thread_insts``: the same by thread.
        inst_counts: by (PTX line, opcode).
        lines: memory counters by (PTX line, text), as :func:`line_counters` orders them.
        stat: raw counters; ``metrics()`` derives efficiencies from them.
        findings: hazards, each with kind, line, other_line, text, count and bytes.
    """

    def __init__(self) -> None:
        self.classes: Counter[str] = Counter()
        self.stat: Counter[str] = Counter()
        self.inst_counts: dict[tuple[int, str], int] = {}
        self.findings: list[dict[str, Any]] = []
        self.lines: dict[tuple[int, str], list[int]] = {}
        self.thread_insts = 0
        self.seconds = 0.0
        self.ctas = 0
        self.grid = self.block = (1, 1, 1)

    def check(self) -> Result:
        """Raise HazardError if there were findings."""
        if self.findings:
            raise HazardError(self.findings, self)
        return self

    @property
    def warp_insts(self) -> int:
        return sum(self.classes.values())

    def _wavefronts(self, *paths: str) -> tuple[int, int]:
        return (
            sum(self.stat[path + "_wavefronts"] for path in paths),
            sum(self.stat[path + "_ideal_wavefronts"] for path in paths),
        )

    def metrics(self) -> dict[str, Any]:
        """Derived counters; an efficiency is requested bytes over bytes of sectors, None without requests."""
        stat = self.stat
        out: dict[str, Any] = {
            "warp_instructions": self.warp_insts,
            "thread_instructions": self.thread_insts,
            "classes": dict(self.classes.most_common()),
        }
        for name, prefix in (("load", "gld"), ("store", "gst")):
            requested, sectors = stat[prefix + "_bytes"], SECTOR * stat[prefix + "_sectors"]
            out[f"global_{name}_bytes"] = requested
            out[f"global_{name}_sector_bytes"] = sectors
            out[f"global_{name}_efficiency"] = _ratio(requested, sectors)
        wavefronts, ideal = self._wavefronts(*SHARED_PATHS)
        out |= {
            "shared_wavefronts": wavefronts,
            "shared_ideal_wavefronts": ideal,
            "bank_conflict_factor": _ratio(wavefronts, ideal),
            "mma_share": _ratio(self.classes["mma"], self.warp_insts),
            "barriers": stat["barrier"],
            "seconds": round(self.seconds, 4),
        }
        for path in SHARED_PATHS:
            wavefronts, ideal = self._wavefronts(path)
            if ideal:
                out[path + "_bank_conflict_factor"] = _ratio(wavefronts, ideal)
        return out

    def report(self) -> str:
        """The counters as text, with the memory instructions that waste most."""
        out = [f"{name:<28} {value}" for name, value in self.metrics().items() if name != "classes"]
        total = max(self.warp_insts, 1)
        out += [f"  {name:<16} {count:10}  {100 * count / total:5.1f}%" for name, count in self.classes.most_common()]

        def waste(entry: tuple[Any, list[int]]) -> float:
            _, requested, sectors, wavefronts, ideal = entry[1]
            return wavefronts - ideal + sectors - requested / SECTOR

        out.append("worst memory instructions (requests, bytes, sectors | wavefronts/ideal):")
        for (line, text), counts in sorted(self.lines.items(), key=waste, reverse=True)[:8]:
            requests, requested, sectors, wavefronts, ideal = counts
            if wavefronts > ideal or sectors * SECTOR > requested:
                out.append(
                    f"  line {line:<5} {text[:60]:<60} {requests} req {requested} B {sectors} sectors "
                    f"| {wavefronts}/{ideal}"
                )
        out += [f"HAZARD x{finding['count']} {finding['text']}" for finding in self.findings]
        return "\n".join(out)
