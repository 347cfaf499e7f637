"""The GEMM of the Triton backend: compiled for sm_80 and emulated, or interpreted. Every operator against the
reference, planted bugs, and what the compiled main loop is made of."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ptq4arvg_kernels as kernels
from tests.kernels.kernel_cases import LinearCase, generator, linear_case, random_table
from tests.kernels.linear_cases import DTYPES, ROWS, WIDTH_NAMES, WIDTHS, assert_same, epilogues, integers

pytest.importorskip("triton")

from benchmarks.sass import resources
from benchmarks.triton_compiled import examine
from ptq4arvg_kernels.backends import gpu, scratch
from ptq4arvg_kernels.backends.gpu import Device
from ptq4arvg_kernels.backends.triton import gemm, linear, support, tiles, weights
from ptq4arvg_kernels.backends.triton.launch import Launch
from ptq4arvg_kernels.backends.triton.tiles import Plan, Tile
from tests.kernels.triton_cases import barriers, device, edited, recorded, without_barrier
from tests.ptxsim import HazardError, MemFault
from tests.ptxsim.triton_launcher import compile_kernel

compiled = pytest.mark.skipif(support.interpreted(), reason="looks at the compiled kernel")
FLOAT_EPS = 2.0**-21


@contextlib.contextmanager
def on(backend: str, **options: Any) -> Iterator[Any]:
    if backend == "reference":
        with kernels.use_backend("reference", strict=True):
            yield None
        return
    with device(**options) as emulated, kernels.use_backend("triton", strict=True):
        yield emulated


def planned(monkeypatch: pytest.MonkeyPatch, tile: Tile, split: int = 1) -> None:
    """Have every launch use ``tile`` and split K."""

    def plan(rows: int, out_features: int, in_features: int, bits: int, device: Device) -> Plan:
        return tiles._with_split(tile, split, rows, out_features, in_features)

    monkeypatch.setattr(linear, "plan", plan)


@pytest.mark.parametrize(("w_bits", "act_bits"), WIDTHS[:2] + WIDTHS[3:], ids=WIDTH_NAMES[:2] + WIDTH_NAMES[3:])
def test_row_counts(w_bits: int, act_bits: list[int]) -> None:
    """Extreme codes at every edge of the row tiles, K with a ragged tile."""
    full = linear_case(129, 72, 208, w_bits, act_bits, extreme=True, bias=False, unit=True)
    expected = full.corrected().astype(np.float32)
    with on("triton"):
        for rows in ROWS:
            assert np.array_equal(integers(dataclasses.replace(full, codes=full.codes[:rows])), expected[:rows]), rows


@pytest.mark.slow
@pytest.mark.parametrize(("w_bits", "act_bits"), WIDTHS, ids=WIDTH_NAMES)
@pytest.mark.parametrize("extreme", [False, True], ids=["random", "extreme"])
def test_every_row_count(w_bits: int, act_bits: list[int], extreme: bool) -> None:
    full = linear_case(129, 70, 300, w_bits, act_bits, extreme=extreme, bias=False, unit=True)
    expected = full.corrected().astype(np.float32)
    with on("triton"):
        for rows in range(1, 130):
            assert np.array_equal(integers(dataclasses.replace(full, codes=full.codes[:rows])), expected[:rows]), rows


@pytest.mark.slow
@pytest.mark.parametrize(("w_bits", "act_bits"), WIDTHS, ids=WIDTH_NAMES)
@pytest.mark.parametrize("layer", [(3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096)], ids=str)
def test_layer_shapes(w_bits: int, act_bits: list[int], layer: tuple[int, int]) -> None:
    """The layers of rar_l with the plans of an A100."""
    for rows in (2, 16, 60, 200):
        case = linear_case(rows, *layer, w_bits, act_bits, period=2, bias=False, unit=True)
        with on("triton"):
            assert np.array_equal(integers(case), case.corrected().astype(np.float32)), rows


@pytest.mark.parametrize(
    ("tile", "split", "w_bits", "act_bits", "dtype"),
    [
        (Tile(16, 32, 128, 2, 3), 1, 8, [8], torch.float16),
        (Tile(16, 32, 128, 2, 3), 3, 6, [8, 6], torch.bfloat16),
        (Tile(64, 128, 128, 4, 3), 1, 6, [8, 6], torch.float16),
        (Tile(64, 128, 128, 4, 3), 2, 8, [8], torch.float32),
    ],
    ids=["W8-whole", "W6-split", "W6-halves", "W8-halves-split"],
)
def test_epilogues(
    monkeypatch: pytest.MonkeyPatch, tile: Tile, split: int, w_bits: int, act_bits: list[int], dtype: torch.dtype
) -> None:
    """Also of tiles that are finished in two halves, the second of which the layer fills in part."""
    planned(monkeypatch, tile, split)
    case = linear_case(18, 76, 400, w_bits, act_bits, period=3)
    for name, call in epilogues(case, dtype).items():
        with on("triton"):
            got = call()
        with on("reference"):
            assert_same(name, got, call(), FLOAT_EPS)


@pytest.mark.parametrize(("gating", "dtype"), list(zip(["none", "rows", "per_sample"], DTYPES, strict=True)), ids=str)
def test_gates(gating: str, dtype: torch.dtype) -> None:
    case = linear_case(5, 33, 64, 8, [8], period=1)
    call = epilogues(case, dtype, gating)["linear_gate_residual"]
    with on("triton"):
        got = call()
    with on("reference"):
        assert torch.equal(got, call())


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("w_bits", "act_bits"), WIDTHS[::3], ids=WIDTH_NAMES[::3])
def test_every_tile(monkeypatch: pytest.MonkeyPatch, capability: int, w_bits: int, act_bits: list[int]) -> None:
    """All tiles of the table with every operator, split and whole, with a bias and without."""
    if support.interpreted() and capability != 80:
        pytest.skip("the interpreter knows no capabilities")
    limits = Device(capability, 108, gpu.SHARED_BYTES[capability])
    seen = {tile for rows in (16, 32, 64, 128) for tile in tiles.candidates(rows, w_bits, capability)}
    for tile in sorted(seen, key=repr):
        for split in (1, 2):
            planned(monkeypatch, tiles.fitted(tile, w_bits, limits), split)
            width = 260 if tile.bn <= weights.N_ALIGN else 508  # a plan has no wide tiles that end behind the weights
            case = linear_case(tile.bm + 3, width, 512, w_bits, act_bits, bias=split == 1)
            for name, call in epilogues(case, torch.float32 if split == 1 else torch.float16).items():
                if name.startswith("linear ") and name != "linear none":
                    continue
                with on("triton", capability=capability):
                    got = call()
                with on("reference"):
                    assert_same(f"{tile} {split} {name}", got, call(), FLOAT_EPS)


def test_split_k_is_exact_and_leaves_its_counters_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    for w_bits in (8, 6):
        planned(monkeypatch, Tile(16, 32, 128, 2, 3), 4)
        case = linear_case(18, 72, 1100, w_bits, [8], extreme=True, bias=False, unit=True)
        expected = case.corrected().astype(np.float32)
        with on("triton") as emulated:
            for _ in range(2):
                assert np.array_equal(integers(case), expected)
        if emulated is not None:
            assert emulated.records[0].launch.grid == (6, 3), "1,100 of K are nine tiles: three parts of three"
    assert not scratch.counters(torch.device("cpu"), 1).any()


@compiled
@pytest.mark.parametrize("schedule", ["warp_serial", "warp_reverse", "random"])
def test_schedules(monkeypatch: pytest.MonkeyPatch, schedule: str) -> None:
    """Warps one after another between barriers, and the last part of K first: nothing changes."""
    planned(monkeypatch, Tile(16, 32, 128, 2, 3), 3)
    case = linear_case(17, 40, 800, 6, [6], period=1, bias=False)
    for name in ("linear none", "linear_quant"):
        call = epilogues(case, torch.float32)[name]
        with on("triton", schedule=schedule, ctas=list(reversed(range(12)))):
            got = call()
        with on("reference"):
            assert_same(name, got, call(), FLOAT_EPS)


def test_indices_outside_are_clamped() -> None:
    """A position or a row of the gate that does not exist reads the nearest one: no access leaves an operand."""
    case = linear_case(6, 33, 64, 8, [8], period=3)
    wild = torch.tensor([-7, 1, 2**40])
    tame = torch.tensor([0, 1, len(case.table) - 1])
    gate, residual = torch.randn(2, 33, generator=generator(0)), torch.zeros(6, 33)
    rows = [torch.tensor(index, dtype=torch.int32) for index in ([-1, 0, 1, 2, 9, 2**31 - 1], [0, 0, 1, 1, 1, 1])]
    out_table = random_table(len(case.table), [8], seed=5, step=0.05)
    results = []
    with on("triton"):
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


def test_gelu_against_float64() -> None:
    """The law for floats: at most twice the error of the same function in torch's float32, plus 1 ulp. Codes of 0 leave
    the bias, which takes every interesting value."""
    y = torch.cat(
        [torch.linspace(-17, 17, 4001), torch.tensor([0.0, 1e-30, -1e-30, 3e38, -3e38, torch.inf, torch.nan])]
    )
    case = linear_case(1, len(y), 16, 8, [8], period=1)
    table = torch.tensor([[0.5, 2.0, 0.0, 8.0]]).repeat(len(case.table), 1)
    codes, sums, qweight, bits, depth, scale, col_sums, *_, positions = case.operands
    layer = (codes.zero_(), sums.zero_(), qweight, bits, depth, scale, col_sums, y, table, positions)
    with on("triton"):
        [got] = kernels.linear(*layer, "gelu_erf", torch.float32)
    assert got[-1].isnan()
    assert got[-2] == torch.inf
    y, got = y[:-2], got[:-2].double()
    want = y.double() * 0.5 * torch.special.erfc(-y.double() * 0.5**0.5)
    allowed = 2 * (torch.nn.functional.gelu(y).double() - want).abs().max()
    ulp = torch.nextafter(want.float().abs(), torch.tensor(torch.inf)).double() - want.float().abs().double()
    assert ((got - want).abs() <= allowed + ulp).all()
    small = y.abs() < 1  # where the largest error of all says little
    torch.testing.assert_close(got[small], want[small], rtol=4 * 2.0**-23, atol=2.0**-140)


def test_nothing_to_clamp_to() -> None:
    case = linear_case(2, 8, 64, 8, [8])
    with on("triton"), pytest.raises(IndexError, match=r"linear: table has no rows"):
        kernels.linear(*case.operands[:8], case.table[:0], case.positions, "none", torch.float32)


def test_debug_checks_data(monkeypatch: pytest.MonkeyPatch) -> None:
    case = linear_case(4, 8, 64, 8, [8], period=2)
    far = (*case.operands[:9], torch.tensor([0, 99]))
    sums = (case.codes, case.operands[1] + 1, *case.operands[2:])
    index = torch.tensor([0, 1, 2, 5], dtype=torch.int32)
    calls = {
        "positions contains 99": lambda: kernels.linear(*far, "none", torch.float32),
        "row_sums": lambda: kernels.linear(*sums, "none", torch.float32),
        "gate_rows contains 5": lambda: kernels.linear_gate_residual(
            *case.operands, torch.zeros(3, 8), index, torch.zeros(4, 8)
        ),
    }
    for message, call in calls.items():
        monkeypatch.delenv("PTQ4ARVG_DEBUG", raising=False)
        with on("triton"):
            call()
            monkeypatch.setenv("PTQ4ARVG_DEBUG", "1")
            with pytest.raises((IndexError, ValueError), match=message):
                call()


def test_weights_are_packed_before_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu(Tensor):
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    case = linear_case(2, 8, 64, 8, [8])
    with pytest.raises(RuntimeError, match="run the model once before capturing"):
        weights.tiles_of(case.operands[2].as_subclass(OnGpu), 8, 64)


def test_tuning_runs_every_option() -> None:
    case = linear_case(3, 40, 2100, 6, [8], period=1)
    launches = []
    before = dict(tiles._MEASURED)

    def measure(call: Callable[[], None]) -> float:
        call()
        launches.append(call)
        return float(-len(launches))  # the last one is the fastest

    try:
        with recorded():
            entries = linear.tune(*case.operands, measure=measure)
        wanted = tiles.options(3, 40, 2100, 6, gpu.A100)
        assert len(launches) == len(wanted)
        assert entries["w6 40x2100 16"]["split"] == wanted[-1].split
        assert tiles.plan(3, 40, 2100, 6, gpu.A100) == wanted[-1]
        with pytest.raises(RuntimeError, match=r"no GPU to measure on.*cpu"):
            linear.tune(*case.operands)
    finally:
        tiles._MEASURED.clear()
        tiles._MEASURED.update(before)
        tiles.plan.cache_clear()


# Planted bugs. Rows and columns end inside a tile, so that a mask that is missing is an access outside.
def _ragged(bits: int = 8) -> LinearCase:
    return linear_case(17, 37, 400, bits, [8], period=17, bias=False)


@compiled
@pytest.mark.parametrize(
    ("helper", "old", "new"),
    [
        ("load_x", "x = tl.load(ptrs, mask=rows & (k < left), other=0)", "x = tl.load(ptrs, mask=k < left, other=0)"),
        ("load_x", "x = tl.load(ptrs, mask=rows & (k < left), other=0)", "x = tl.load(ptrs, mask=rows, other=0)"),
        ("load_channels", "mask[:, None] & wanted", "wanted"),
        ("load_tile", "(rm < M)[:, None, None] & (columns < N)", "(rm < M)[:, None, None]"),
        ("load_tile", "(rm < M)[:, None, None] & (columns < N)", "columns < N"),
        ("finish", "mask = rows[:, None] & (columns < width)[None, :]", "mask = (columns < width)[None, :]"),
        ("finish", "mask = rows[:, None] & (columns < width)[None, :]", "mask = rows[:, None]"),
        ("load_row", "length - 1)", "length + 9)"),
    ],
)
def test_a_dropped_mask_is_noticed(monkeypatch: pytest.MonkeyPatch, helper: str, old: str, new: str) -> None:
    case = _ragged()
    if helper == "load_row":
        case = dataclasses.replace(case, positions=case.positions + len(case.table))
    wrong = edited(getattr(gemm, helper), old, new)
    caller = {"load_x": "main_loop", "load_channels": "load_pieces"}.get(helper)
    if caller is not None:
        wrong = edited(getattr(gemm, caller), f"def {caller}", f"def {caller}", **{helper: wrong})
    names = {caller or helper: wrong}
    if helper in ("load_tile", "load_row"):
        names["finish"] = edited(gemm.finish, "def finish", "def finish", **{helper: wrong})
    monkeypatch.setattr(linear, "gemm", edited(gemm.gemm, "def gemm", "def gemm", **names))
    residual, gate = torch.randn(2, 17, 37, generator=generator(1)).unbind(0)
    with on("reference"):
        want = kernels.linear_gate_residual(*_ragged().operands, gate, None, residual)
    with on("triton"):
        try:
            got = kernels.linear_gate_residual(*case.operands, gate, None, residual)
        except MemFault:
            return
    assert not torch.equal(got, want), "nobody noticed"


WAIT = re.compile(r"^\s*cp\.async\.wait_group\s+\d+;", re.MULTILINE)


def _without_wait(ptx: str) -> str:
    assert WAIT.search(ptx)
    return WAIT.sub("", ptx, count=1)


@compiled
@pytest.mark.parametrize("bits", [8, 6])
def test_a_deleted_wait_is_noticed(bits: int) -> None:
    with on("triton", transform=_without_wait), pytest.raises(HazardError, match=r"cp\.async"):
        kernels.linear(*_ragged(bits).operands, "none", torch.float16)


@compiled
@pytest.mark.parametrize("bits", [8, 6])
def test_a_deleted_barrier_is_noticed(bits: int) -> None:
    """Each barrier of the kernel, the main loop's first of all. Barriers that order nothing may stay unnoticed: those
    that Triton puts before the first use of shared memory."""
    case = _ragged(bits)
    with on("triton") as emulated:
        kernels.linear(*case.operands, "none", torch.float16)
    ptx = emulated.records[0].compiled.ptx
    before_loop = len(ptx[: ptx.index("mma.sync")].split("bar.sync")) - 2  # the last one before the first product
    noticed = []
    for which in range(barriers(ptx)):
        try:
            with on("triton", transform=without_barrier(which)):
                kernels.linear(*case.operands, "none", torch.float16)
        except HazardError:
            noticed.append(which)
    assert before_loop in noticed
    assert len(noticed) >= barriers(ptx) / 2, (noticed, barriers(ptx))


@compiled
def test_a_missing_barrier_between_parts_is_in_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Split-K hands partial sums over with store, barrier, acquire-release addition, barrier, uncached loads."""
    planned(monkeypatch, Tile(16, 32, 128, 2, 3), 3)
    with recorded() as launches:
        kernels_call = linear_case(3, 40, 800, 8, [8]).operands
        linear.linear(*kernels_call, "none", torch.float16)
    ptx = _compile(launches[0], 80).ptx
    store = ptx.index("st.global.v4.b32")
    atom = ptx.index("atom.global.gpu.acq_rel.add")
    load = ptx.index("ld.global.cg", atom)
    assert store < atom < load
    assert "bar.sync" in ptx[store:atom]
    assert "bar.sync" in ptx[atom:load]
    assert "ld.global.v4" not in ptx[atom:load].replace("ld.global.cg.v4", "")


def _compile(launched: Launch, capability: int) -> Any:
    arguments = {**launched.arguments, **launched.constants}
    return compile_kernel(launched.kernel, arguments, launched.num_warps, launched.num_stages, capability)[0]


def _one_launch(case: LinearCase, name: str = "linear none", dtype: torch.dtype = torch.float16) -> Launch:
    with recorded() as launches, kernels.use_backend("triton", strict=True):
        epilogues(case, dtype)[name]()
    return launches[0]


@compiled
@pytest.mark.parametrize("capability", [80, 89])
@pytest.mark.parametrize(
    ("bits", "tile", "limit"),
    [
        (8, Tile(16, 64, 128, 4, 5), 58),
        (6, Tile(16, 64, 128, 4, 5), 111),
        (8, Tile(64, 128, 128, 4, 3), 153),
        (6, Tile(64, 128, 128, 4, 3), 226),
    ],
    ids=["W8-16x64", "W6-16x64", "W8-64x128", "W6-64x128"],
)
def test_hot_loop(monkeypatch: pytest.MonkeyPatch, capability: int, bits: int, tile: Tile, limit: int) -> None:
    """Instructions of one step, with a ragged last row tile; no byte shuffling, no spill."""
    planned(monkeypatch, tile)
    examined = examine(_one_launch(linear_case(tile.bm - 1, 256, 1024, bits, [8])), capability)
    assert examined.hot_loop is not None
    loop = Counter(examined.hot_loop.per_iteration())
    assert loop["IMMA"] == tile.bm * tile.bn * tile.bk // (16 * 8 * 32) // tile.num_warps
    assert loop["PRMT"] == 0
    assert loop.total() <= limit, loop
    assert examined.spill_bytes == 0


@compiled
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_compiles(monkeypatch: pytest.MonkeyPatch, capability: int) -> None:
    """Every architecture, with the plan of a device of it; shared memory is what the plan says, and nothing spills."""
    limits = Device(capability, 100, gpu.SHARED_BYTES[capability])
    monkeypatch.setattr(linear, "describe", lambda _: limits)
    for bits, rows, name in ((8, 2, "linear_quant"), (6, 64, "linear_gate_residual")):
        launched = _one_launch(linear_case(rows, 256, 2048, bits, [8]), name)
        kernel = _compile(launched, capability)
        how = tiles.plan(rows, 256, 2048, bits, limits)
        assert kernel.shared_bytes <= how.tile.shared_bytes(bits, capability) + tiles.RESERVED <= limits.shared_bytes
        assert resources(kernel.cubin).spill_bytes == 0, how


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("bits", [6, 8])
def test_everything_compiles(monkeypatch: pytest.MonkeyPatch, capability: int, bits: int) -> None:
    """All tiles of the table, all epilogues, whole and split, half precision and float32; nothing spills."""
    limits = Device(capability, 100, gpu.SHARED_BYTES[capability])
    seen = {tile for rows in (16, 32, 64, 128) for tile in tiles.candidates(rows, bits, capability)}
    for tile in sorted(seen, key=repr):
        for split in (1, 2):
            tile = tiles.fitted(tile, bits, limits)
            planned(monkeypatch, tile, split)
            case = linear_case(tile.bm, 256, 512, bits, [8])
            half = ("linear gelu_erf", "linear_quant", "linear_swiglu_quant", "linear_gate_residual")
            wide = ("linear none", "linear_gate_residual")
            for name, dtype in [(name, torch.float16) for name in half] + [(name, torch.float32) for name in wide]:
                kernel = _compile(_one_launch(case, name, dtype), capability)
                limit = min(tile.shared_bytes(bits, capability) + tiles.RESERVED, limits.shared_bytes)
                assert kernel.shared_bytes <= limit, (tile, split, name)
                assert resources(kernel.cubin).spill_bytes == 0, (tile, split, name)


@compiled
@pytest.mark.parametrize("bits", [8, 6])
@pytest.mark.parametrize(("rows", "instructions"), [(16, {8: 4.5, 6: 6.5}), (64, {8: 1.8, 6: 2.6})])
def test_traffic(bits: int, rows: int, instructions: dict[int, float]) -> None:
    """Bytes requested, sectors, bank conflicts and PTX instructions per 1,000 products of whole launches."""
    width, depth = 4096, 1024
    case = linear_case(rows, width, depth, bits, [8])
    with on("triton", hazards="off") as emulated:
        kernels.linear(*case.operands, "none", torch.float16)
    result = emulated.records[0].result
    how = tiles.plan(rows, width, depth, bits, gpu.A100)
    requested = result.stat["gld_bytes"] + result.stat["gst_bytes"]
    assert requested <= 1.02 * how.requested_bytes(rows, width, depth, bits, rows * width * 2)
    metrics = result.metrics()
    assert metrics["global_load_efficiency"] >= 0.95
    assert metrics["global_store_efficiency"] >= 0.95
    assert metrics["bank_conflict_factor"] <= 1.05
    assert 1000 * result.warp_insts / (rows * width * depth) <= instructions[bits]
