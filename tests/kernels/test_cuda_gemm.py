"""The GEMM of the CUDA backend: compiled to PTX for sm_80 and emulated. Every kernel that a plan can choose, every
operator against the reference, planted bugs, and what the main loops are made of."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ptq4arvg_kernels as kernels
from ptq4arvg_kernels.backends import scratch
from ptq4arvg_kernels.backends.cuda import linear, native
from ptq4arvg_kernels.backends.views import NORMS
from tests.kernels import cuda_cases
from tests.kernels.cuda_cases import device
from tests.kernels.kernel_cases import generator, linear_case, random_table
from tests.kernels.linear_cases import DTYPES, ROWS, WIDTH_NAMES, WIDTHS, assert_same, epilogues, integers
from tests.ptxsim.cuda_sources import only, source_ptx

pytestmark = pytest.mark.skipif(not cuda_cases.available(), reason=cuda_cases.NO_NVCC)

FLOAT_EPS = 2.0**-20
TILES = ["16x64", "16x32", "32x64", "32x32", "64x128", "64x64", "104x128", "128x128"]
NORM_TILES = ["16x64", "16x32"]
A100 = (80, 108, 166912)
# Capability, multiprocessors, bytes of shared memory that a block may have: A100, RTX 3090, RTX 4090, H100, B200, 5090.
DEVICES = [A100, (86, 82, 101376), (89, 128, 101376), (90, 132, 232448), (100, 148, 232448), (120, 170, 101376)]


@contextlib.contextmanager
def on(backend: str, **options: Any) -> Iterator[Any]:
    if backend == "reference":
        with kernels.use_backend("reference", strict=True):
            yield None
        return
    with device(**options) as emulated, kernels.use_backend("cuda", strict=True):
        yield emulated


def plans(rows: int, out_features: int, in_features: int, bits: int, output: str, device: Any = A100) -> list[Any]:
    return native.module().gemm_plans(rows, out_features, in_features, bits, linear.OUTPUTS[output], device)


def planned(monkeypatch: pytest.MonkeyPatch, tile: str, splits: int = 1) -> None:
    """Have every launch use ``tile`` and split K."""

    def plan(rows: int, out_features: int, in_features: int, bits: int, output: str, device: Any) -> Any:
        found = plans(rows, out_features, in_features, bits, output, device)
        return next(how for how in found if f"_{tile}_" in how.kernel and how.splits == splits)

    monkeypatch.setattr(linear, "plan", plan)


def compare(calls: dict[str, Callable[[], Any]], **options: Any) -> None:
    for name, call in calls.items():
        with on("cuda", **options):
            got = call()
        with on("reference"):
            assert_same(name, got, call(), FLOAT_EPS)


# --- integers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("w_bits", "act_bits"), WIDTHS[:2] + WIDTHS[3:], ids=WIDTH_NAMES[:2] + WIDTH_NAMES[3:])
def test_row_counts(w_bits: int, act_bits: list[int]) -> None:
    """Extreme codes at every edge of the row tiles, K with a ragged step."""
    full = linear_case(129, 72, 208, w_bits, act_bits, extreme=True, bias=False, unit=True)
    expected = full.corrected().astype(np.float32)
    with on("cuda"):
        for rows in ROWS:
            assert np.array_equal(integers(dataclasses.replace(full, codes=full.codes[:rows])), expected[:rows]), rows


@pytest.mark.slow
@pytest.mark.parametrize(("w_bits", "act_bits"), WIDTHS, ids=WIDTH_NAMES)
@pytest.mark.parametrize("extreme", [False, True], ids=["random", "extreme"])
def test_every_row_count(w_bits: int, act_bits: list[int], extreme: bool) -> None:
    full = linear_case(129, 70, 300, w_bits, act_bits, extreme=extreme, bias=False, unit=True)
    expected = full.corrected().astype(np.float32)
    with on("cuda"):
        for rows in range(1, 130):
            assert np.array_equal(integers(dataclasses.replace(full, codes=full.codes[:rows])), expected[:rows]), rows


@pytest.mark.parametrize("w_bits", [6, 8])
@pytest.mark.parametrize("in_features", [1, 16, 33, 64, 96, 128, 144, 320, 1408])
def test_lengths(w_bits: int, in_features: int) -> None:
    """K that ends within a chunk, a brick, a step of the pipeline, and shorter than the pipeline is deep."""
    case = linear_case(3, 34, in_features, w_bits, [8], extreme=True, bias=False, unit=True)
    with on("cuda"):
        assert np.array_equal(integers(case), case.corrected().astype(np.float32))


@pytest.mark.parametrize("w_bits", [6, 8])
@pytest.mark.parametrize(
    "rows", [2, pytest.param(40, marks=pytest.mark.slow), pytest.param(130, marks=pytest.mark.slow)]
)
def test_the_longest_sums(w_bits: int, rows: int) -> None:
    case = linear_case(rows, 64, 8704, w_bits, [8], extreme=True, bias=False, unit=True)
    with on("cuda"):
        assert np.array_equal(integers(case), case.corrected().astype(np.float32))


@pytest.mark.slow
@pytest.mark.parametrize(("w_bits", "act_bits"), WIDTHS, ids=WIDTH_NAMES)
@pytest.mark.parametrize("layer", [(3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096)], ids=str)
def test_layer_shapes(w_bits: int, act_bits: list[int], layer: tuple[int, int]) -> None:
    """The layers of rar_l with the plans of an A100."""
    for rows in (2, 16, 60, 200):
        case = linear_case(rows, *layer, w_bits, act_bits, period=2, bias=False, unit=True)
        with on("cuda"):
            assert np.array_equal(integers(case), case.corrected().astype(np.float32)), rows


# --- every kernel -----------------------------------------------------------------------------------------------------


def test_these_are_all_kernels() -> None:
    """What the tests below run is what the module has."""
    names = {f"gemm_w{bits}_{tile}_{output}" for bits in (6, 8) for tile in TILES for output in linear.OUTPUTS}
    names |= {f"gemm_norm_w{bits}_{tile}_{out}" for bits in (6, 8) for tile in NORM_TILES for out in ("store", "quant")}
    assert names == {name for name in native.module().kernels() if name.startswith("gemm")}


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("w_bits", "act_bits"), WIDTHS[::3], ids=WIDTH_NAMES[::3])
def test_every_kernel(monkeypatch: pytest.MonkeyPatch, tile: str, w_bits: int, act_bits: list[int]) -> None:
    """Every output of a tile on a ragged shape of four blocks, one after the other warp."""
    planned(monkeypatch, tile)
    rows, channels = map(int, tile.split("x"))
    case = linear_case(rows + 3, channels + 36, 400, w_bits, act_bits, extreme=w_bits == 8)
    calls = epilogues(case, DTYPES[TILES.index(tile) % 3])
    for name in ("linear silu", "linear gelu_erf", "linear gelu_tanh"):
        del calls[name]
    for name, call in calls.items():
        with on("cuda", schedule="warp_reverse" if name == "linear none" else "lockstep") as emulated:
            got = call()
        assert {tile in record.name for record in emulated.records} == {True}
        with on("reference"):
            assert_same(f"{name}", got, call(), FLOAT_EPS)


@pytest.mark.slow
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("w_bits", "act_bits"), WIDTHS, ids=WIDTH_NAMES)
@pytest.mark.parametrize("schedule", ["warp_serial", "random"])
def test_every_kernel_thoroughly(
    monkeypatch: pytest.MonkeyPatch, tile: str, w_bits: int, act_bits: list[int], schedule: str
) -> None:
    """Every operator, dtype and gate; rows of an odd length."""
    planned(monkeypatch, tile)
    rows, channels = map(int, tile.split("x"))
    for i, dtype in enumerate(DTYPES):
        case = linear_case(rows + 5, channels + 17 + i, 336, w_bits, act_bits, bias=i != 1)
        compare(epilogues(case, dtype, ["none", "rows", "per_sample"][i]), schedule=schedule)


def test_split_k_is_exact_and_leaves_its_counters_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    for w_bits, tile, splits in ((8, "16x64", 2), (6, "16x32", 3)):
        planned(monkeypatch, tile, splits)
        case = linear_case(2, 72, 4000, w_bits, [8], extreme=True, bias=False, unit=True)
        expected = case.corrected().astype(np.float32)
        with on("cuda") as emulated:
            for _ in range(2):
                assert np.array_equal(integers(case), expected)
        assert [record.launch.grid[2] for record in emulated.records] == [splits, splits]
    assert not scratch.counters(torch.device("cpu"), 1).any()


@pytest.mark.parametrize("tile", ["16x32", pytest.param("32x64", marks=pytest.mark.slow)])
def test_every_output_of_a_split(monkeypatch: pytest.MonkeyPatch, tile: str) -> None:
    """The last block in the order of the grid is not the last to arrive."""
    planned(monkeypatch, tile, 2)
    case = linear_case(3, 68, 6016, 6, [8, 6], period=3)
    calls = epilogues(case, torch.float16)
    for name in ("linear none", "linear_quant", "linear_gate_residual", "linear_swiglu_quant"):
        with on("cuda", schedule="warp_serial", batch=1) as emulated:
            got = calls[name]()
        grid = emulated.records[0].launch.grid
        with on("cuda", batch=1, ctas=list(reversed(range(grid[0] * grid[1] * grid[2])))):
            again = calls[name]()
        with on("reference"):
            want = calls[name]()
        assert_same(name, got, want, FLOAT_EPS)
        assert_same(name, again, want, FLOAT_EPS)


# --- operators --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("w_bits", "dtype"), [(8, torch.float16), (6, torch.bfloat16), (6, torch.float32)], ids=str)
def test_epilogues(w_bits: int, dtype: torch.dtype) -> None:
    compare(epilogues(linear_case(18, 76, 400, w_bits, [8, 6], period=3), dtype))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("gating", "dtype"), list(zip(["none", "rows", "per_sample"], DTYPES, strict=True)), ids=str)
def test_channels_that_are_no_multiple_of_four(gating: str, dtype: torch.dtype, bias: bool) -> None:
    for width in (1, 33, 70):
        case = linear_case(5, width, 64, 8, [8], bias=bias)
        compare(epilogues(case, dtype, gating))


def test_operands_that_vectors_cannot_be_read_from() -> None:
    """A gate that begins between two vectors, codes that do not begin at a multiple of 16."""
    case = linear_case(5, 64, 128, 8, [8])
    gate = torch.randn(5, 65, generator=generator(1)).half()[:, 1:]
    residual = torch.randn(5, 64, generator=generator(2)).half()
    shifted = torch.cat([torch.zeros(3, dtype=torch.int8), case.codes.flatten()])[3:].view(5, 128)
    for codes in (case.codes, shifted):
        operands = (codes, *case.operands[1:], gate, None, residual)
        compare({"linear_gate_residual": functools.partial(kernels.linear_gate_residual, *operands)})


def test_a_residual_stream_is_updated_in_place() -> None:
    """As in a prepared block: the output is the residual."""
    case = linear_case(5, 72, 128, 6, [8])
    call = epilogues(case, torch.float16, "none")["linear_gate_residual"]
    with on("reference"):
        want = call()
    x = torch.randn(5, 72, generator=generator(3)).half()
    with on("cuda"):
        linear.start_gemm("gate_residual", case.operands, x, residual=x)
    assert torch.equal(x, want)


def test_indices_outside_are_clamped() -> None:
    """A position or a row of the gate that does not exist reads the nearest one: no access leaves an operand."""
    case = linear_case(6, 33, 64, 8, [8], period=3)
    wild = torch.tensor([-7, 1, 2**40])
    tame = torch.tensor([0, 1, len(case.table) - 1])
    gate, residual = torch.randn(2, 33, generator=generator(0)), torch.zeros(6, 33)
    rows = [torch.tensor(index, dtype=torch.int32) for index in ([-1, 0, 1, 2, 9, 2**31 - 1], [0, 0, 1, 1, 1, 1])]
    out_table = random_table(len(case.table), [8], seed=5, step=0.05)
    results = []
    with on("cuda"):
        for positions, index in zip((wild, tame), rows, strict=True):
            layer = (*case.operands[:9], positions)
            results.append(
                (
                    kernels.linear(*layer, "none", torch.float32),
                    *kernels.linear_quant(*layer, "none", out_table),
                    kernels.linear_gate_residual(*layer, gate, index, residual),
                )
            )
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_narrow_positions() -> None:
    case = linear_case(6, 40, 64, 8, [8], period=3)
    layer = (*case.operands[:9], case.positions.int())
    compare({"linear none": lambda: kernels.linear(*layer, "none", torch.float16)})


def test_codes_do_not_depend_on_the_batch() -> None:
    """Nor do floats: one row, and the same row among others, in other tiles."""
    full = linear_case(66, 72, 400, 6, [8])
    calls = {rows: epilogues(dataclasses.replace(full, codes=full.codes[:rows]), torch.float16) for rows in (1, 20, 66)}
    for name in ("linear gelu_tanh", "linear_quant"):
        with on("cuda"):
            results = [calls[rows][name]() for rows in calls]
        first = [(result[0] if isinstance(result, tuple) else result)[0] for result in results]
        assert torch.equal(first[0], first[1])
        assert torch.equal(first[0], first[2])


# --- normalising kernels ----------------------------------------------------------------------------------------------


def _norm_operands(rows: int, width: int, dtype: torch.dtype, kind: str = "layer") -> tuple[Any, ...]:
    """(x, kind, eps, weight, bias, scale, shift, mod_rows, offset)"""
    gen = generator(width)
    x = (3 * torch.randn(rows, width, generator=gen) + 1).to(dtype)
    scale, shift = torch.randn(3, 2 * width, generator=gen).to(dtype).chunk(2, dim=1)
    index = torch.randint(0, 3, (rows,), generator=gen, dtype=torch.int32)
    weight = torch.randn(width, generator=gen) if kind == "rms" else None
    return x, kind, 1e-6, weight, None, scale, shift, index, 1.0


@pytest.mark.parametrize("tile", NORM_TILES)
@pytest.mark.parametrize(
    ("w_bits", "rows", "width", "dtype", "kind"),
    [
        (8, 1, 320, torch.float16, "layer"),
        (6, 16, 768, torch.bfloat16, "layer"),
        (6, 9, 1408, torch.float32, "rms"),
        pytest.param(8, 15, 3584, torch.float16, "layer", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_norm_in_front(tile: str, w_bits: int, rows: int, width: int, dtype: torch.dtype, kind: str) -> None:
    """Codes are those of adaln_quant to the last bit, so that nothing differs from two launches."""
    norm = _norm_operands(rows, width, dtype, kind)
    case = linear_case(rows, 120, width, w_bits, [8, 6], period=rows if rows < 9 else 1)
    out_table = random_table(len(case.table), [8, 6], seed=5, step=0.05)
    x, *others = norm
    operands = (None, None, *case.operands[2:])
    for output, schedule in (("store", "lockstep"), ("quant", "warp_serial")):
        with on("cuda", schedule=schedule):
            codes, sums = kernels.adaln_quant(x, *others, case.table, case.positions)
            layer = (codes, sums, *case.operands[2:])
            how = next(how for how in _norm_plans(rows, 120, width, w_bits, output) if f"_{tile}_" in how.kernel)
            numbered = (x, NORMS[kind], *norm[2:])
            if output == "store":
                want = kernels.linear(*layer, "none", dtype)
                got = torch.full_like(want, float("nan"))
                linear.start_gemm("store", operands, got, how=how, norm=numbered)
                assert torch.equal(got, want)
            else:
                want = kernels.linear_quant(*layer, "gelu_tanh", out_table)
                got, new_sums = torch.full_like(want[0], 99), torch.zeros_like(want[1])
                linear.start_gemm("quant", operands, got, 3, sums=new_sums, out_table=out_table, how=how, norm=numbered)
                assert torch.equal(got, want[0])
                assert torch.equal(new_sums, want[1])


def _norm_plans(rows: int, out_features: int, in_features: int, bits: int, output: str) -> list[Any]:
    """The plans of devices that have so many multiprocessors that narrow tiles pay, or so few that wide ones do."""
    found = {}
    for count in (1, 4, 200):
        how = native.module().plan_gemm_norm(
            rows, out_features, in_features, bits, linear.OUTPUTS[output], (80, count, A100[2])
        )
        if how is not None:
            found[how.kernel] = how
    return list(found.values())


# --- plans ------------------------------------------------------------------------------------------------------------

LAYERS = [(3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096), (1408, 6144), (4224, 1408), (5760, 1920), (1000, 768)]


@pytest.mark.parametrize("limits", DEVICES, ids=lambda limits: str(limits[0]))
def test_plans_fit_and_cover(limits: tuple[int, int, int]) -> None:
    for bits in (6, 8):
        for n, k in LAYERS:
            for rows in (1, 2, 16, 17, 64, 65, 200, 512, 5000):
                how = linear.plan(rows, n, k, bits, "quant", limits)
                assert how.shared + 1024 <= limits[2]
                assert how.grid[0] == -(-rows // how.rows)
                assert how.grid[1] == -(-n // how.channels)
                steps = -(-k // how.step_k)
                per_part = -(-steps // how.splits)
                assert (how.splits - 1) * per_part < steps, "no part is empty"
                assert how == linear.plan(rows, n, k, bits, "quant", limits), "a pure function"


@pytest.mark.parametrize("bits", [6, 8])
def test_what_is_asked_of_memory(bits: int) -> None:
    """Partial sums add at most 2 % to the packed weights per row tile and the codes per column tile."""
    for n, k in LAYERS:
        for rows in (1, 2, 16, 64, 200, 512):
            how = linear.plan(rows, n, k, bits, "store", A100)
            weights = -(-n // how.channels) * how.channels * -(-k // 128) * 128 * bits // 8
            least = how.grid[0] * weights + how.grid[1] * rows * k
            assert least <= how.asked <= 1.02 * least


@pytest.mark.parametrize("limits", DEVICES, ids=lambda limits: str(limits[0]))
def test_of_plans_that_are_as_fast_the_thrifty_one_is_taken(limits: tuple[int, int, int]) -> None:
    """Few rows too many are no reason to fetch all weights once per sixteen rows: 1024 x 1024 at 200 rows did."""

    def products(how: Any) -> int:
        return how.grid[0] * how.rows * how.grid[1] * how.channels

    for bits in (6, 8):
        for n, k in LAYERS:
            for rows in (1, 2, 16, 33, 64, 100, 200, 512):
                found = plans(rows, n, k, bits, "store", limits)
                how = linear.plan(rows, n, k, bits, "store", limits)
                equal = [plan for plan in found if plan.cycles <= 1.1 * found[0].cycles]
                assert how.kernel in [plan.kernel for plan in equal]
                for plan in equal:
                    assert how.asked <= plan.asked or products(how) < products(plan)


def test_sizes_that_are_not_possible() -> None:
    with pytest.raises(ValueError, match=r"in_features.*8705"):
        linear.plan(1, 32, 8705, 8, "store", A100)
    with pytest.raises(ValueError, match="no tile fits into the 4096 bytes"):
        linear.plan(1, 32, 64, 8, "store", (80, 108, 4096))


# --- traffic and instructions -----------------------------------------------------------------------------------------

# PTX instructions of all warps per 1000 products at N = 4096, K = 1024.
LIMITS = {(8, 16): 2.0, (8, 64): 0.9, (8, 200): 0.9, (6, 16): 3.2, (6, 64): 1.45, (6, 200): 1.1}
# How the main loop reads and fills shared memory; the epilogue uses other instructions.
LOOP_ACCESSES = ("ldmatrix", "ld.shared.v4.b32", "cp.async.cg")


def _measured(rows: int, bits: int) -> Any:
    """The counters of one launch at N = 4096, K = 1024, and its plan: of 128 channels times as many as there are."""
    how = linear.plan(rows, 4096, 1024, bits, "store", A100)
    case = linear_case(rows, 4096, 1024, bits, [8])
    with on("cuda", ctas=[(x, y, 0) for x in range(how.grid[0]) for y in range(128 // how.channels)]) as emulated:
        kernels.linear(*case.operands, "none", torch.float16)
    (record,) = emulated.records
    assert record.name == how.kernel
    return record.result


@pytest.mark.parametrize(("bits", "rows"), LIMITS, ids=str)
def test_instructions(bits: int, rows: int) -> None:
    result = _measured(rows, bits)
    assert 1000 * result.warp_insts / (rows * 128 * 1024) <= LIMITS[bits, rows]
    loop = [counts for (_, text), counts in result.lines.items() if text.startswith(LOOP_ACCESSES)]
    assert loop
    wavefronts, ideal = (sum(counts[i] for counts in loop) for i in (3, 4))
    assert 0 < wavefronts <= 1.02 * ideal


def _sass(kernel: str, arch: int) -> tuple[str, str]:
    """Machine code of one kernel, and what ptxas says of it."""
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "k.ptx"), Path(folder, "k.cubin")
        ptx.write_text(only(source_ptx(kernel), kernel).replace(".target sm_80", f".target sm_{arch}"))
        done = subprocess.run(
            ["ptxas", "-v", f"-arch=sm_{arch}", "-o", str(cubin), str(ptx)], capture_output=True, text=True, check=True
        )
        sass = subprocess.run(["cuobjdump", "-sass", str(cubin)], capture_output=True, text=True, check=True)
        return sass.stdout, done.stderr
