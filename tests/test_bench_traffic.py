"""Traffic of emulated launches: parts that stand for whole grids, the least bytes by hand, and the report."""

from __future__ import annotations

import json
import types
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("triton")

from benchmarks import traffic
from benchmarks.emulated_traffic import emulate, tile_of, units
from benchmarks.gpu_devices import ARCHITECTURES
from benchmarks.gpu_steps import Step
from benchmarks.loops import products_per_loop, ptx_loops
from benchmarks.traffic_minimum import minimum
from benchmarks.triton_launches import is_gemm, kernel_name, record
from ptq4arvg.models import rar
from ptq4arvg_kernels.backends.triton.launch import Launch

# Heads of 48 columns and 17 slots: caches of odd heads begin in the middle of a sector. 144 channels: a ragged tile of
# every width.
TINY = rar.RARConfig(144, 1, 3, 272, codebook=80, classes=9, grid=4, pos_rows=18, time_rows=18)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rar.CONFIGS, "tiny", TINY)


def launches(sequences: int, part: str = "block", recipe: str = "w6a8", arch: int = 80) -> list[Launch]:
    step = Step("tiny", recipe, sequences, 9)
    step.prepare()
    return record(ARCHITECTURES[arch], step.calls()[part])


def counters(started: Launch, whole: bool) -> dict[str, Any]:
    found = vars(emulate(started, 80, whole)).copy()
    found.pop("emulated_blocks")
    instructions: Counter[str] = found.pop("instructions")
    # The error function branches on its argument.
    if started.constants.get("ACTIVATION") != "gelu_erf":
        found |= instructions
    return found


@pytest.mark.parametrize("sequences", [5, 70])
def test_parts_of_a_grid_stand_for_all_of_it(sequences: int) -> None:
    for started in launches(sequences):
        scaled = emulate(started, 80)
        assert scaled.blocks == torch.tensor(started.grid).prod()
        assert counters(started, whole=False) == counters(started, whole=True), kernel_name(started)


def test_units_cover_every_block_once() -> None:
    for started in launches(200, "modulation") + launches(200):
        found = units(started)
        total = int(torch.tensor(started.grid).prod())
        assert sum(len(unit.blocks) * unit.count for unit in found) == total
        assert all(unit.count > 0 for unit in found)
        assert sum(len(unit.blocks) for unit in units(started, whole=True)) == total


@pytest.mark.parametrize(("tiles_m", "tiles_n", "group"), [(1, 7, 0), (3, 5, 8), (19, 4, 8), (16, 1, 8)])
def test_every_tile_has_one_block(tiles_m: int, tiles_n: int, group: int) -> None:
    tiles = {tile_of(block, tiles_m, tiles_n, group) for block in range(tiles_m * tiles_n)}
    assert tiles == {(m, n) for m in range(tiles_m) for n in range(tiles_n)}


def test_least_bytes_by_hand() -> None:
    d, hidden, rows = TINY.dim, TINY.mlp_dim, 5
    by_name: dict[str, list[Launch]] = {}
    for started in launches(rows):
        by_name.setdefault(kernel_name(started), []).append(started)
    [qkv] = by_name["gemm/store"]
    tiles = -(-3 * d // qkv.constants["BN"])
    outputs = rows * 3 * d * 2
    packed = 3 * d * 256 * 6 // 8  # K = 144 is padded to 256
    assert minimum(qkv).requested == packed + tiles * rows * d + outputs
    assert minimum(qkv).distinct == packed + rows * d + outputs
    assert minimum(qkv).epilogue == 0
    proj, fc2 = by_name["gemm/gate_residual"]
    # Residual and gate in half precision; three distinct conditions at one position.
    assert minimum(proj).epilogue == 2 * rows * d * 2
    assert minimum(fc2).distinct == d * 384 * 6 // 8 + rows * hidden + rows * d * 2 + rows * d * 2 + 3 * d * 2
    norm = by_name["adaln_quant_kernel"][0]
    own = d * 2 + d + 8 + 16 + 4 + (0 if norm.arguments["sums"] is None else 4)
    assert minimum(norm).requested == rows * (own + 2 * d * 4 + 2 * d * 2)
    assert minimum(norm).distinct == rows * own + 2 * d * 4 + 3 * 2 * d * 2
    [attention] = by_name["decode_kernel"]
    # Nine slots of keys and values, q, k, v in half precision, the new codes, the result's codes, tables, four vectors.
    one = 2 * 48 * 9 + 3 * 48 * 2 + 2 * 48 + 48 + 2 * 8 * 2
    assert minimum(attention).requested == rows * 3 * (one + 4 * 48 * 4)


def test_a_kernel_without_a_formula_is_named() -> None:
    started = launches(2)[0]
    odd = started._replace(kernel=types.SimpleNamespace(__name__="odd_kernel"))
    assert minimum(started).requested > 0
    with pytest.raises(ValueError, match="odd_kernel"):
        minimum(odd)


def test_a_gemm_asks_for_little_more_than_the_least() -> None:
    for started in launches(16):
        if is_gemm(started):
            found, least = emulate(started, 80), minimum(started)
            # Tiny layers have scales and positions beside little data, and channels padded to the tile.
            assert least.requested * 0.98 <= found.bytes <= 2 * least.requested
            assert found.loop_wavefronts == found.loop_ideal_wavefronts > 0


def test_innermost_loops_of_ptx() -> None:
    text = "\n".join(
        [
            "$L__BB0_1:",
            "mov.u32 %r1, %r2;",
            "$L__BB0_2:",
            "add.s32 %r1, %r1, 1;",
            "\t@%p1 bra \t$L__BB0_2;",
            "@%p2 bra $L__BB0_4;",
            "bra.uni $L__BB0_1;",
            "$L__BB0_4:",
            "@!%p3 bra $L__BB0_4;",
            "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r1}, {%r2}, {%r3}, {%r1};",
            "bra.uni $L__BB0_4;",
        ]
    )
    # A loop ends with the last branch back to its label.
    assert ptx_loops(text) == [range(3, 6), range(8, 12)]
    assert products_per_loop(text) == 1


def test_the_report(tmp_path: Path) -> None:
    path = tmp_path / "traffic.json"
    arguments = ["--quick", "--model", "tiny", "--position", "9", "--json", str(path)]
    result = CliRunner().invoke(traffic.app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text(encoding="utf-8"))
    assert {row["part"] for row in report["rows"]} == {"modulation", "block"}
    block = [row for row in report["rows"] if row["part"] == "block"]
    [summary] = report["summary"].values()
    assert summary["launches"] == len(block) <= 7
    assert summary["bytes"] == sum(row["bytes"] for row in block)
    for row in report["rows"]:
        assert row["ratio"] == pytest.approx(row["bytes"] / row["minimum_bytes"])
        assert row["instructions"] == sum(row["instructions_by_class"].values())
        if row["kernel"].startswith("gemm"):
            macs = row["M"] * row["N"] * row["K"]
            assert row["instructions_per_kmac"] == pytest.approx(1000 * row["instructions"] / macs)
    assert "executed once" in report["scaling"]


def test_mistakes_are_named() -> None:
    result = CliRunner().invoke(traffic.app, ["--arch", "100"])
    assert result.exit_code == 2
    assert "the emulator executes" in result.output


@pytest.mark.slow
def test_parts_stand_for_the_grids_of_a_published_size() -> None:
    step = Step("rar_b", "w8a8", 16, 128)
    step.prepare()
    for started in record(ARCHITECTURES[80], step.calls()["block"]):
        assert counters(started, whole=False) == counters(started, whole=True), kernel_name(started)
