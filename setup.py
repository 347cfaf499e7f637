"""Builds the compiled backend; never imports torch, so isolated builds work and one binary serves every torch.

Every kernel file is compiled once per instruction set, with that set's flags; which one runs is decided when the
package is imported. Environment: ``CXX`` names the compiler, ``CXXFLAGS`` adds flags, ``PTQ4ARVG_NATIVE=0`` builds
without compiled backends (the reference backend then serves everything).
"""

import os
import platform
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
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
X86_SETS = {
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


class BuildKernels(build_ext):
    """Compiles every file with the flags of its instruction set, in parallel."""

    def accepts(self, flags: tuple[str, ...]) -> bool:
        """Whether the compiler knows these flags."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "empty.cpp"
            source.write_text("int unused;\n")
            try:
                self.compiler.compile([str(source)], output_dir=folder, extra_postargs=["-w", *flags])
            except CompileError:
                return False
        return True

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        sets = dict(X86_SETS) if is_x86() else {"PORTABLE": ()}
        extra = tuple(os.environ.get("CXXFLAGS", "").split())
        without_amx = "AMX" in sets and not self.accepts(sets["AMX"])
        if without_amx:  # GCC before 11, clang before 12
            print("the compiler does not know AMX: building without that instruction set")
            del sets["AMX"]
        include = [pybind11.get_include(), *self.compiler.include_dirs]
        common = [("PTQ_X86", "1")] if is_x86() else []
        common += [("PTQ_EMULATE_AVX512", "1")] if EMULATE else []
        common += [("PTQ_NO_AMX", "1")] if without_amx else []
        jobs = [(source, "common", common, FLAGS) for source in COMMON]
        jobs += [
            (
                f"{CPU}/{name}.cpp",
                instruction_set.lower(),
                [*common, (f"PTQ_ISA_{instruction_set}", "1")],
                FLAGS + flags,
            )
            for instruction_set, flags in sets.items()
            for name in KERNELS
        ]

        def compile_one(job: tuple[str, str, list[tuple[str, str]], tuple[str, ...]]) -> str:
            source, folder, macros, flags = job
            (compiled,) = self.compiler.compile(
                [source],
                output_dir=str(Path(self.build_temp) / folder),
                macros=macros,
                include_dirs=include,
                extra_postargs=[*flags, *extra],
                depends=ext.depends,
            )
            return compiled

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, jobs))
        target = self.get_ext_fullpath(ext.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects, target, extra_postargs=[*extra, "-lpthread", "-ldl"], target_lang="c++", build_temp=self.build_temp
        )


def extensions() -> list[Extension]:
    if os.environ.get("PTQ4ARVG_NATIVE", "1") == "0":
        return []
    headers = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.h"))]
    sources = [*COMMON, *(f"{CPU}/{name}.cpp" for name in KERNELS)]
    return [Extension("ptq4arvg_kernels._cpu", sources, depends=headers, language="c++")]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels})
