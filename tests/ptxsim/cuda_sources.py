"""PTX of the package's CUDA sources, compiled with nvcc for sm_80 as setup.py compiles them.

It is kept in build/ptx and made again when a source or a header changed; processes that need it at the same time wait
for the first of them.
"""

from __future__ import annotations

import fcntl
import os
import re
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from setuptools.errors import CompileError

from build_support import cuda
from build_support.jobs import Job
from tests.ptxsim.errors import PTXError
from tests.ptxsim.launcher import Module, load_ptx
from tests.ptxsim.nvcc import find_nvcc

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc"
CACHE = ROOT / "build" / "ptx"
FLAGS = cuda.FLAGS

_ENTRY = re.compile(r"^(?:\.visible |\.weak )?\.entry (\w+)", re.MULTILINE)


def _job(source: Path, compiler: str) -> Job:
    output = CACHE / f"{source.stem}.sm80.ptx"
    depfile = output.with_suffix(".d")
    command = (compiler, "-ptx", "-arch=sm_80", *FLAGS, "-MD", "-MF", str(depfile), "-o", str(output), str(source))
    return Job(command, (source,), output, depfile)


def _attempt(job: Job) -> str | None:
    try:
        if job.needed():
            job.run()
    except CompileError as error:
        return str(error)
    return None


@cache
def _compiled() -> tuple[dict[str, str], dict[str, Path], tuple[str, ...]]:
    """``(texts by file, files by kernel, what nvcc says of the files that do not compile)``."""
    compiler = find_nvcc()
    if compiler is None:
        raise PTXError("no nvcc on the path: CUDA kernels cannot be compiled for the emulator")
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        jobs = [_job(source, compiler) for source in sorted((SOURCES / "cuda").glob("*.cu"))]
        jobs.sort(key=lambda job: -job.inputs[0].stat().st_size)
        with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
            said = list(pool.map(_attempt, jobs))
        good = [job for job, words in zip(jobs, said, strict=True) if words is None]
        texts = {job.inputs[0].name: job.output.read_text() for job in good}
    where = {kernel: name for name, text in texts.items() for kernel in kernels_in(text)}
    return texts, {kernel: Path(name) for kernel, name in where.items()}, tuple(filter(None, said))


def kernels_in(ptx: str) -> list[str]:
    """Names of the kernels of a PTX text."""
    return _ENTRY.findall(ptx)


def only(ptx: str, kernel: str) -> str:
    """A PTX text without its other kernels: there may be many, and reading one takes a while.

    Raises:
        PTXError: it has no such kernel.
    """
    found = list(_ENTRY.finditer(ptx))
    if kernel not in kernels_in(ptx):
        raise PTXError(f"there is no kernel {kernel} in this PTX: {', '.join(kernels_in(ptx))}")
    kept = [ptx[: found[0].start()]]
    for entry, end in zip(found, [*found[1:], None], strict=True):
        text = ptx[entry.start() : None if end is None else end.start()]
        body = text.rindex("\n}") + 2  # assembly in a kernel has such lines too; what follows the last is no kernel's
        kept.append(text if entry.group(1) == kernel else text[body:])
    return "".join(kept)


def kernel_names() -> list[str]:
    """All kernels of the CUDA sources."""
    return sorted(_compiled()[1])


def source_ptx(kernel: str) -> str:
    """The PTX of the file that has a kernel, all its kernels with it.

    Raises:
        PTXError: no file has it, or there is no nvcc.
    """
    texts, files, said = _compiled()
    if kernel not in files:
        raise PTXError("\n".join([f"no CUDA source has a kernel {kernel}", *said]))
    return texts[files[kernel].name]


@cache
def kernel_module(kernel: str) -> Module:
    """The loaded kernel."""
    return load_ptx(only(source_ptx(kernel), kernel))
