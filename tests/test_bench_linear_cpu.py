"""The benchmark of linear layers: its figures from made-up rows, its shapes, and a run on a tiny layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import limits, linear_cpu, peers_cpu, shapes, timing
from benchmarks.contenders import OUR_NAMES, Contender, Ours
from benchmarks.contention import busy_seconds
from benchmarks.linear_measure import burst_seconds, measure_shape
from benchmarks.linear_report import plot
from benchmarks.linear_summary import summarize, time_ratio
from benchmarks.monotone import measure_monotone, worst_drop

MANIFESTS = Path(__file__).parent / "data" / "manifests"
LIMITS = {"read_gb_s": 40.0, "w8a8_gops": 2000.0, "w6a8_gops": 1900.0, "w6a6_gops": 3000.0, "isa": "test"}
TINY = shapes.LayerShape(64, 32, ("tiny.qkv",))


def row(contender: str, m: int, rounds: list[float], gops: float = 1000.0, gb_s: float = 20.0) -> dict[str, Any]:
    middle = sorted(rounds)[len(rounds) // 2]
    return {
        "layers": ["tiny.qkv"],
        "kind": "qkv",
        "N": 64,
        "K": 32,
        "M": m,
        "contender": contender,
        "seconds": middle,
        "best_seconds": min(rounds),
        "round_seconds": rounds,
        "gops": gops,
        "weight_gb_s": gb_s,
    }


def test_summary_of_made_up_rows() -> None:
    rows = [
        row("w8a8", 2, [2.0] * 3),
        row("w6a6", 2, [1.0] * 3, gb_s=30.0),
        row("fbgemm", 2, [9.0] * 3),
        row("w8a8", 16, [1.0] * 3),
        row("w6a6", 16, [0.5] * 3),
        row("fbgemm", 16, [4.0] * 3),
        row("onnxruntime", 16, [2.0] * 3),
        row("onednn", 16, [1.5] * 3),
        row("fp32", 16, [0.1] * 3),
        row("w8a8", 64, [1.0] * 3, gops=1500.0),
        row("openvino", 64, [8.0] * 3),
    ]
    summary = summarize(rows, LIMITS)
    # sqrt(2 · 8): the best library at 16 rows and the only one at 64; neither fp32 nor two rows count.
    assert summary["w8a8_vs_best_int8_m16plus"] == pytest.approx(4)
    assert summary["w6a6_vs_best_int8_m16plus"] == pytest.approx(4)
    assert summary["w8a8_vs_any_int8_m16plus"] == pytest.approx((1.5 * 8) ** 0.5)
    assert summary["w6a6_vs_w8a8_m2"] == pytest.approx(2)
    assert summary["w6a6_bandwidth_fraction_m2"] == pytest.approx(0.75)
    assert summary["w8a8_ceiling_fraction_m64plus"] == pytest.approx(0.75)
    assert summary["w6a6_ceiling_fraction_m64plus"] is None
    assert summary["by_rows"]["16"]["w8a8_vs_best_int8"] == pytest.approx(2)
    assert summary["by_rows"]["2"]["w8a8_vs_best_int8"] == pytest.approx(4.5)
    assert summary["ratios"]["w8a8"]["fbgemm"] == {
        "2": pytest.approx(4.5),
        "16": pytest.approx(4),
        "64": None,
    }


def test_cells_beside_other_processes_are_counted() -> None:
    rows = [row("w8a8", m, [1.0]) | {"others": others} for m, others in ((1, None), (2, 0.02), (16, 0.7))]
    summary = summarize(rows, None)
    assert (summary["disturbed_cells"], summary["cells"]) == (1, 3)


def test_busy_time_is_all_but_idling_and_waiting() -> None:
    text = "cpu  100 20 30 9999 777 4 5 41 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n"
    assert busy_seconds(text, 100) == pytest.approx(2.0)


def test_summary_without_limits_has_no_fractions() -> None:
    summary = summarize([row("w6a6", 1, [1.0]), row("w8a8", 1, [2.0])], None)
    assert summary["w6a6_bandwidth_fraction_m2"] is None
    assert summary["w6a6_vs_w8a8_m2"] == pytest.approx(2)
    assert summary["w8a8_vs_best_int8_m16plus"] is None


def test_a_slow_round_of_the_machine_does_not_change_a_ratio() -> None:
    assert time_ratio(row("fbgemm", 16, [2.0, 2.0, 200.0]), row("w8a8", 16, [1.0, 50.0, 100.0])) == 2


@pytest.mark.parametrize("model", ["rar_b", "rar_l", "rar_xl"])
def test_shapes_are_those_of_the_published_checkpoints(model: str) -> None:
    manifest = json.loads((MANIFESTS / f"{model}.json").read_text(encoding="utf-8"))
    keys = {
        "qkv": "blocks.0.attn.qkv",
        "proj": "blocks.0.attn.proj",
        "fc1": "blocks.0.mlp.fc1",
        "fc2": "blocks.0.mlp.fc2",
        "adaln": "blocks.0.adaLN_modulation.1",
        "head_adaln": "adaln_before_head.adaLN_modulation.1",
        "head": "lm_head",
    }
    found = {layer: tuple(manifest[f"{key}.weight"][0]) for layer, key in keys.items()}
    assert shapes.model_layers(model) == found


def test_equal_shapes_are_measured_once() -> None:
    found = shapes.layer_shapes()
    assert len({(shape.n, shape.k) for shape in found}) == len(found)
    users = [user for shape in found for user in shape.users]
    assert len(users) == sum(len(shapes.model_layers(model)) for model in shapes.MODELS)
    assert next(s for s in found if "rar_l.qkv" in s.users).users == ("rar_l.qkv", "var_d16.qkv")
    with pytest.raises(ValueError, match="has a layer w13"):
        shapes.layer_shapes(["rar_b"], ["w13"])


def test_copies_exceed_the_cache_within_the_memory_limit() -> None:
    assert timing.copies_for(3 << 20, 32 << 20, 9) == 43
    assert timing.copies_for(1 << 30, 32 << 20, 9) == 2
    assert timing.copies_for(1 << 20, 32 << 30, 8) * 8 * timing.HELD_FACTOR << 20 <= timing.MEMORY_LIMIT


def test_rotation_continues_where_it_stopped() -> None:
    seen: list[int] = []

    def call(i: int) -> Any:
        return lambda: seen.append(i)

    rotation = timing.Rotation([call(i) for i in range(3)])
    rotation.once()
    assert len(rotation.burst(0)) == timing.MIN_CALLS
    assert seen == [0, 1, 2, 0]


def test_bursts_fit_the_time_limit() -> None:
    assert burst_seconds(1e-3, 200, 9, 7) < burst_seconds(10, 200, 9, 7) < burst_seconds(1e4, 200, 9, 7)


def test_worst_drop_names_the_pair() -> None:
    assert worst_drop([1, 2, 3, 4], [3.0, 5.0, 4.0, 2.0]) == {"ratio": 2.5, "rows": [2, 4]}
    assert worst_drop([1, 2, 8], [1.0, 2.0, 4.0])["ratio"] == 0.5
    with pytest.raises(ValueError, match="must increase"):
        worst_drop([2, 1], [1.0, 1.0])


def test_every_m_of_every_kernel_is_timed() -> None:
    result = measure_monotone({"w6a6": Ours(6, 6)}, TINY, [1, 2, 3], 2, 1 << 12)
    assert result["rows"] == [1, 2, 3]
    assert len(result["seconds"]["w6a6"]) == 3
    assert set(result["worst"]) == {"w6a6"}


def test_a_contender_that_computes_something_else_is_found_out() -> None:
    class Wrong(Contender):
        name = "wrong"

        def layers(self, weight: torch.Tensor, bias: torch.Tensor, copies: int) -> list[Any]:
            # Right but for sharing: every copy answers for the first.
            return [lambda x, y: lambda: torch.nn.functional.linear(x, weight, bias)] * copies

    with pytest.raises(RuntimeError, match="wrong does not compute"):
        list(measure_shape(TINY, [4], {"wrong": Wrong()}, 1, 0.0, 1 << 12, settle_s=0.0))


def test_caches_are_read_where_the_system_describes_them(tmp_path: Path) -> None:
    for index, (level, kind, size) in enumerate([("1", "Data", "48K"), ("1", "Instruction", "32K"), ("3", "x", "32M")]):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, text in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(f"{text}\n")
    assert limits.cache_sizes(tmp_path) == {"L1d": 48 << 10, "L3": 32 << 20}
    assert limits.cache_sizes(tmp_path / "none") == {}


def test_limits_measured_twice_are_the_higher_ones() -> None:
    assert limits.highest(LIMITS, LIMITS | {"read_gb_s": 50.0, "w6a6_gops": 1.0}) == LIMITS | {"read_gb_s": 50.0}
    assert limits.highest(None, LIMITS) == LIMITS
    assert limits.highest(None, None) is None


def test_picture_shows_limits_and_every_m(tmp_path: Path) -> None:
    rows = [row("w8a8", m, [1.0]) for m in (1, 16)]
    monotone = {"shape": "64x32", "rows": [1, 2], "seconds": {"w8a8": [1.0, 2.0]}}
    plot(tmp_path / "plot.png", rows, {"limits": LIMITS}, monotone)
    plot(tmp_path / "none.png", [], {"limits": None}, monotone)
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def invoke(*arguments: str) -> Any:
    threads = torch.get_num_threads()
    try:
        return CliRunner().invoke(linear_cpu.app, list(arguments))
    finally:
        torch.set_num_threads(threads)


def test_a_run_writes_its_figures_and_names_a_missing_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = peers_cpu.importlib.util.find_spec
    monkeypatch.setattr(
        peers_cpu.importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else find(name)
    )
    monkeypatch.setattr(linear_cpu, "layer_shapes", lambda models, layers: [TINY])
    monkeypatch.setattr(linear_cpu, "last_level_cache", lambda: 1 << 13)
    path, picture = tmp_path / "figures.json", tmp_path / "plot.png"
    result = invoke(
        *("--backend", "reference", "--rows", "1,16", "--rounds", "2", "--threads", "1", "--minutes", "0.05"),
        *("--peers", "fp32,bf16,onnxruntime", "--json", str(path), "--plot", str(picture)),
    )
    assert result.exit_code == 0, result.output
    assert "missing: onnxruntime (onnxruntime and onnx not installed)" in result.output
    report = json.loads(path.read_text(encoding="utf-8"))
    assert {"machine", "command", "rows", "summary"} <= set(report)
    assert report["missing"] == {"onnxruntime": "onnxruntime and onnx not installed"}
    assert report["machine"]["threads"] == 1
    assert {(r["M"], r["contender"]) for r in report["rows"]} == {
        (m, name) for m in (1, 16) for name in (*OUR_NAMES, "fp32", "bf16")
    }
    wanted = {"layers", "N", "K", "M", "contender", "seconds", "gops", "weight_gb_s", "round_seconds"}
    assert all(wanted <= set(r) and len(r["round_seconds"]) == 2 for r in report["rows"])
    assert report["summary"]["w6a6_vs_w8a8_m2"] > 0
    assert picture.exists()


def test_monotone_run_has_one_figure_per_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cpu, "layer_shapes", lambda models, layers: [TINY])
    monkeypatch.setattr(linear_cpu, "last_level_cache", lambda: 1 << 13)
    path = tmp_path / "figures.json"
    result = invoke(
        *("--monotone", "--backend", "reference", "--rows", "1-3", "--rounds", "2", "--threads", "1"),
        *("--json", str(path)),
    )
    assert result.exit_code == 0, result.output
    assert set(json.loads(path.read_text(encoding="utf-8"))["summary"]["monotone_worst"]) == set(OUR_NAMES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--backend", "nowhere"), "no backend 'nowhere'"),
        (("--backend", "reference", "--peers", "mkl"), "unknown peer 'mkl'"),
        (("--backend", "reference", "--models", "gpt"), "unknown model 'gpt'"),
        (("--backend", "reference", "--rows", "0,x"), "is not a number of rows"),
    ],
)
def test_wrong_options_end_with_a_reason(arguments: tuple[str, ...], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.output
