"""The kernels of csrc/cuda as machine code of an architecture, and what it consists of.

A file is compiled with the flags of the build, kept in build/cubin, and compiled again when it or a header changed. No
GPU takes part; nvcc does.
"""

from __future__ import annotations

import fcntl
import functools
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from setuptools.errors import CompileError

from build_support import cuda
from build_support.jobs import Job, run_needed

from . import sass
from .cuda_tiles import GemmTile, gemm_tile

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc" / "cuda"
CACHE = ROOT / "build" / "cubin"
WORKERS = 2
_SECTION = re.compile(r"^\.text\.(\w+):", re.MULTILINE)


@dataclass(frozen=True)
class Compiled:
    """A kernel for one compute capability.

    Attributes:
        shared_bytes: static shared memory of a block; a launch adds dynamic.
        hot_loop: the loop of a GEMM; None for other kernels.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    hot_loop: sass.HotLoop | None


def nvcc() -> Path:
    """The compiler that the build takes.

    Raises:
        RuntimeError: this is not a checkout of the repository, or there is no nvcc.
    """
    if not SOURCES.is_dir():
        raise RuntimeError(f"{SOURCES} is not there: run this from a checkout of the repository")
    found = cuda.find_nvcc()
    if found is None:
        raise RuntimeError("no nvcc: CUDA kernels cannot be compiled (put it on the PATH, or set CUDA_HOME)")
    return found


@functools.cache
def nvcc_version() -> str:
    """Release and build of the compiler."""
    said = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release [\d.]+, V([\d.]+)", said)
    return found[1] if found else said.splitlines()[-1]


def job(source: Path, arch: int) -> Job:
    """How a file becomes machine code of an architecture; the compiler's release is part of the place."""
    output = CACHE / nvcc_version() / f"{source.stem}.sm{arch}.cubin"
    depfile = output.with_suffix(".d")
    made = ("-MD", "-MF", str(depfile), "-o", str(output))
    return Job((str(nvcc()), "-cubin", f"-arch=sm_{arch}", *cuda.FLAGS, *made, str(source)), (source,), output, depfile)


def compiled(archs: Sequence[int], files: Sequence[str] = ()) -> dict[tuple[int, str], Path]:
    """Machine code by architecture and file (name without ending); all files if none is named.

    Raises:
        RuntimeError: nvcc is missing or fails.
    """
    sources = [path for path in sorted(SOURCES.glob("*.cu")) if not files or path.stem in files]
    jobs = {(arch, path.stem): job(path, arch) for arch in archs for path in sources}
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:  # others that want the same wait and find it
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            run_needed(list(jobs.values()), WORKERS)
        except CompileError as error:
            raise RuntimeError(str(error)) from error
    return {key: made.output for key, made in jobs.items()}


def files_of(kernels: Sequence[str]) -> list[str]:
    """Files (names without endings) that these kernels are in: a GEMM's is named after its width and output."""
    found: dict[str, None] = {}
    for kernel in kernels:
        tile = gemm_tile(kernel)
        if tile is not None:
            found[f"gemm_w{tile.bits}_{tile.output}"] = None
        elif kernel.startswith(("decode_d", "block_attention_d")):
            found[kernel.rpartition("_d")[0]] = None
        else:
            found["qkv_append" if kernel == "qkv_append" else "rows"] = None
    return list(found)


@functools.lru_cache(maxsize=2)
def _functions(path: Path) -> tuple[dict[str, str], dict[str, sass.Usage]]:
    """Disassembly of every kernel of a file, and its resources."""
    code = path.read_bytes()
    text = sass.disassemble(code)
    starts = list(_SECTION.finditer(text))
    ends = [start.start() for start in starts[1:]] + [len(text)]
    texts = {start[1]: text[start.start() : end] for start, end in zip(starts, ends, strict=True)}
    return texts, sass.usage(code)


@functools.cache
def _examine(path: Path, kernel: str) -> Compiled:
    texts, used = _functions(path)
    if kernel not in texts or kernel not in used:
        raise RuntimeError(f"{path.name} has no kernel {kernel}")
    tile = gemm_tile(kernel)
    loop = None if tile is None else sass.hot_loop(sass.parse(texts[kernel]), tile.mma_per_step)
    mine = used[kernel]
    return Compiled(mine.registers, mine.spill_bytes, mine.shared_bytes, loop)


def examine(kernel: str, arch: int) -> Compiled:
    """Registers, spills, static shared memory and main loop of a kernel.

    Raises:
        RuntimeError: nvcc is missing or fails.
        ValueError: a GEMM without a loop over 8-bit products, or with no whole number of steps in it.
    """
    [file] = files_of([kernel])
    return _examine(_paths(arch, file), kernel)


@functools.cache
def _paths(arch: int, file: str) -> Path:
    return compiled([arch], [file])[arch, file]


__all__ = ["Compiled", "GemmTile", "compiled", "examine", "files_of", "nvcc_version"]
