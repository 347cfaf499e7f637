"""The CUDA kernels: nvcc, where there is one, for all architectures into one module with the static CUDA runtime.

Environment:

* ``PTQ4ARVG_BUILD_CUDA``: ``auto`` (the default: if there is an nvcc), ``1`` (without one it is an error) or ``0``.
* ``PTQ4ARVG_CUDA_ARCHS``: compute capabilities such as ``80;90``; PTX of the last one is added, for newer GPUs.
* ``CUDA_HOME`` (or ``CUDA_PATH``): the toolkit to use; otherwise the ``nvcc`` on the PATH, or that of the packages
  ``nvidia-cuda-nvcc``, ``nvidia-nvvm``, ``nvidia-cuda-crt`` and ``nvidia-cuda-runtime`` (all of one release, 13.0 or
  newer) in the environment that builds.
* ``NVCC_CCBIN``, ``NVCC_APPEND_FLAGS``: nvcc's own, for another host compiler or more flags.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension
from setuptools.errors import SetupError

from .jobs import Job, call, run_needed

NAME = "ptq4arvg_kernels._cuda"
CUDA = "csrc/cuda"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# Kernels and host code alike. The laws forbid fused multiply-adds where the reference rounds twice.
FLAGS = ("-std=c++17", "-O3", "-fmad=false")
HOST_FLAGS = ("-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-g0", "-Wall")


def wanted() -> str:
    """``auto``, ``0`` or ``1``.

    Raises:
        SetupError: PTQ4ARVG_BUILD_CUDA is something else.
    """
    value = os.environ.get("PTQ4ARVG_BUILD_CUDA", "auto").lower() or "auto"
    if value not in ("auto", "0", "1"):
        raise SetupError(f"PTQ4ARVG_BUILD_CUDA is {value!r}, expected auto, 0 or 1")
    return value


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME, of the PATH, or of packages in this environment."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(name)
        if home and (compiler := Path(home) / "bin/nvcc").is_file():
            return compiler
    on_path = shutil.which("nvcc")
    if on_path is not None:
        return Path(on_path)
    for folder in map(Path, sys.path):
        for compiler in sorted(folder.glob("nvidia/cu*/bin/nvcc"), reverse=True):
            return compiler
    return None


def known_architectures(nvcc: Path) -> set[int]:
    """Compute capabilities this nvcc compiles for."""
    done = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    return {int(number) for number in re.findall(r"compute_(\d+)$", done.stdout, re.MULTILINE)}


def architectures(nvcc: Path) -> list[int]:
    """Those asked for, or of the default ones those this nvcc knows, in ascending order.

    Raises:
        SetupError: PTQ4ARVG_CUDA_ARCHS cannot be read, or names one that this nvcc does not know.
    """
    known = known_architectures(nvcc)
    asked = os.environ.get("PTQ4ARVG_CUDA_ARCHS", "")
    if not asked.strip(" ;,"):
        left_out = [str(number) for number in ARCHITECTURES if number not in known]
        if left_out:
            print(f"{nvcc} does not know compute capability {', '.join(left_out)}: building without")
        return [number for number in ARCHITECTURES if number in known]
    parts = [part for part in re.split(r"[;,\s]+", asked) if part]
    if not all(re.fullmatch(r"\d{2,3}", part) for part in parts):
        raise SetupError(f"PTQ4ARVG_CUDA_ARCHS is {asked!r}, expected numbers such as 80;90")
    numbers = sorted({int(part) for part in parts})
    if numbers[0] < min(ARCHITECTURES) or not known.issuperset(numbers):
        usable = ";".join(str(number) for number in sorted(known) if number >= min(ARCHITECTURES))
        raise SetupError(f"PTQ4ARVG_CUDA_ARCHS is {asked!r}; {nvcc} and these kernels know {usable}")
    return numbers


def code_flags(numbers: list[int]) -> list[str]:
    """Machine code for every architecture, and PTX of the newest one."""
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    return [*flags, f"-gencode=arch=compute_{numbers[-1]},code=compute_{numbers[-1]}"]


def sources(root: Path) -> list[Path]:
    """Kernels, plans and bindings."""
    folder = root / CUDA
    return sorted([*folder.glob("*.cu"), *folder.glob("*.cpp")])


def extension(root: Path) -> Extension:
    """What setuptools is told of the module."""
    headers = sorted(path for pattern in ("*.h", "*.cuh") for path in (root / "csrc").rglob(pattern))
    names = [[str(path.relative_to(root)) for path in paths] for paths in (sources(root), headers)]
    return Extension(NAME, names[0], depends=names[1], language="c++")


def toolkit_flags(nvcc: Path) -> list[str]:
    """Folders of the packages, which nvcc's own profile does not name."""
    top = nvcc.resolve().parent.parent
    if top.parent.name != "nvidia":
        return []
    return [f"-I{top / 'include'}", f"-L{top / 'lib'}"]


def _compress_flag(nvcc: Path) -> str:
    words = subprocess.run([nvcc, "--help"], capture_output=True, text=True, check=True).stdout
    return "--compress-mode=size" if "--compress-mode" in words else "-Xfatbin=-compress-all"


def build(root: Path, temp: Path, target: Path) -> None:
    """Compile what changed into ``temp`` and link the module ``target``; nvcc must be there (:func:`find_nvcc`)."""
    import pybind11

    nvcc = find_nvcc()
    if nvcc is None:
        raise SetupError("nvcc disappeared")
    numbers = architectures(nvcc)
    include = [pybind11.get_include(), sysconfig.get_path("include")]
    flags = [
        *FLAGS,
        *(f"-Xcompiler={flag}" for flag in HOST_FLAGS),
        *(f"-I{folder}" for folder in include),
        *toolkit_flags(nvcc),
    ]
    device_flags = [*code_flags(numbers), _compress_flag(nvcc)]
    described = f'-DPTQ_CUDA_ARCHITECTURES="{";".join(map(str, numbers))}"'
    jobs = []
    for source in sources(root):
        output = temp / "cuda" / (source.name + ".o")
        depfile = output.with_suffix(".d")
        # A plain C++ file never meets the device compiler; only the bindings know the list of architectures.
        kind = device_flags if source.suffix == ".cu" else [described] if source.name == "bindings.cpp" else []
        command = [str(nvcc), "-c", *flags, *kind, "-MD", "-MF", str(depfile), "-o", str(output), str(source)]
        jobs.append(Job(tuple(command), (source,), output, depfile))
    compiled = run_needed(jobs)
    print(f"CUDA kernels for {', '.join(map(str, numbers))}: {compiled} of {len(jobs)} files compiled")
    link = [str(nvcc), "-shared", "-cudart=static", *toolkit_flags(nvcc), "-o", str(target)]
    link += [str(job.output) for job in jobs]
    # Nothing but the module's entry leaves it: torch brings another copy of the runtime, with the same names.
    call([*link, "-Xlinker=--exclude-libs,ALL", "-Xlinker=--gc-sections", "-Xlinker=-s", "-lpthread", "-ldl", "-lrt"])
