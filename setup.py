"""Builds the compiled backends; never imports torch, so isolated builds work and one binary serves every torch.

Environment: ``PTQ4ARVG_NATIVE=0`` builds without compiled backends (the reference backend then serves everything).
``CXX`` names the compiler of the CPU kernels, ``CXXFLAGS`` adds flags; ``PTQ4ARVG_BUILD_CUDA`` and
``PTQ4ARVG_CUDA_ARCHS`` decide about the CUDA kernels, see build_support/cuda.py.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # build backends do not put the project on the path

from build_support import cpu, cuda  # noqa: E402


class BuildKernels(build_ext):
    """Hands every module to what builds it."""

    def build_extension(self, ext: Extension) -> None:
        temp, target = Path(self.build_temp), Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        if ext.name == cuda.NAME:
            cuda.build(ROOT, temp.resolve(), target.resolve())
        else:
            cpu.build(self.compiler, temp, target, ext.depends)


def extensions() -> list[Extension]:
    if os.environ.get("PTQ4ARVG_NATIVE", "1") == "0":
        return []
    modules = [cpu.extension(ROOT)]
    if sys.platform != "linux" or cuda.wanted() == "0":
        return modules
    if cuda.find_nvcc() is not None:
        modules.append(cuda.extension(ROOT))
    elif cuda.wanted() == "1":
        raise SetupError(
            "PTQ4ARVG_BUILD_CUDA is 1, but there is no nvcc: set CUDA_HOME, put nvcc on the PATH, or install "
            "nvidia-cuda-nvcc, nvidia-nvvm, nvidia-cuda-crt and nvidia-cuda-runtime of one release where this is built"
        )
    else:
        print("no nvcc: building without the CUDA kernels")
    return modules


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels})
