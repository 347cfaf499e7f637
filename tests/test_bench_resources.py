"""Reading machine code, and the table of resources: made-up listings, and real kernels compiled here."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("triton")

from benchmarks import gpu_markdown, resources, sass
from benchmarks.gpu_devices import ARCHITECTURES
from benchmarks.gpu_report import by_kind
from benchmarks.gpu_steps import Step
from benchmarks.triton_compiled import compile_launch, examine
from benchmarks.triton_launches import is_gemm, k_parts, kernel_name

# Two disjoint loops with products inside an outer one, a loop without products, padding behind the end.
LISTING = """
//--------------------- .text.gemm ---------------
.text.gemm:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
.L_x_1:
        /*0020*/                   LDSM.16.M88.4 R8, [R4+UR4] ;
        /*0030*/              @!PT LDS RZ, [RZ] ;
        /*0040*/             @!UPT UIADD3 URZ, UPT, UPT, URZ, URZ, URZ ;
        /*0050*/                   IMMA.16832.S8.S8.SAT R16, R24.reuse.ROW, R8.COL, R16 ;
        /*0060*/                   IMMA.16832.S8.S8.SAT R20, R24.ROW, R12.COL, R20 ;
        /*0070*/                   PRMT R5, R5, 0x3340, R6 ;
        /*0080*/               @P5 BRA `(.L_x_1) ;
.L_x_2:
        /*0090*/                   IMMA.16832.S8.S8.SAT R16, R24.ROW, R8.COL, R16 ;
        /*00a0*/                   BRA.U UP0, `(.L_x_2) ;
.L_x_3:
        /*00b0*/                   LDG.E R4, [R2.64] ;
        /*00c0*/              @!P0 BRA `(.L_x_3) ;
        /*00d0*/               @P1 BRA `(.L_x_0) ;
        /*00e0*/                   EXIT ;
.L_x_4:
        /*00f0*/                   BRA `(.L_x_4);
        /*0100*/                   NOP;
"""


def test_the_innermost_loop_with_most_products_is_taken() -> None:
    listing = sass.parse(LISTING)
    assert len(listing.instructions) == 17
    assert [last - first for first, last in sass.loops(listing)] == [0x10, 0x10, 0x60, 0xC0]
    loop = sass.hot_loop(listing, 2)
    assert loop.counts == {"LDSM": 1, "LDS": 1, "UIADD3": 1, "IMMA": 2, "PRMT": 1, "BRA": 1}
    assert loop.matrix == {"IMMA.16832.S8.S8.SAT": 2}
    assert (loop.total, loop.iterations) == (7, 1)


def test_an_unrolled_loop_is_divided_by_its_iterations() -> None:
    loop = sass.hot_loop(sass.parse(LISTING), 1)
    assert loop.iterations == 2
    assert loop.per_iteration()["IMMA"] == 1
    with pytest.raises(ValueError, match=r"2 tensor-core instructions .* a K tile in the PTX 4"):
        sass.hot_loop(sass.parse(LISTING), 4)


def test_listings_that_cannot_be_read_are_refused() -> None:
    with pytest.raises(ValueError, match="no instruction"):
        sass.parse("nothing")
    with pytest.raises(ValueError, match="several functions"):
        sass.parse(LISTING + LISTING)
    without = sass.parse(LISTING.replace("IMMA", "IMAD"))
    with pytest.raises(ValueError, match="no loop of this kernel"):
        sass.hot_loop(without, 2)


@pytest.mark.parametrize(
    ("name", "macs"), [("IMMA.16832.S8.S8.SAT", 4096), ("IGMMA.64x128x32.S8.S8", 262144), ("UTCIMMA", None)]
)
def test_products_of_an_instruction(name: str, macs: int | None) -> None:
    assert sass.matrix_macs(name) == macs


def test_kinds_add_up() -> None:
    counts = {"IMMA": 8, "LDS": 3, "STS": 1, "IADD3": 5, "IMAD": 2, "BAR": 2, "UIADD3": 4}
    kinds = by_kind(counts)
    assert kinds["LDS"] == 4
    assert kinds["IADD/IMAD"] == 7
    assert kinds["other"] == 6
    assert sum(kinds.values()) == sum(counts.values())


@pytest.fixture(scope="module")
def launches() -> list[Any]:
    step = Step("rar_b", "w6a8", 2, 16)
    return step.record(ARCHITECTURES[80])["block"]


def test_a_decode_step_is_recorded_from_the_production_path(launches: list[Any]) -> None:
    assert [kernel_name(one).partition("_")[0] for one in launches].count("gemm/gate") == 2
    assert len(launches) <= 7
    # The recorded choice is that of the device asked for: a small one does not split along K.
    small = dataclasses.replace(ARCHITECTURES[80], multiprocessors=20)
    narrow = Step("rar_b", "w6a8", 2, 16).record(small)["block"]
    assert [k_parts(one) for one in narrow if is_gemm(one)] != [k_parts(one) for one in launches if is_gemm(one)]


@pytest.mark.parametrize("arch", [80, 90, 120])
def test_a_compiled_gemm_does_the_products_of_its_tile(launches: list[Any], arch: int) -> None:
    started = next(one for one in launches if is_gemm(one))
    found = examine(started, arch)
    c = started.constants
    assert found.hot_loop is not None
    assert found.hot_loop.iterations == 1
    products = sass.tile_macs(found.hot_loop.matrix, started.num_warps, c["BM"], c["BN"])
    assert products == 4096 * found.hot_loop.counts["IMMA"] * started.num_warps == c["BM"] * c["BN"] * c["BK"]
    assert found.spill_bytes == 0
    assert 32 <= found.registers <= 255
    assert found.threads == 32 * started.num_warps


def test_spills_are_seen(launches: list[Any]) -> None:
    from tests.ptxsim.triton_kernel import triton_ptx
    from tests.ptxsim.triton_launcher import specialize

    started = launches[0]
    special = specialize(started.kernel, {**started.arguments, **started.constants})
    operands = (started.kernel, special.signature, special.constants, 80, special.aligned)
    squeezed = triton_ptx(*operands, num_warps=started.num_warps, maxnreg=32, enable_fp_fusion=False)
    assert examine(started, 80).spill_bytes == 0
    used = sass.resources(squeezed.cubin)
    assert used.registers <= 32
    assert used.spill_bytes > 0
    names = {one.name for one in sass.parse(sass.disassemble(squeezed.cubin)).instructions}
    assert {"STL", "LDL"} <= names


def test_what_two_readers_see_agrees(launches: list[Any]) -> None:
    # The emulator's way to the disassembly, which has more sections, gives the same loop.
    started = next(one for one in launches if is_gemm(one))
    compiled = compile_launch(started, 80)
    loop = examine(started, 80).hot_loop
    assert loop is not None
    assert loop == sass.hot_loop(sass.parse(compiled.sass()), loop.counts["IMMA"])


def test_the_table_is_written(tmp_path: Path) -> None:
    path = tmp_path / "resources.json"
    arguments = ["--quick", "--backend", "triton", "--models", "rar_b", "--json", str(path)]
    result = CliRunner().invoke(resources.app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text(encoding="utf-8"))
    assert {"gemm/store", "adaln_quant_kernel"} == {row["kernel"] for row in report["rows"]}
    for row in report["rows"]:
        assert row["arch"] == 80
        assert {"backend", "tile", "registers", "spill_bytes", "shared_bytes"} <= set(row)
    gemm = next(row for row in report["rows"] if row["kernel"] == "gemm/store")
    assert sum(gemm["sass"].values()) == gemm["sass_per_iteration"]
    bm, bn, bk = (int(size) for size in gemm["tile"].split()[0].split("x"))
    warps = int(gemm["tile"].split()[1][1:])
    expected = 1000 * gemm["sass_per_iteration"] * warps / (bm * bn * bk)
    assert gemm["sass_per_kmac"] == pytest.approx(expected, abs=1e-3)
    # One row per line: a diff names the kernels that changed.
    assert sum('"backend"' in line for line in path.read_text().splitlines()) == len(report["rows"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--archs", "75"], "unknown architecture 75"),
        (["--models", "rar_s"], "unknown model 'rar_s'"),
        (["--rows", "two"], "not a list of positive numbers"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(resources.app, arguments)
    assert result.exit_code == 2
    assert message in result.output


COMMITTED = Path(__file__).parents[1] / "docs" / "resources.json"


@pytest.mark.slow
def test_the_committed_table_is_that_of_these_kernels() -> None:
    """Registers may differ with another Triton; kernels, tiles and the absence of spills may not."""
    committed = json.loads(COMMITTED.read_text(encoding="utf-8"))["rows"]
    [fresh] = resources.measure(("rar_b",), ("w8a8", "w6a8"), resources.ROWS, (80,))
    triton = [row for row in committed if (row["backend"], row["arch"]) == ("triton", 80)]
    known = {(row["kernel"], row["tile"], row["variant"]): row for row in triton}
    for row in fresh:
        before = known[row["kernel"], row["tile"], row["variant"]]
        assert row["spill_bytes"] <= before["spill_bytes"]
        assert row.get("sass_per_iteration", 0) <= 1.02 * before.get("sass_per_iteration", 0)


def test_the_documented_tables_come_from_the_report() -> None:
    gemm = {"kernel": "gemm/store", "tile": "16x64x128 w4 s5", "w_bits": 6, "sass": {"IMMA": 8}, "shared_bytes": 32768}
    rows: list[dict[str, Any]] = [
        gemm | {"arch": 80, "registers": 48, "spill_bytes": 0, "sass_per_iteration": 96.0, "sass_per_kmac": 2.93},
        gemm | {"arch": 80, "registers": 56, "spill_bytes": 8, "sass_per_iteration": 104.0, "sass_per_kmac": 3.17},
        gemm | {"arch": 90, "registers": 50, "spill_bytes": 0, "sass_per_iteration": 106.0, "sass_per_kmac": 3.23},
        {"kernel": "quantize_kernel", "registers": 32, "spill_bytes": 0, "shared_bytes": 8},
    ]
    loops = gpu_markdown.gemm_loops(rows).splitlines()
    assert loops[0] == "| tile | sm_80 | sm_90 | per 1000 MAC | registers | spill B | shared B |"
    assert loops[2] == "| W6 16x64x128 w4 s5 | 96–104 | 106 | 2.93–3.17 | 48–56 | 8 | 32768 |"
    assert gpu_markdown.other_kernels(rows).splitlines()[2] == "| `quantize_kernel` | 1 | 32 | 0 | 8 |"
    found = gpu_markdown.tables({"units": {"sass": ""}, "rows": rows})
    document = "a\n<!-- gemm -->\n\nold\n<!-- end -->\nb <!-- kernels --> <!-- end -->"
    for name, table in found.items():
        document = gpu_markdown.inserted(document, name, table)
    assert "old" not in document
    assert document.startswith(f"a\n<!-- gemm -->\n\n{found['gemm']}\n\n<!-- end -->\nb ")
    assert gpu_markdown.inserted(document, "gemm", found["gemm"]) == document
    with pytest.raises(ValueError, match="no <!-- traffic -->"):
        gpu_markdown.inserted(document, "traffic", "")
