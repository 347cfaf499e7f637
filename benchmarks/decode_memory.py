"""Peak memory of one contender, measured in a process of its own that loads a file and generates an image.

    python -m benchmarks.decode_memory rar_l w6a6 1 FILE [--threads 2] [--steps 4]

Prints one line of JSON: ``imports_mb``, and above it ``load_peak_mb``, ``loaded_mb``, ``decode_peak_mb`` and
``peak_memory_mb``, in units of 10⁶ bytes of resident memory.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ptq4arvg_kernels.backends.cpu import native

from .decode_models import load
from .decode_steps import Steps, image, spread

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
TIMEOUT_S = 1200


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s*(\d+) kB$", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def _restart_peak() -> bool:
    """Let the high-water mark start again from what is resident now; False where the system does not allow it."""
    try:
        _CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _peak() -> int:
    if _STATUS.exists():
        return _status("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _resident() -> int:
    return _status("VmRSS") if _STATUS.exists() else _peak()


def measure(path: Path, model: str, contender: str, batch: int, steps: int | None) -> dict[str, Any]:
    """Load, generate, and say what the process held meanwhile, above what it held before.

    With ``steps``, only so many steps spread over the image are run, in caches that are as full as at its end.
    """
    if native.WHY_NOT is None:
        # What imports left behind would otherwise be handed back during a load, and counted in its favour.
        native.module().release_freed_memory()
    _restart_peak()
    before = _resident()
    generator = load(path, model, contender, mapped=True)
    loaded = _resident()  # first: looking takes memory too
    load_peak = _peak()
    apart = _restart_peak()
    tokens = generator.config.tokens
    image(generator, batch, None if steps is None else 1)
    if steps is not None:
        Steps(generator, batch).time([*spread(tokens, steps, 1), range(tokens - 1, tokens)])
    decode_peak = _peak()

    def above(size: int) -> float:
        return (size - before) / 1e6

    return {
        "imports_mb": before / 1e6,
        "load_peak_mb": above(load_peak),
        "loaded_mb": above(loaded),
        "decode_peak_mb": above(decode_peak) if apart else None,
        "peak_memory_mb": above(max(load_peak, decode_peak)),
    }


def in_a_process(
    path: Path, model: str, contender: str, batch: int, threads: int, steps: int | None = None
) -> dict[str, Any]:
    """:func:`measure` in a new process.

    Raises:
        RuntimeError: it failed; the message is the end of what it wrote.
    """
    command = [sys.executable, "-m", "benchmarks.decode_memory", model, contender, str(batch), str(path)]
    command += ["--threads", str(threads)] + ([] if steps is None else ["--steps", str(steps)])
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"measuring the memory of {contender} failed:\n{done.stderr[-1000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("contender")
    parser.add_argument("batch", type=int)
    parser.add_argument("path", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, help="run so many steps instead of a whole image")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(json.dumps(measure(args.path.resolve(), args.model, args.contender, args.batch, args.steps)))


if __name__ == "__main__":
    main()
