"""The CPU kernels: every kernel file once per instruction set, with that set's flags; which one runs is decided when
the package is imported."""

from __future__ import annotations

import os
import platform
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension
from setuptools.errors import CompileError

NAME = "ptq4arvg_kernels._cpu"
CPU = "csrc/cpu"
# Compiled once per instruction set.
KERNELS = ("gemm", "codes", "quantize", "append", "attention", "ceiling", "table")
# Compiled once, for the oldest processor of the platform.
COMMON = (
    "csrc/bindings.cpp",
    "csrc/bindings_plan.cpp",
    *(f"{CPU}/{name}.cpp" for name in ("block", "dispatch", "limits", "pack", "threads")),
)
FLAGS = (
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    # Every float operation rounds once, as the reference does: no contraction into fused multiply-adds.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    # GCC's own AVX-512 headers start from variables they leave uninitialized on purpose.
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
)
X86_SETS: dict[str, tuple[str, ...]] = {
    "PORTABLE": (),
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
    "AVX512VNNI": (
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mavx512vnni",
        "-mfma",
        "-mf16c",
        "-mprefer-vector-width=512",
    ),
}
X86_SETS["AMX"] = (*X86_SETS["AVX512VNNI"], "-mamx-tile", "-mamx-int8")
EMULATE = os.environ.get("PTQ4ARVG_EMULATE", "0") == "1"
if EMULATE:
    # Speed matters little here. Aligned structures are passed as no old GCC did, which -Wpsabi would note.
    X86_SETS["AVX512VNNI"] = X86_SETS["AMX"] = ("-O2", "-Wno-psabi")


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def extension(root: Path) -> Extension:
    """What setuptools is told of the module."""
    headers = [str(path.relative_to(root)) for path in sorted((root / "csrc").rglob("*.h"))]
    sources = [*COMMON, *(f"{CPU}/{name}.cpp" for name in KERNELS)]
    return Extension(NAME, sources, depends=headers, language="c++")


def _accepts(compiler: Any, flags: tuple[str, ...]) -> bool:
    """Whether the compiler knows these flags."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "empty.cpp"
        source.write_text("int unused;\n")
        try:
            compiler.compile([str(source)], output_dir=folder, extra_postargs=["-w", *flags])
        except CompileError:
            return False
    return True


def build(compiler: Any, temp: Path, target: Path, depends: list[str]) -> None:
    """Compile into ``temp`` and link the module ``target``.

    Args:
        compiler: of setuptools, configured.
        depends: headers; a change in one compiles everything again.
    """
    import pybind11

    sets = dict(X86_SETS) if is_x86() else {"PORTABLE": ()}
    extra = tuple(os.environ.get("CXXFLAGS", "").split())
    without_amx = "AMX" in sets and not _accepts(compiler, sets["AMX"])
    if without_amx:  # GCC before 11, clang before 12
        print("the compiler does not know AMX: building without that instruction set")
        del sets["AMX"]
    include = [pybind11.get_include(), *compiler.include_dirs]
    common = [("PTQ_X86", "1")] if is_x86() else []
    common += [("PTQ_EMULATE_AVX512", "1")] if EMULATE else []
    common += [("PTQ_NO_AMX", "1")] if without_amx else []
    jobs = [(source, "common", common, FLAGS) for source in COMMON]
    jobs += [
        (f"{CPU}/{name}.cpp", instruction_set.lower(), [*common, (f"PTQ_ISA_{instruction_set}", "1")], FLAGS + flags)
        for instruction_set, flags in sets.items()
        for name in KERNELS
    ]

    def compile_one(job: tuple[str, str, list[tuple[str, str]], tuple[str, ...]]) -> str:
        source, folder, macros, flags = job
        (compiled,) = compiler.compile(
            [source],
            output_dir=str(temp / folder),
            macros=macros,
            include_dirs=include,
            extra_postargs=[*flags, *extra],
            depends=depends,
        )
        return str(compiled)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, jobs))
    target.parent.mkdir(parents=True, exist_ok=True)
    compiler.link_shared_object(
        objects, str(target), extra_postargs=[*extra, "-lpthread", "-ldl"], target_lang="c++", build_temp=str(temp)
    )
