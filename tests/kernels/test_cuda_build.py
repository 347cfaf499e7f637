"""The compiled CUDA module: it imports without a driver, lists its kernels, refuses bad input; and how it is built."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from setuptools.errors import CompileError, SetupError

import ptq4arvg_kernels as kernels
from build_support import cuda
from build_support.jobs import Job, dependencies, run_needed
from ptq4arvg_kernels.backends.cuda import native, support
from ptq4arvg_kernels.backends.views import view
from ptq4arvg_kernels.tables import make_table
from tests.kernels import cuda_cases
from tests.ptxsim import PTXError
from tests.ptxsim.cuda_launcher import locate, parameter
from tests.ptxsim.cuda_sources import kernel_names, kernels_in, only, source_ptx

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def module() -> Any:
    if not cuda_cases.available():
        pytest.skip(cuda_cases.NO_NVCC)
    return native.module()


# --- the module -------------------------------------------------------------------------------------------------------


def test_it_imports_without_torch_and_without_a_driver(module: Any) -> None:
    """In a process of its own, where nothing else loaded a CUDA library."""
    code = (
        f"import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('ptq4arvg_kernels._cuda', {module.__file__!r})\n"
        "loaded = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(loaded)\n"
        "assert 'torch' not in sys.modules\n"
        "maps = open('/proc/self/maps').read()\n"
        "assert 'libcudart' not in maps\n"  # it is inside
        "print(len(loaded.kernels()), loaded.runtime_version() // 1000)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(len(module.kernels())), str(module.runtime_version() // 1000)]


def test_it_knows_every_kernel_of_the_sources(module: Any) -> None:
    listed = module.kernels()
    assert len(set(listed)) == len(listed)
    assert sorted(listed) == kernel_names()


def test_a_launch_without_a_driver_is_an_exception(module: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, whose memory this test has no operands in")
    x, table, positions = torch.zeros(2, 8), make_table(1.0, 128, 8, [0]), torch.tensor([0])
    codes = torch.zeros(2, 8, dtype=torch.int8)
    with pytest.raises(RuntimeError, match=r"cannot start quantize on device 0 \(2x1x1 blocks of 32 threads, 0 bytes"):
        module.quantize(view(x), 0, view(table), view(positions), view(codes), None, 0, 0)


def test_bad_metadata_is_an_exception(module: Any) -> None:
    x, table, positions = torch.zeros(2, 8), make_table(1.0, 128, 8, [0]), torch.tensor([0])
    codes, sums = torch.zeros(2, 8, dtype=torch.int8), torch.zeros(2, dtype=torch.int32)
    good: dict[str, Any] = {"x": view(x), "activation": 0, "table": view(table), "positions": view(positions)}
    good |= {"codes": view(codes), "sums": view(sums)}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"x": view(x)[:3]}, "x is not"),
        ({"x": view(x.double().view(torch.int64))}, "x is int64, expected floating point"),
        ({"activation": 4}, "activation is 4, expected 0 to 3"),
        ({"table": view(table[:0])}, "table has no rows"),
        ({"table": view(table.half())}, "table is float16, expected float32"),
        ({"positions": view(torch.arange(3))}, "positions .* do not divide 2 rows"),
        ({"codes": view(codes[:, :4])}, "codes has size 4 in dimension 1, expected 8"),
        ({"sums": view(sums.long())}, "row_sums is int64, expected int32"),
    ]
    started: list[Any] = []
    module.replace_launches(lambda *launch: started.append(launch))
    try:
        for change, words in wrong:
            with pytest.raises(ValueError, match=words):
                module.quantize(*(good | change).values(), 0, 0)
        assert not started
        module.quantize(*good.values(), 0, 0)
    finally:
        module.replace_launches(None)
    ((name, grid, threads, shared, params, pointers),) = started
    assert (name, grid, threads, shared, pointers) == ("quantize", (2, 1, 1), 32, 0, 5)
    assert params[:8] == x.data_ptr().to_bytes(8, "little")


def test_an_exception_of_the_stand_in_reaches_the_caller(module: Any) -> None:
    def refuse(launch: native.Launch) -> None:
        raise ZeroDivisionError(launch.name)

    arguments = torch.zeros(2, 8), make_table(1.0, 128, 8, [0]), torch.tensor([0])
    with native.replace(refuse), kernels.use_backend("cuda", strict=True):
        with pytest.raises(ZeroDivisionError, match="quantize"):
            kernels.quantize(*arguments)
        assert kernels.quantize(arguments[0][:0], *arguments[1:])[0].shape == (0, 8)  # an empty grid starts nothing
    with pytest.raises(kernels.BackendError), kernels.use_backend("cuda", strict=True):
        kernels.quantize(*arguments)  # CPU tensors, and nothing stands in for the GPU


# --- where it can run -------------------------------------------------------------------------------------------------


def test_doctor_says_what_the_module_is_made_for(module: Any) -> None:
    report = {status.backend: status for status in kernels.doctor()}
    names = list(report)
    assert names.index("cuda") < names.index("triton") < names.index("cpu") < names.index("reference")
    assert "compiled for compute capability " in report["cuda"].reason
    driver = {12: "r525", 13: "r580"}[module.runtime_version() // 1000]
    assert f"needs driver {driver} or newer" in report["cuda"].reason


def test_capabilities() -> None:
    everything = [80, 86, 89, 90, 100, 120]
    assert "needs compute capability 8.0" in str(support.capability_refused(75, everything))
    for capability in (80, 86, 87, 89, 90, 100, 103, 120, 121):
        assert support.capability_refused(capability, everything) is None
    for capability in (80, 86, 89, 90, 120):
        assert support.capability_refused(capability, [80]) is None  # machine code, or PTX
    assert support.capability_refused(89, [86, 90]) is None
    for capability, compiled in ((80, [86]), (80, [90]), (89, [80 + 10, 100])):
        assert f"PTQ4ARVG_CUDA_ARCHS={capability}" in str(support.capability_refused(capability, compiled))


# --- how it is built --------------------------------------------------------------------------------------------------


def test_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "known_architectures", lambda nvcc: {75, 80, 86, 87, 89, 90, 100, 120})
    nvcc = Path("nvcc")
    monkeypatch.delenv("PTQ4ARVG_CUDA_ARCHS", raising=False)
    assert cuda.architectures(nvcc) == [80, 86, 89, 90, 100, 120]
    monkeypatch.setenv("PTQ4ARVG_CUDA_ARCHS", "90;80, 87")
    assert cuda.architectures(nvcc) == [80, 87, 90]
    assert cuda.code_flags([80, 90]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    for wrong, words in (("75", "know 80;86;87"), ("95", "know 80;86;87"), ("sm_80", "expected numbers such as 80;90")):
        monkeypatch.setenv("PTQ4ARVG_CUDA_ARCHS", wrong)
        with pytest.raises(SetupError, match=words):
            cuda.architectures(nvcc)
    monkeypatch.setattr(cuda, "known_architectures", lambda nvcc: {75, 80, 86, 87, 89, 90})
    monkeypatch.delenv("PTQ4ARVG_CUDA_ARCHS")
    assert cuda.architectures(nvcc) == [80, 86, 89, 90]


def test_whether_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, meaning in ((None, "auto"), ("", "auto"), ("AUTO", "auto"), ("0", "0"), ("1", "1")):
        if value is None:
            monkeypatch.delenv("PTQ4ARVG_BUILD_CUDA", raising=False)
        else:
            monkeypatch.setenv("PTQ4ARVG_BUILD_CUDA", value)
        assert cuda.wanted() == meaning
    monkeypatch.setenv("PTQ4ARVG_BUILD_CUDA", "yes")
    with pytest.raises(SetupError, match="expected auto, 0 or 1"):
        cuda.wanted()


def _setup(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """setup.py where there is no nvcc."""
    nowhere = {"PATH": "/nowhere", "CUDA_HOME": "", "CUDA_PATH": ""}
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | nowhere | environment, capture_output=True, text=True, check=False
    )


def test_without_nvcc() -> None:
    wanted = _setup("--name", PTQ4ARVG_BUILD_CUDA="1")
    assert wanted.returncode != 0
    assert "there is no nvcc: set CUDA_HOME" in wanted.stderr
    perhaps = _setup("--name", PTQ4ARVG_BUILD_CUDA="auto")
    assert perhaps.returncode == 0, perhaps.stderr
    assert "no nvcc: building without the CUDA kernels" in perhaps.stdout


def test_nvcc_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In CUDA_HOME, then on the PATH, then in the packages of the environment."""
    places = [tmp_path / "home/bin", tmp_path / "path", tmp_path / "site/nvidia/cu13/bin"]
    for place in places:
        place.mkdir(parents=True)
        (place / "nvcc").write_text("#!/bin/sh\n")
        (place / "nvcc").chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", str(places[1]))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    assert cuda.find_nvcc() == places[0] / "nvcc"
    monkeypatch.delenv("CUDA_HOME")
    assert cuda.find_nvcc() == places[1] / "nvcc"
    monkeypatch.setenv("PATH", "/nowhere")
    assert cuda.find_nvcc() == places[2] / "nvcc"
    top = tmp_path / "site/nvidia/cu13"
    assert cuda.toolkit_flags(places[2] / "nvcc") == [f"-I{top}/include", f"-L{top}/lib"]
    monkeypatch.setattr(sys, "path", [])
    assert cuda.find_nvcc() is None


def _job(folder: Path, source: Path, text: str = "", *extra: Path) -> Job:
    """Copies a file; its depfile names the others."""
    output, depfile = folder / "a b" / "out", folder / "out.d"
    read = " ".join(str(path).replace(" ", "\\ ") for path in (source, *extra))
    script = f"cat '{source}' > '{output}'; echo run >> '{folder}/log'; printf '%s' 'x: {read}' > '{depfile}'; {text}"
    return Job(("/bin/sh", "-c", script), (source,), output, depfile)


def test_only_what_changed_is_compiled(tmp_path: Path) -> None:
    source, header = tmp_path / "s s", tmp_path / "h"
    source.write_text("1")
    header.write_text("1")
    job = _job(tmp_path, source, "", header)
    assert run_needed([job]) == 1
    assert run_needed([job]) == 0
    for path in (source, header):
        os.utime(path, (2**32, 2**32))  # newer than the output
        assert job.needed()
        os.utime(path, (0, 0))
    assert not job.needed()
    other = _job(tmp_path, source, "true", header)  # another command
    assert run_needed([other]) == 1
    header.unlink()
    assert other.needed()


def test_a_compiler_that_fails_is_an_error_each_time(tmp_path: Path) -> None:
    source = tmp_path / "s"
    source.write_text("1")
    job = _job(tmp_path, source, "echo words; exit 3")
    for _ in range(2):
        with pytest.raises(CompileError, match="words"):
            run_needed([job])


def test_names_in_a_depfile() -> None:
    assert dependencies("a\\ b.o: x/a.cu \\\n  /y\\ z/b.h \\\n c.h\n") == [
        Path("x/a.cu"),
        Path("/y z/b.h"),
        Path("c.h"),
    ]


# --- the emulator's view of a launch ----------------------------------------------------------------------------------


def test_addresses_are_found_in_the_tensors_of_a_call() -> None:
    memory = torch.arange(64, dtype=torch.float32)
    whole, row, tail = memory.view(4, 16), memory[16:32], memory[16:]
    at = memory.data_ptr()
    found = locate(at + 64, [whole, row, tail])
    assert found is not None
    assert (found.offset, found.size) == (64, 192)  # of those that begin there, the largest
    found = locate(at + 72, [whole, row])
    assert found is not None
    assert (found.offset, found.size) == (72, 56)  # of those around it, the smallest
    assert locate(at + 256, [whole, row]) is None
    assert locate(at, [whole[:0]]) is None
    launch = native.Launch("k", (1, 1, 1), 32, 0, (at + 256).to_bytes(8, "little"), 1, (whole,))
    with pytest.raises(PTXError, match="pointer 0 of its parameters lies in no tensor"):
        parameter(launch)


def test_kernels_are_cut_out_of_their_file(module: Any) -> None:
    text = source_ptx("adaln_quant_2")
    assert len(kernels_in(text)) > 1
    alone = only(text, "adaln_quant_2")
    assert kernels_in(alone) == ["adaln_quant_2"]
    head = text[: text.index(".visible .entry")]
    assert ".target sm_80" in head
    assert alone.startswith(head)
    assert alone.count("{") == alone.count("}")
    with pytest.raises(PTXError, match="there is no kernel gemm"):
        only(text, "gemm")
    with pytest.raises(PTXError, match="no CUDA source has a kernel"):
        source_ptx("adaln_quant_9")
