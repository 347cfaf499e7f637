"""The GPU benchmarks of the CUDA backend: recorded launches, least bytes by hand, parts of grids, floors, tables."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("triton")

from benchmarks import cuda_compiled, cuda_resources, gpu_markdown, latency, resources, traffic
from benchmarks.cuda_markdown import cuda_loops, linears
from benchmarks.cuda_params import AttentionParams, GemmParams, params
from benchmarks.cuda_tiles import gemm_tile, tiles
from benchmarks.cuda_traffic import emulate, units
from benchmarks.gpu_backends import GpuBackend, gpu_backend
from benchmarks.gpu_devices import ARCHITECTURES, gpu
from benchmarks.gpu_steps import Step
from benchmarks.linear_launches import Linear, all_shapes
from build_support.jobs import dependencies
from ptq4arvg.models import rar
from ptq4arvg_kernels.backends.cuda import native
from ptq4arvg_kernels.backends.cuda.native import Launch
from tests.ptxsim.nvcc import find_nvcc

pytestmark = pytest.mark.skipif(
    find_nvcc() is None or native.why_not() is not None, reason="no nvcc on the path, or no compiled CUDA module"
)

# As in test_bench_traffic.py: caches of odd heads begin in the middle of a sector, and tiles are ragged.
TINY = rar.RARConfig(144, 1, 3, 272, codebook=80, classes=9, grid=4, pos_rows=18, time_rows=18)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rar.CONFIGS, "tiny", TINY)


@pytest.fixture(scope="module")
def backend() -> GpuBackend:
    return gpu_backend("cuda")


def launches(sequences: int, part: str = "block", recipe: str = "w6a8", arch: int = 80) -> list[Launch]:
    return Step("tiny", recipe, sequences, 9, backend="cuda").record(ARCHITECTURES[arch])[part]


def test_a_step_is_recorded_from_the_production_path(backend: GpuBackend) -> None:
    few, many = launches(5), launches(70)
    assert [backend.kernel_name(one).partition("_d")[0] for one in few] == [
        "gemm_norm/store",
        "decode",
        "gemm/gate_residual",
        "gemm_norm/quant",
        "gemm/gate_residual",
    ]
    assert len(many) == 7
    products = [backend.product(one) for one in few]
    assert [(p.m, p.n, p.k, p.w_bits) for p in products if p is not None] == [
        (5, 432, 144, 6),
        (5, 144, 144, 6),
        (5, 272, 144, 6),
        (5, 144, 272, 6),
    ]


def test_tiles_are_chosen_for_the_device(backend: GpuBackend) -> None:
    step = Step("rar_b", "w8a8", 200, 16, backend="cuda")
    large, small = step.record_all([ARCHITECTURES[120], ARCHITECTURES[86]])
    grids = [[one.grid for one in found["block"]] for found in (large, small)]
    assert grids[0] != grids[1]


def test_least_bytes_by_hand(backend: GpuBackend) -> None:
    d, hidden, rows = TINY.dim, TINY.mlp_dim, 5
    qkv, attention, proj, _, fc2 = launches(rows)
    vectors, modulation = 2 * d * 4, 2 * d * 2  # weight and bias in fp32, scale and shift in half precision
    packed = 3 * d * 256 * 6 // 8  # K = 144 is padded to 256
    outputs = rows * 3 * d * 2
    least = backend.minimum(qkv)
    assert least.requested == packed + qkv.grid[1] * (rows * (d * 2 + modulation) + vectors) + outputs
    # Three images and what all have in common: four conditions at one position, of which five rows name three.
    assert least.distinct == packed + rows * d * 2 + 3 * modulation + vectors + outputs
    assert backend.minimum(proj).epilogue == 2 * rows * d * 2
    assert backend.minimum(fc2).distinct == d * 384 * 6 // 8 + rows * hidden + 2 * rows * d * 2 + 3 * d * 2
    one = 2 * 48 * 9 + 3 * 48 * 2 + 2 * 48 + 48 + 2 * 8 * 2
    assert backend.minimum(attention).requested == rows * 3 * (one + 4 * 48 * 4)
    norm, product, *_ = launches(70)
    assert norm.name.startswith("adaln_quant")
    assert backend.minimum(norm).requested == 70 * (d * 2 + d + 8 + 16 + 4 + vectors + modulation)
    cut = backend.product(product)
    assert cut is not None
    assert not cut.norm
    codes = -(-70 // cut.bm) * packed + -(-3 * d // cut.bn) * 70 * d
    assert backend.minimum(product).requested == codes + 70 * 3 * d * 2


def test_parameters_are_read_as_they_are_written(backend: GpuBackend) -> None:
    qkv, attention, *_ = launches(5)
    p = params(qkv)
    assert isinstance(p, GemmParams)
    assert (p.rows, p.channels, p.width, p.norm.width, p.norm.x_stride, p.grids.period) == (5, 432, 144, 144, 144, 1)
    a = params(attention)
    assert isinstance(a, AttentionParams)
    assert (a.pairs, a.heads, a.head_dim, a.lanes, a.span, a.append) == (15, 3, 48, 48, 10, 1)
    with pytest.raises(ValueError, match="its parameters have"):
        params(qkv._replace(params=qkv.params + b"12345678"))
    with pytest.raises(ValueError, match="odd_kernel are not known"):
        backend.minimum(qkv._replace(name="odd_kernel"))


def counters(started: Launch, whole: bool) -> dict[str, Any]:
    found = vars(emulate(started, whole)).copy()
    found.pop("emulated_blocks")
    instructions: Counter[str] = found.pop("instructions")
    # The error function branches on its argument.
    if not started.name.endswith("quant"):
        found |= instructions
    return found


@pytest.mark.parametrize(("sequences", "kernels"), [(5, ""), (70, "gemm")])
def test_parts_of_a_grid_stand_for_all_of_it(sequences: int, kernels: str) -> None:
    for started in launches(sequences):
        if not started.name.startswith(kernels):
            continue
        found = units(started)
        total = started.grid[0] * started.grid[1] * started.grid[2]
        assert sum(len(unit.blocks) * unit.count for unit in found) == total
        assert counters(started, whole=False) == counters(started, whole=True), started.name


def test_a_gemm_asks_for_little_more_than_the_least(backend: GpuBackend) -> None:
    for m in (2, 70):
        started = Linear("some", m, 256, 512, "w6a8").record(backend, ARCHITECTURES[80])
        found, least = backend.emulate(started, 80), backend.minimum(started)
        # Scales, sums and positions come on top.
        assert least.requested < found.bytes <= 1.1 * least.requested
        assert found.loop_wavefronts == found.loop_ideal_wavefronts > 0


def test_floors_by_hand() -> None:
    tile = gemm_tile("gemm_w6_16x64_store")
    assert tile is not None
    assert (tile.rows, tile.channels, tile.warps, tile.groups) == (16, 64, 4, 2)
    # A warp has two bricks per step of 256: 2 x 8 products, 2 x 2 ldmatrix, 2 x 3 loads; 6 copies of weights and two of
    # 16 x 256 bytes of rows by 128 threads.
    assert (tile.step_k, tile.depth) == (256, 2)
    assert tile.floor() == {"IMMA": 16, "LDSM": 4, "LDS": 6, "LDGSTS": 8, "logic": 72}
    assert tile.floor(10)["logic"] == 80
    assert tile.mma_per_step * tile.warps * 16 * 8 * 32 == tile.macs_per_step
    norm = gemm_tile("gemm_norm_w8_16x32_quant")
    assert norm is not None
    assert norm.floor() == {"IMMA": 16, "LDSM": 4, "LDS": 8, "LDGSTS": 8, "logic": 0}
    assert gemm_tile("qkv_append") is None
    assert set(tiles()) == {name for name in native.module().kernels() if name.startswith("gemm_")}


def test_kernels_are_found_in_their_files() -> None:
    for path in cuda_compiled.SOURCES.glob("*.cu"):
        assert path in cuda_compiled.job(path, 80).inputs
    files = cuda_compiled.files_of(native.module().kernels())
    assert sorted(files) == sorted(path.stem for path in cuda_compiled.SOURCES.glob("*.cu"))
    cuda_compiled.compiled([80], ["rows"])
    depfile = cuda_compiled.job(cuda_compiled.SOURCES / "rows.cu", 80).depfile
    assert depfile is not None
    assert any(path.name == "types.h" for path in dependencies(depfile.read_text()))


def test_the_table_is_written_beside_other_backends(tmp_path: Path) -> None:
    path = tmp_path / "resources.json"
    other = {"backend": "triton", "kernel": "gemm/x", "arch": 80, "registers": 1, "spill_bytes": 0, "sass": {}}
    before = {"command": "before", "rows": [other | {"products_over_tile": 1}, {"backend": "cuda", "kernel": "old"}]}
    path.write_text(json.dumps(before))
    arguments = ["--backend", "cuda", "--archs", "80", "--kernels", "qkv_append", "--json", str(path)]
    result = CliRunner().invoke(resources.app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text(encoding="utf-8"))
    assert [row["kernel"] for row in report["rows"]] == ["gemm/x", "qkv_append"]
    assert report["command"]["triton"] == "before"
    row = report["rows"][1]
    assert (row["backend"], row["arch"], row["spill_bytes"]) == ("cuda", 80, 0)
    assert 32 <= row["registers"] <= 255


@pytest.mark.slow
def test_no_kernel_spills_and_loops_do_the_products_of_their_tiles() -> None:
    [rows] = cuda_resources.measure([80], ["gemm_w6_64x128_gate", "gemm_w8_64x128_gate", "gemm_w8_16x32_gate"])
    assert len(rows) == 3
    for row in rows:
        assert row["spill_bytes"] == 0
        assert row["products_over_tile"] == 1
        assert row["unrolled"] == gemm_tile(row["kernel"]).stages  # type: ignore[union-attr]
        assert 1 <= row["over_floor"] < 2
    assert 0.5 < rows[0]["unpack_per_weight"] < 0.8


def test_traffic_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "traffic.json"
    arguments = ["--backend", "cuda", "--model", "tiny", "--recipes", "w8a8", "--rows", "2", "--position", "4"]
    result = CliRunner().invoke(traffic.app, [*arguments, "--parts", "block", "--json", str(path)])
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text(encoding="utf-8"))
    assert {row["backend"] for row in report["rows"]} == {"cuda"}
    [(title, summary)] = report["summary"].items()
    assert title == "cuda tiny w8a8 M=2"
    assert summary["launches"] == len(report["rows"]) == 5
    assert "`gemm_norm/store` 432×144" in gpu_markdown.tables(report, "cuda")["traffic"]
    assert gpu_markdown.tables(report, "triton") == {}


def test_rows_with_other_launches_stand_side_by_side() -> None:
    def line(rows: int, kernel: str, **more: Any) -> dict[str, Any]:
        figures = {"bytes": 1000 * rows, "ratio": 1.0, "sector_ratio": 1.0}
        return {"part": "block", "recipe": "w8a8", "rows": rows, "kernel": kernel, **figures, **more}

    size = {"N": 3, "K": 1, "instructions_per_kmac": 2.0}
    rows = [line(2, "gemm_norm/store", **size), line(200, "adaln_quant_1"), line(200, "gemm/store", **size)]
    table = gpu_markdown.traffic(rows).splitlines()
    assert table[2] == "| w8a8 | `adaln_quant_1` |  |  |  |  | 200 | 1.000 | 1.000 |  |"
    assert table[3].startswith("| w8a8 | `gemm_norm/store`, `gemm/store` 3×1 | 2 | 1.000 | 1.000 | 2.00 | 200 |")


def test_the_documented_tables_come_from_the_report() -> None:
    gemm = {"w_bits": 6, "norm": False, "tile": "16x64x256 w4 s4", "sass": {}, "floor_per_kmac": 1.6174}
    gemm |= {"registers": 82, "spill_bytes": 0, "shared_bytes": 67856, "least_shared_bytes": 67856}
    rows = [
        gemm | {"arch": 80, "sass_per_iteration": 121.5, "sass_per_kmac": 1.8539, "over_floor": 1.1462},
        gemm | {"arch": 90, "sass_per_iteration": 130.0, "sass_per_kmac": 1.98, "over_floor": 1.2264},
    ]
    expected = "| W6 16x64x256 w4 s4 | 121.5 | 130 | 1.85 | 1.62 | 1.15–1.23 | 82 | 0 | 67856 |"
    assert cuda_loops(rows).splitlines()[2] == expected
    line = {"part": "linears", "recipe": "w8a8", "rows": 16, "M": 16, "tile": "t", "split": 2, "ratio": 1.0}
    line |= {"sector_efficiency": 1.0, "loop_bank_factor": None}
    ours = line | {"backend": "cuda", "instructions_per_kmac": 2.0, "loop_sass_per_kmac": 1.0}
    theirs = line | {"backend": "triton", "instructions_per_kmac": 4.0, "loop_sass_per_kmac": 0.8}
    table = linears([ours, theirs]).splitlines()
    assert len(table) == 3
    assert table[2] == "| w8a8 | 16 | t /2 | 1.000 | 1.000 | 1.000 | 2.00 | 4.00 | 50 % | 1.00 | 0.80 | -25 % |"


def test_shapes_are_those_of_the_published_models() -> None:
    shapes = {(shape.n, shape.k): shape.users for shape in all_shapes()}
    assert "var_d30.fc1" in shapes[7680, 1920]
    assert "rar_xxl.qkv" in shapes[3 * 1408, 1408]
    assert "par_xl.w13" in shapes[7168, 1280]
    assert len(shapes) == len(all_shapes())


def test_a_bound_by_hand(backend: GpuBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import roofline
    from benchmarks.sass import HotLoop

    device = gpu("A100")
    loop = HotLoop({"IMMA": 200}, {"IMMA": 200}, 4)
    monkeypatch.setattr(type(backend), "hot_loop", lambda self, started, capability: loop)
    started = Linear("some", 2, 1024, 512, "w8a8").record(backend, device.device())
    bound, cut = roofline.of_launch(device, started, backend), backend.product(started)
    assert cut is not None
    assert bound.macs == 2 * 1024 * 512
    assert bound.bytes == 1024 * 512 + 2 * 512 + 2 * 1024 * 2
    assert cut.steps == -(-512 // cut.split // cut.bk)
    assert bound.issue == pytest.approx(cut.steps * cut.warps * 50 / (4 * 1.41e9))
    assert bound.tensor == pytest.approx(2 * cut.bm * cut.bn * cut.bk * cut.steps / (624e12 / 108))


def test_backends_stand_side_by_side() -> None:
    rows = [{"contender": "w8a8"}, {"contender": "fp16"}]
    latency.side_by_side(rows, "cuda", several=True)
    assert rows == [{"contender": "w8a8 cuda", "backend": "cuda"}, {"contender": "fp16"}]
    with pytest.raises(ValueError, match="unknown backend 'cpu'"):
        gpu_backend("cpu")
    assert torch.is_grad_enabled()
