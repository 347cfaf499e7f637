"""Reading the machine code of compiled kernels: the hot loop, its instructions by kind, registers and spills."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

from tests.ptxsim.triton_kernel import CompiledKernel

_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);")
_BRANCH = re.compile(r"\bBRA\b.*?(\.L_x_\d+)")


def _kind(instruction: str) -> str:
    """``IMMA`` of ``@P0 IMMA.16832.S8.S8 R4, ...``."""
    return re.sub(r"^@!?U?P\w+ ", "", instruction).split()[0].split(".")[0]


def hot_loop(sass: str) -> Counter[str]:
    """Instructions by kind of the smallest loop with matrix instructions."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in sass.splitlines():
        if found := _LABEL.match(line):
            labels[found.group(1)] = len(code)
        elif found := _INSTRUCTION.match(line):
            code.append(found.group(1))
    loops = []
    for index, instruction in enumerate(code):
        target = _BRANCH.search(instruction)
        if target and labels.get(target.group(1), index + 1) <= index:
            body = Counter(map(_kind, code[labels[target.group(1)] : index + 1]))
            if any("MMA" in kind for kind in body):
                loops.append(body)
    return min(loops, key=Counter.total)


def resources(kernel: CompiledKernel) -> tuple[int, int]:
    """Registers per thread, and bytes of stack per thread: spills."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.cubin)
        file.flush()
        text = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found.group(1)), int(found.group(2))
