"""The benchmark of whole images: its figures from made-up rows, its steps, its peers, and a run on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import ptq4arvg
from benchmarks import decode_cpu, decode_memory, decode_models, decode_steps
from benchmarks.decode_report import plot, summarize, summary_table
from benchmarks.random_models import random_quantized
from ptq4arvg.models.rar import RARConfig
from tests.tiny import tiny_rar

TINY = RARConfig(32, 2, 2, 48, codebook=16, classes=5, grid=4, pos_rows=18, time_rows=18, guidance=2.0)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_models, "size", lambda name: TINY)


def row(contender: str, seconds: float, memory: float | None = None, **others: Any) -> dict[str, Any]:
    return {
        "model": "rar_l",
        "batch": 1,
        "contender": contender,
        "seconds_per_image": seconds,
        "tokens_per_s": 256 / seconds,
        "step_ms": seconds / 0.256,
        "peak_memory_mb": memory,
        "decode_peak_mb": memory,
        "estimated": False,
        "others": None,
    } | others


def test_summary_of_made_up_rows() -> None:
    rows = [
        row("w6a6", 2.0, 500.0),
        row("w8a8", 2.5, 600.0, others=1.0),
        row("fp32", 20.0, 2000.0),
        row("dynamic_int8", 8.0, estimated=True),
        row("w6a6", 1.0, batch=8),
        row("fp32", 6.0, batch=8),
        row("w6a6", 4.0, model="rar_b"),
    ]
    summary = summarize(rows, [{"allocations_per_step": 0.0}, {"allocations_per_step": 2.0}])
    assert summary["rar_l_w6a6_vs_fp32"] == 10
    assert summary["rar_l_w8a8_vs_fp32"] == 8
    assert summary["rar_l_w6a6_vs_dynamic_int8"] == 4
    assert summary["rar_l_w6a6_vs_compiled"] is None
    assert summary["rar_l_w6a6_vs_fp32_batch8"] == 6
    assert summary["rar_l_peak_memory_vs_fp32"] == 0.25
    assert summary["rar_b_tokens_per_s"] == {"w6a6": 64.0, "w8a8": None, "fp32": None}
    assert summary["allocations_per_step"] == 2
    assert summary["estimated"] == ["rar_l dynamic_int8 1"]
    assert summary["disturbed"] == 1
    assert summary_table(summary).row_count > 4


def test_summary_of_nothing() -> None:
    summary = summarize([], [])
    assert summary["rar_l_w6a6_vs_fp32"] is None
    assert summary["allocations_per_step"] is None


@pytest.mark.parametrize(("steps", "run"), [(1, 1), (5, 1), (64, 32), (300, 1), (40, 7), (3, 32)])
def test_steps_are_spread_over_the_image(steps: int, run: int) -> None:
    runs = decode_steps.spread(256, steps, run)
    taken = [step for part in runs for step in part]
    assert len(set(taken)) == len(taken)
    assert min(taken) >= 1
    assert max(taken) < 256
    assert all(len(part) == run for part in runs)
    assert abs(sum(taken) / len(taken) - 128) < 2  # an estimate has no preference for early or late steps


def test_image_time_is_interpolated() -> None:
    runs = decode_steps.spread(256, 16, 1)
    exact = [0.1 + 0.001 * run.start for run in runs]
    assert decode_steps.image_seconds(runs, exact, 256) == pytest.approx(0.1 * 256 + 0.001 * 255 * 128, rel=1e-2)


def test_whole_images_of_rar_l_are_not_estimated() -> None:
    for contender in decode_models.CONTENDERS:
        assert decode_cpu.steps_and_rounds(contender, "rar_l", 1, 7, None, False)[0] is None
    assert decode_cpu.steps_and_rounds("fp32", "rar_l", 8, 7, None, False)[0] == decode_cpu.PEER_STEPS
    assert decode_cpu.steps_and_rounds("w6a6", "rar_l", 1, 7, 5, False) == (5, 7)


@pytest.mark.parametrize("quantized", [False, True])
def test_single_steps_are_those_of_generate(quantized: bool) -> None:
    model = tiny_rar(1)
    if quantized:
        model = random_quantized(TINY, "w8a8")
        ptq4arvg.blocks.prepare(model)
    _, tokens = decode_steps.image(model, 2)
    steps = decode_steps.Steps(model, 2)
    assert tokens is not None
    steps._tokens = tokens
    with torch.inference_mode():
        window = model.window(0, 2)
        model.step(steps._both, tokens[:, :0].repeat(2, 1), window, steps._caches)
        for step in range(1, TINY.tokens):
            assert torch.equal(steps.step(step), tokens[:, step])


def test_images_that_differ_from_round_to_round_are_found_out() -> None:
    contender = decode_steps.Contender(tiny_rar(1), 1, None, 2)
    contender.turn()
    assert contender.turns.tokens is not None
    contender.turns.tokens = contender.turns.tokens + 1
    with pytest.raises(RuntimeError, match="other tokens than before"):
        contender.turn()


def test_peers_compute_the_same_model(tmp_path: Path, tiny: None) -> None:
    models = decode_models.contenders(tmp_path, "rar_b", ("fp32", "dynamic_int8"))
    tokens, classes = torch.zeros(2, 5, dtype=torch.int64), torch.arange(2)
    expected, got = (model(tokens, classes) for model in models.values())
    assert (got - expected).norm() < 0.1 * expected.norm()
    mapped = decode_models.load(decode_models.file_of(tmp_path, "rar_b", "fp32"), "rar_b", "fp32", mapped=True)
    assert torch.equal(mapped(tokens, classes), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rar_b-fp32.safetensors"]


def test_compiled_steps_are_found_by_generate(tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(options) or function)
    for depth in (0, decode_models.WHOLE_DEPTH):  # block by block, and all of them at once
        compiled.clear()
        monkeypatch.setattr(decode_models, "WHOLE_DEPTH", depth)
        models = decode_models.contenders(tmp_path, "rar_b", ("fp32", "compiled"))
        assert (
            models["compiled"].blocks[0].mlp.fc1.weight.data_ptr() == models["fp32"].blocks[0].mlp.fc1.weight.data_ptr()
        )
        tokens = [model.generate(torch.arange(2), 3) for model in models.values()]
        assert torch.equal(*tokens)
        assert len(compiled) == (1 if depth else 2)
        assert all(options["dynamic"] for options in compiled)


def test_random_quantized_generators_can_be_saved(tmp_path: Path) -> None:
    model = random_quantized(TINY, "w6a6")
    ptq4arvg.save(model, tmp_path / "m.safetensors")
    loaded = ptq4arvg.load(tmp_path / "m.safetensors")
    tokens = torch.zeros(2, 5, dtype=torch.int64)
    with torch.no_grad():
        assert torch.equal(loaded(tokens, torch.arange(2)), model(tokens, torch.arange(2)))


def test_memory_is_above_what_was_there_before(tmp_path: Path, tiny: None) -> None:
    path = decode_models.make_file(tmp_path, "rar_b", "w6a6")
    for steps in (None, 2):
        found = decode_memory.measure(path, "rar_b", "w6a6", 1, steps)
        assert found["imports_mb"] > 50
        # This process frees memory of earlier tests meanwhile, so a tiny model may leave it smaller than before.
        assert found["loaded_mb"] <= found["load_peak_mb"] <= found["peak_memory_mb"] < 500


def test_a_failure_in_the_other_process_is_reported(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"memory of w6a6 failed(.|\n)*none\.safetensors is not a file"):
        decode_memory.in_a_process(tmp_path / "none.safetensors", "rar_b", "w6a6", 1, 1)


def invoke(*arguments: str) -> Any:
    threads = torch.get_num_threads()
    try:
        return CliRunner().invoke(decode_cpu.app, list(arguments))
    finally:
        torch.set_num_threads(threads)


def test_a_run_writes_its_figures(tmp_path: Path, tiny: None) -> None:
    path, picture = tmp_path / "figures.json", tmp_path / "plot.png"
    result = invoke(
        *("--models", "rar_b,rar_l", "--batches", "1,2", "--contenders", "w6a6,w8a8,fp32,dynamic_int8"),
        *("--rounds", "2", "--threads", "1", "--no-memory", "--json", str(path), "--plot", str(picture)),
    )
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text(encoding="utf-8"))
    assert {"machine", "command", "rows", "summary", "allocations"} <= set(report)
    assert len(report["rows"]) == 16
    wanted = {"model", "batch", "contender", "seconds_per_image", "tokens_per_s", "step_ms", "peak_memory_mb"}
    assert all(wanted <= set(r) for r in report["rows"])
    assert report["summary"]["rar_l_w6a6_vs_fp32"] > 0
    assert report["summary"]["rar_b_tokens_per_s"]["fp32"] > 0
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_few_steps_are_called_an_estimate(tmp_path: Path, tiny: None) -> None:
    path = tmp_path / "figures.json"
    arguments = ("--models", "rar_b", "--batches", "1", "--contenders", "w6a6,fp32", "--no-memory", "--steps", "4")
    assert invoke(*arguments, "--rounds", "2", "--threads", "1", "--json", str(path)).exit_code == 0
    assert all(r["estimated"] for r in json.loads(path.read_text(encoding="utf-8"))["rows"])


def test_picture_of_nothing_measured(tmp_path: Path) -> None:
    plot(tmp_path / "none.png", [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--models", "gpt"), "unknown model 'gpt'"),
        (("--contenders", "mkl"), "unknown contender 'mkl'"),
        (("--batches", "0"), "is not a list of positive numbers"),
        (("--batches", ""), "is not a list of positive numbers"),
    ],
)
def test_wrong_options_end_with_a_reason(arguments: tuple[str, ...], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.output
