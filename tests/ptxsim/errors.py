"""What can go wrong; every error names the PTX line."""

from __future__ import annotations

from typing import Any


class PTXError(Exception):
    """Anything the emulator refuses or finds."""


class PTXParseError(PTXError):
    """The text is not PTX that the emulator can read."""


class UnsupportedInstruction(PTXError):
    """An instruction or modifier without semantics here: nothing unknown runs silently."""


class ExecError(PTXError):
    """A program that is undefined or does not end: divergent barriers, a trap, the step limit."""


class MemFault(ExecError):
    """An access out of bounds or misaligned."""


class DeadlockError(ExecError):
    """Threads wait for each other."""


class HazardError(PTXError):
    """Races and uninitialised reads of a launch that ran to its end: ``findings``, and its ``result``."""

    def __init__(self, findings: list[dict[str, Any]], result: Any = None) -> None:
        self.findings, self.result = findings, result
        super().__init__(f"{len(findings)} hazard(s):\n  " + "\n  ".join(f["text"] for f in findings[:8]))
