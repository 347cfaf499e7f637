"""The stand-in for a GPU: specialization as Triton's own, views and aliases, hazards, planted bugs, records."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import BaseBackend
from triton.runtime.jit import JITFunction

from ptq4arvg_kernels.backends.triton import launch
from ptq4arvg_kernels.backends.triton.launch import Launch
from tests.ptxsim import HazardError, MemFault, PTXError, UnsupportedInstruction
from tests.ptxsim import triton_cases as cases
from tests.ptxsim.triton_launcher import ELEMENT_TYPES, EmulatedDevice, compile_kernel, specialize

pytestmark = cases.COMPILED_ONLY


def add(x: Tensor, y: Tensor, out: Tensor, n: int, block: int = 256) -> Launch:
    arguments = {"x": x, "y": y, "out": out, "n": n}
    return Launch(cases.vector_add, (-(-n // block),), arguments, {"BLOCK": block}, 4, 1)


def start(device: EmulatedDevice, *launches: Launch) -> None:
    with launch.replace(device):
        for each in launches:
            launch.start(each)


# ------------------------------------------------------------------------------------ results in place
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int32, torch.int64])
def test_results_are_written_in_place(dtype: torch.dtype) -> None:
    x, y = torch.arange(500).to(dtype), (torch.arange(500) % 7).to(dtype)
    out = torch.full((512,), 9).to(dtype)
    start(EmulatedDevice(), add(x, y, out, 500))
    assert torch.equal(out[:500], x + y)
    assert (out[500:] == 9).all()  # the mask


def test_views_of_larger_storages() -> None:
    base = torch.arange(1000.0)
    x, y, out = base[3:503], base[100:600], torch.zeros(3, 700)
    start(EmulatedDevice(), add(x, y, out[1, 50:550], 500))
    assert torch.equal(out[1, 50:550], x + y)
    out[1, 50:550] = 0
    assert not out.any()


def test_views_of_one_storage_alias() -> None:
    """Four launches add the first half of a buffer to its second half, as on a GPU."""
    base = torch.ones(512)
    device = EmulatedDevice()
    start(device, *[add(base[:256], base[256:], base[256:], 256)] * 4)
    assert (base[:256] == 1).all()
    assert (base[256:] == 5).all()


def test_access_beyond_the_view_is_an_error() -> None:
    """Although the storage goes on, a kernel has no business there."""
    base = torch.zeros(1000)
    with pytest.raises(MemFault, match=r"out-of-bounds global load .* of arg 0 \(x\)"):
        start(EmulatedDevice(), add(base[:400], torch.zeros(500), torch.zeros(500), 500))


def test_empty_grids_do_not_start() -> None:
    device = EmulatedDevice()
    start(device, add(torch.zeros(0), torch.zeros(0), torch.zeros(0), 0))
    assert device.records == []


# ------------------------------------------------------------------------------------ specialization
@triton.jit
def every_kind(pointer, absent, integer, wide: tl.int64, real, half_real: tl.float32, flag, N: tl.constexpr, late=3):
    tl.store(pointer, integer + wide + late)


@triton.jit(do_not_specialize=["integer"], do_not_specialize_on_alignment=["pointer"])
def unspecialized(pointer, integer):
    tl.store(pointer, integer)


def triton_view(kernel: JITFunction, arguments: dict[str, Any]) -> tuple[dict[str, str], set[str]]:
    """Signature and aligned arguments by Triton's own code, as its launcher calls it."""
    signature, aligned = {}, set()
    for parameter in kernel.params:
        value = arguments.get(parameter.name, parameter.default)
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            continue
        align = not parameter.do_not_specialize_on_alignment
        kind, key = native_specialize_impl(
            BaseBackend, value, parameter.is_const, not parameter.do_not_specialize, align
        )
        declared = parameter.annotation_type
        if declared.startswith("fp") or declared == "u1":
            kind, key = declared, None
        elif declared:
            kind = declared
        signature[parameter.name] = kind
        if isinstance(key, str) and "D" in key:
            aligned.add(parameter.name)
    return signature, aligned


@pytest.mark.parametrize(
    "integer", [0, 1, -1, 16, 17, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**40, 2**63 - 1, 2**63]
)
@pytest.mark.parametrize("offset", [0, 1, 4, 8])
def test_specialization_is_that_of_triton(integer: int, offset: int) -> None:
    arguments = {
        "pointer": torch.zeros(64)[offset:],
        "absent": None,
        "integer": integer,
        "wide": 16 if offset else 1,
        "real": 1.0,
        "half_real": 16,
        "flag": True,
        "N": 5,
    }
    signature, aligned = triton_view(every_kind, arguments)
    got = specialize(every_kind, arguments)
    assert got.signature == signature
    assert set(got.aligned) == aligned
    assert got.constants["N"] == 5
    assert got.constants["absent"] is None
    assert ("integer" in got.constants) == (integer == 1)

    few = {"pointer": torch.zeros(4), "integer": integer}
    signature, aligned = triton_view(unspecialized, few)
    got = specialize(unspecialized, few)
    assert got.signature == signature
    assert set(got.aligned) == aligned == set()


@pytest.mark.parametrize("dtype", ELEMENT_TYPES)
def test_pointer_types_are_those_of_triton(dtype: torch.dtype) -> None:
    arguments = {
        "pointer": torch.zeros(4, dtype=torch.uint8).view(dtype) if dtype.itemsize == 1 else torch.zeros(4).to(dtype)
    }
    arguments["integer"] = 2
    assert specialize(unspecialized, arguments).signature == triton_view(unspecialized, arguments)[0]


@pytest.mark.parametrize("value", [1, 16, 2**33])
def test_specialized_values_arrive(value: int) -> None:
    out = torch.zeros(1, dtype=torch.int64)
    arguments = {
        "pointer": out,
        "absent": None,
        "integer": value,
        "wide": 2**40,
        "real": 0.0,
        "half_real": 1.0,
        "flag": False,
    }
    start(EmulatedDevice(), Launch(every_kind, (1,), arguments, {"N": 1}, 1, 1))
    assert out.item() == value + 2**40 + 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pointer": torch.zeros(1)}, "without its argument integer"),
        ({"pointer": torch.zeros(1), "integer": 1, "more": 2}, "no parameter more"),
        ({"pointer": torch.zeros(1, dtype=torch.complex64), "integer": 1}, "no pointers to torch"),
        ({"pointer": torch.zeros(1), "integer": "1"}, "str is nothing"),
    ],
)
def test_arguments_that_triton_would_refuse(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        specialize(unspecialized, arguments)


def test_only_compiled_functions_are_taken() -> None:
    with pytest.raises(TypeError, match=r"triton\.jit function"):
        start(EmulatedDevice(), Launch(cases.vector_add.fn, (1,), {}, {}, 4, 1))


def test_tensors_of_other_devices_are_refused() -> None:
    meta = torch.zeros(4, device="meta")
    with pytest.raises(TypeError, match="x is on meta"):
        start(EmulatedDevice(), add(meta, meta, meta, 4))


def test_equal_specializations_compile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(64)
    compiled, _ = compile_kernel(cases.vector_add, {"x": x, "y": x, "out": x, "n": 32, "BLOCK": 64}, 2, 1)
    monkeypatch.setattr(triton, "compile", lambda *args, **kwargs: pytest.fail("compiled again"))
    again, _ = compile_kernel(cases.vector_add, {"x": x, "y": x, "out": x.clone(), "n": 48, "BLOCK": 64}, 2, 1)
    assert again is compiled


def test_floats_are_not_fused() -> None:
    """a * b + c in two roundings, whatever Triton's default is."""
    x = torch.tensor([1 + 2.0**-12, 3.0])
    arguments = {"x": x, "out": (out := torch.zeros(2))}
    start(EmulatedDevice(), Launch(square_minus_one, (1,), arguments, {}, 1, 1))
    assert torch.equal(out, x * x - 1)
    assert out[0].double() != x[0].double() ** 2 - 1


@triton.jit
def square_minus_one(x, out):
    v = tl.load(x + tl.arange(0, 2))
    tl.store(out + tl.arange(0, 2), v * v - 1.0)


# ------------------------------------------------------------------------------------ planted bugs
def without(pattern: str, occurrence: int = 0) -> Any:
    """A transform that deletes one line of PTX."""

    def transform(text: str) -> str:
        found = list(re.finditer(pattern, text))
        assert len(found) > occurrence, f"the kernel has no {pattern}"
        begin, end = found[occurrence].span()
        return text[:begin] + text[end:]

    return transform


def transposition() -> Launch:
    x = torch.arange(64 * 64, dtype=torch.int32).reshape(64, 64)
    return Launch(cases.shared_exchange, (1,), {"x": x, "out": torch.zeros_like(x)}, {"BLOCK": 64}, 4, 1)


def gemm() -> Launch:
    a, b = torch.ones(16, 512, dtype=torch.int8), torch.ones(64, 512, dtype=torch.int8)
    arguments = {"a": a, "b": b, "c": torch.zeros(16, 64, dtype=torch.int32), "M": 16, "N": 64, "K": 512}
    return Launch(cases.int8_gemm, (1, 1), arguments, {"BM": 16, "BN": 64, "BK": 64}, 4, 3)


def test_a_kernel_through_shared_memory_is_right() -> None:
    each = transposition()
    start(EmulatedDevice(), each)
    assert torch.equal(each.arguments["out"], each.arguments["x"].T)


def test_a_deleted_barrier_is_a_race() -> None:
    with pytest.raises(HazardError, match="race-RAW"):
        start(EmulatedDevice(transform=without(r"bar\.sync[^;]*;")), transposition())


def test_a_deleted_wait_is_a_pending_copy() -> None:
    start(EmulatedDevice(), gemm())
    with pytest.raises(HazardError, match=r"cp\.async-pending"):
        start(EmulatedDevice(transform=without(r"cp\.async\.wait_group[^;]*;")), gemm())


def test_a_deleted_barrier_gives_wrong_numbers_one_warp_at_a_time() -> None:
    each = transposition()
    device = EmulatedDevice(transform=without(r"bar\.sync[^;]*;"), hazards="off", schedule="warp_serial")
    start(device, each)
    assert not torch.equal(each.arguments["out"], each.arguments["x"].T)


def test_edited_code_stays_with_its_device() -> None:
    with pytest.raises(UnsupportedInstruction, match="frobnicate"):
        start(EmulatedDevice(transform=lambda text: text.replace("bar.sync", "frobnicate", 1)), transposition())
    start(EmulatedDevice(), transposition())


def test_hazards_can_be_recorded() -> None:
    device = EmulatedDevice(transform=without(r"bar\.sync[^;]*;"), hazards="record")
    start(device, transposition())
    assert {finding["kind"] for finding in device.records[0].result.findings} == {"race-RAW"}


# ------------------------------------------------------------------------------------ records
def test_records_keep_counters_in_order() -> None:
    device = EmulatedDevice()
    start(device, transposition(), gemm())
    assert [record.name for record in device.records] == ["shared_exchange", "int8_gemm"]
    traffic = device.results("shared_exchange")[0].metrics()
    assert traffic["global_load_bytes"] == traffic["global_store_bytes"] == 64 * 64 * 4
    assert device.results("int8_gemm")[0].classes["mma"] > 0
    assert "IMMA" in device.records[1].compiled.sass()


def test_records_can_be_left_out() -> None:
    device = EmulatedDevice(record=False)
    start(device, gemm())
    assert device.records == []


def test_only_some_blocks() -> None:
    x, out = torch.ones(512), torch.zeros(512)
    start(EmulatedDevice(ctas=[1]), add(x, x, out, 512))
    assert out.tolist() == [0.0] * 256 + [2.0] * 256


def test_a_promise_of_alignment_is_kept_by_the_launcher() -> None:
    """Compiled for 16-byte loads and started on other pointers, the kernel would fault."""
    x = torch.zeros(1024)
    compiled, _ = compile_kernel(cases.vector_add, {"x": x, "y": x, "out": x, "n": 512, "BLOCK": 512}, 4, 1)
    data = torch.zeros(1024).numpy()
    with pytest.raises(MemFault, match="misaligned"):
        compiled.launch(1, [(data, 4), data, data, 512])
    start(EmulatedDevice(), add(x[1:513], x[:512], torch.zeros(512), 512, 512))


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 120])
def test_every_executable_architecture(capability: int) -> None:
    each = gemm()
    start(EmulatedDevice(capability), each)
    assert (each.arguments["c"] == 512).all()


def test_shared_memory_beyond_the_device_is_an_error() -> None:
    """100 KiB fit sm_80 and not sm_86."""
    a, b = torch.ones(128, 512, dtype=torch.int8), torch.ones(128, 512, dtype=torch.int8)
    arguments = {"a": a, "b": b, "c": torch.zeros(128, 128, dtype=torch.int32), "M": 128, "N": 128, "K": 512}
    big = Launch(cases.int8_gemm, (1, 1), arguments, {"BM": 128, "BN": 128, "BK": 128}, 8, 5)
    start(EmulatedDevice(80), big)
    with pytest.raises(PTXError, match="exceed the 101376 of sm_86"):
        start(EmulatedDevice(86), big)
