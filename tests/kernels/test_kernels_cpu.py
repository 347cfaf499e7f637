"""The CPU backend: the same bits on every instruction set, number of threads and thread team; threads themselves."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import ptq4arvg_kernels as kernels
from ptq4arvg_kernels.backends.cpu import native
from tests.kernels import cpu_cases
from tests.kernels.cpu_cases import assert_same, results, running, threads
from tests.kernels.kernel_cases import instruction_sets, linear_case

pytestmark = pytest.mark.skipif(not instruction_sets(), reason=f"no CPU backend: {native.WHY_NOT}")
INSTRUCTION_SETS = instruction_sets()
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", cpu_cases.SHAPES)
def test_instruction_sets_agree_bit_for_bit(shape: str) -> None:
    """Integers, codes, caches and floating-point results."""
    with running("portable"):
        want = results(shape)
    for name in INSTRUCTION_SETS:
        with running(name):
            assert_same(results(shape), want)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(instruction_set: str, dtype: torch.dtype) -> None:
    """Every number is read, and any result rounded, as torch does: subnormal, infinite and NaN among them."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(256, 256)
    case = linear_case(256, 256, 3, 8, [8], bias=False)
    scales = torch.exp2(torch.linspace(-40, 20, 256))
    operands = (*case.operands[:5], scales, *case.operands[6:])
    zero = (torch.zeros_like(case.codes), torch.zeros(256, dtype=torch.int32), *case.operands[2:5], torch.zeros(256))
    with running(instruction_set):
        rounded = kernels.linear(*operands, "none", dtype)
        assert torch.equal(rounded, kernels.linear(*operands, "none", torch.float32).to(dtype))
        added = kernels.linear_gate_residual(*zero, *case.operands[6:], None, None, every)
    assert torch.equal(added.isnan(), every.isnan())
    assert torch.equal(added[~added.isnan()], every[~every.isnan()])


@pytest.mark.sanitize
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("gomp", [True, False], ids=["gomp", "std-thread"])
def test_results_do_not_depend_on_threads(instruction_set: str, gomp: bool) -> None:
    with running(instruction_set):
        with threads(1):
            want = results("many")
        for count in (2, 3):
            with threads(count, gomp):
                assert native.module().thread_team() == ("GOMP" if gomp else "std::thread")
                assert_same(results("many"), want)


@pytest.mark.parametrize("gomp", [True, False], ids=["gomp", "std-thread"])
def test_calls_from_two_threads(gomp: bool) -> None:
    """The calls release Python's lock, so they really run at once."""
    want = results("many")
    failures: list[str] = []

    def work() -> None:
        try:
            with kernels.use_backend("cpu", strict=True):
                for _ in range(3):
                    assert_same(results("many"), want)
        except BaseException as error:  # noqa: BLE001 - an assertion in a thread would be lost
            failures.append(repr(error))

    with threads(2, gomp):
        workers = [threading.Thread(target=work) for _ in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not failures


COUNT_THREADS = """
import os
import torch
torch.set_num_threads(2)
from tests.kernels.cpu_cases import results
from ptq4arvg_kernels.backends.cpu import native
count = lambda: len(os.listdir("/proc/self/task"))
torch.randn(1 << 20).add_(1).sum()  # torch starts its team
a = torch.randn(300, 300)
a @ a
before = count()
results("many")
assert native.module().thread_team() == "GOMP", native.module().thread_team()
assert count() == before, (before, count())
native.module().set_thread_team(False)
results("many")
assert count() == before + 1, (before, count())
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in /proc")
def test_no_thread_beyond_those_of_torch() -> None:
    """And one worker beside the caller in the team of our own, which is not used by default."""
    subprocess.run([sys.executable, "-c", COUNT_THREADS], check=True, cwd=ROOT)


def test_selecting_an_instruction_set() -> None:
    module = native.module()
    before = module.instruction_set()
    try:
        for name in INSTRUCTION_SETS:
            assert module.select(name)
            assert module.instruction_set() == name
        assert not module.select("sse2")
        assert module.instruction_set() == INSTRUCTION_SETS[-1]
        names = [name for name, _, _ in module.instruction_sets()]
        assert names == ["amx", "avx512vnni", "avx2", "portable"]
        for name, compiled, supported in module.instruction_sets():
            assert module.select(name) == (compiled and supported)
    finally:
        module.select(before)


def test_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    module = native.module()
    before = module.instruction_set()
    try:
        monkeypatch.setenv("PTQ4ARVG_CPU_ISA", "portable")
        assert native._choose()[1] is None
        assert module.instruction_set() == "portable" or "PTQ4ARVG_CPU_MODULE" in os.environ
        monkeypatch.setenv("PTQ4ARVG_CPU_ISA", "mmx")
        chosen, reason = native._choose()
        assert chosen is None
        assert reason is not None
        assert "'mmx'" in reason
        assert "portable" in reason
    finally:
        module.select(before)
    monkeypatch.delenv("PTQ4ARVG_CPU_ISA")
    monkeypatch.setenv("PTQ4ARVG_CPU_MODULE", "/nowhere/_cpu.so")
    chosen, reason = native._choose()
    assert chosen is None
    assert "PTQ4ARVG_CPU_MODULE is '/nowhere/_cpu.so'" in str(reason)


def test_why_there_is_no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiled module the reference serves, and says why."""

    def missing(name: str, path: str | None = None) -> None:
        raise ImportError("no such module")

    monkeypatch.delenv("PTQ4ARVG_CPU_MODULE", raising=False)
    monkeypatch.setattr(native.modules, "load", missing)
    module, reason = native._choose()
    assert module is None
    assert "install a wheel" in str(reason)
    monkeypatch.setattr(native, "_MODULE", None)
    monkeypatch.setattr(native, "WHY_NOT", reason)
    with pytest.raises(RuntimeError, match=r"the CPU backend is not available: .*no such module"):
        native.module()
    assert {status.backend: status.available for status in kernels.doctor()}["cpu"] is False
    codes, _ = kernels.quantize(torch.ones(1, 1), torch.tensor([[1.0, 1.0, 0.0, 8.0]]), torch.tensor([0]))
    assert codes.tolist() == [[1]]


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_limits_of_the_machine(instruction_set: str) -> None:
    """What benchmarks compare with: some rate, more than nothing."""
    with running(instruction_set):
        for w_bits, act_bits in ((8, 8), (6, 8), (6, 6)):
            assert native.module().measure_products(w_bits, act_bits, 1) > 1e6
    assert native.module().measure_read(1 << 22, 2, 2) > 1e6


EMULATED_SETS = ("amx", "avx512vnni")
ON_HARDWARE = """
import sys
import torch
from ptq4arvg_kernels.backends.cpu import native
from tests.kernels.cpu_cases import SHAPES, results, running
from tests.kernels.kernel_cases import instruction_sets
found = {}
for name in set(sys.argv[2:]) & set(instruction_sets()):
    with running(name):
        found[name] = {shape: results(shape) for shape in SHAPES}
torch.save((native.module().__file__, found), sys.argv[1])
"""


@pytest.fixture(scope="module")
def on_hardware(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, cpu_cases.Results]]]:
    """Results of the installed module, by set and shape. Another process: Python keeps one module of a name."""
    path = tmp_path_factory.mktemp("hardware") / "results.pt"
    environment = {name: value for name, value in os.environ.items() if name != "PTQ4ARVG_CPU_MODULE"}
    command = [sys.executable, "-c", ON_HARDWARE, str(path), *EMULATED_SETS]
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    module, found = torch.load(path)
    assert module != native.module().__file__
    return found


@pytest.mark.skipif("PTQ4ARVG_CPU_MODULE" not in os.environ, reason="run by `make test-emulated`")
@pytest.mark.parametrize("instruction_set", EMULATED_SETS)
@pytest.mark.parametrize("shape", cpu_cases.SHAPES)
def test_emulated_set_equals_the_hardware(
    shape: str, instruction_set: str, on_hardware: dict[str, dict[str, dict[str, cpu_cases.Results]]]
) -> None:
    if instruction_set not in on_hardware:
        pytest.skip(f"this machine has no {instruction_set}")
    with running(instruction_set):
        assert_same(results(shape), on_hardware[instruction_set][shape])
