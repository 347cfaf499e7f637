"""A small run of the demo keeps the contract of its files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import accuracy
from ptq4arvg.cli import app
from ptq4arvg.demo import demo
from ptq4arvg.evaluation import COMPARISON, Experiment, RowSpec, Settings, row_specs
from ptq4arvg.files import replacing, write_json
from ptq4arvg.row_pool import Task, run_rows

KEYS = {
    "name", "variant", "weight_bits", "act_bits", "integer", "size_mb", "logit_sqnr_db", "kl_nats", "top1_agreement",
    "class_accuracy", "frechet", "images", "tokens_per_s",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo")
    with (path / "printed.txt").open("w") as file:
        demo(path, Settings(images=20, samples=8, held_out=8), jobs=2, console=Console(file=file, width=160))
    return path


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "report.json").read_text())["rows"]


def test_rows_have_exactly_the_agreed_fields(rows: list[dict[str, Any]]) -> None:
    assert all(set(row) == KEYS for row in rows)
    expected = [(spec.name, variant) for variant in ("bundled", "stress") for spec in COMPARISON]
    assert [(row["name"], row["variant"]) for row in rows] == expected
    assert all(row["images"] == 20 for row in rows)


def test_figures_are_plausible(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert 0 <= row["class_accuracy"] <= 1
        assert 0 <= row["top1_agreement"] <= 1
        assert row["frechet"] > 0
        assert row["tokens_per_s"] > 0
        if row["name"] == "FP":
            assert (row["logit_sqnr_db"], row["kl_nats"], row["top1_agreement"]) == (None, 0, 1)
            assert (row["weight_bits"], row["act_bits"], row["integer"]) == (16, 16, False)
        else:
            assert row["kl_nats"] > 0
            assert math.isfinite(row["logit_sqnr_db"])


def test_integer_rows_are_small_and_simulated_ones_have_no_size(rows: list[dict[str, Any]]) -> None:
    size = {(row["name"], row["variant"]): row["size_mb"] for row in rows}
    for row in rows:
        assert row["integer"] == (row["name"] in ("W8A8", "W6A8", "W6A6"))
        assert (row["size_mb"] is None) == ("RTN" in row["name"] or "Smooth" in row["name"])
    for variant in ("bundled", "stress"):
        assert size["W6A6", variant] < size["W8A8", variant] < size["FP", variant]


def test_fp_draws_the_same_in_both_variants(rows: list[dict[str, Any]]) -> None:
    plain, stressed = (row for row in rows if row["name"] == "FP")
    assert plain["class_accuracy"] == pytest.approx(stressed["class_accuracy"], abs=0.06)
    assert plain["frechet"] == pytest.approx(stressed["frechet"], rel=0.1)


def test_eight_bits_beat_six(rows: list[dict[str, Any]]) -> None:
    sqnr = {(row["name"], row["variant"]): row["logit_sqnr_db"] for row in rows}
    for variant in ("bundled", "stress"):
        assert sqnr["W8A8", variant] > sqnr["W6A8", variant] > sqnr["W6A6", variant]
    assert sqnr["W6A6", "stress"] > sqnr["RTN W6A6", "stress"]


def test_the_picture_is_large_and_not_empty(folder: Path) -> None:
    with Image.open(folder / "images.png") as image:
        pixels = np.asarray(image.convert("L"))
    assert min(pixels.shape) > 800
    assert pixels.std() > 20


def test_the_table_is_printed(folder: Path, rows: list[dict[str, Any]]) -> None:
    printed = (folder / "printed.txt").read_text()
    for name in {row["name"] for row in rows}:
        assert name in printed
    assert "images.png" in printed


def test_the_command_passes_its_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[Path, Settings, int | None]] = []
    monkeypatch.setattr("ptq4arvg.demo.demo", lambda *arguments: calls.append(arguments))
    for arguments in ([], ["--images", "40", "--out", str(tmp_path), "--jobs", "3"]):
        assert CliRunner().invoke(app, ["demo", *arguments]).exit_code == 0
    assert calls == [(Path("out/demo"), Settings(images=500), None), (tmp_path, Settings(images=40), 3)]


def test_no_temporary_files_are_left(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {"images.png", "report.json", "printed.txt"}


def test_held_out_samples_are_not_calibration_samples() -> None:
    settings = Settings(images=20, samples=8, held_out=8)
    experiment = Experiment("bundled", settings)
    experiment.prepare()
    assert experiment.held_out is not None
    assert experiment.calibration is not None
    held_out = {tuple(row) for row in experiment.held_out[0].tolist()}
    assert not held_out & {tuple(row) for row in experiment.calibration.inputs["tokens"].tolist()}


@pytest.mark.parametrize("field", ["images", "samples", "held_out", "chunk"])
def test_settings_that_make_no_sense_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be at least"):
        Settings(**{field: 0})


def test_rows_are_chosen_by_name() -> None:
    assert [spec.name for spec in row_specs(["w6a8", "Paper W6A6"])] == ["W6A8", "paper W6A6"]
    with pytest.raises(ValueError, match="unknown row 'W4A4'; known: FP, W8A8"):
        row_specs(["W4A4"])


def test_accuracy_benchmark_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second run adds the missing row and leaves the first one as it was; other settings are refused."""
    path = tmp_path / "accuracy.json"
    monkeypatch.setattr(accuracy, "REPLICAS", 20)
    monkeypatch.setattr(accuracy, "Settings", lambda **kwargs: Settings(**(kwargs | {"samples": 4})))

    def run(*arguments: str) -> None:
        fixed = ["accuracy", "--json", str(path), "--held-out", "4", "--variants", "bundled", "--jobs", "1"]
        monkeypatch.setattr("sys.argv", [*fixed, *arguments])
        accuracy.main()

    run("--images", "20", "--rows", "FP")
    (first,) = json.loads(path.read_text())["rows"]
    low, high = first["frechet_interval"]
    assert low <= first["frechet"] <= high
    low, high = first["class_accuracy_interval"]
    assert low <= first["class_accuracy"] <= high

    run("--images", "20", "--rows", "FP", "W8A8")
    again, second = json.loads(path.read_text())["rows"]
    assert again == first, "a row that was there is not measured again: its tokens per second would differ"
    assert second["name"] == "W8A8"
    assert "W8A8" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="other settings"):
        run("--images", "21", "--rows", "FP")


@pytest.fixture
def pair() -> tuple[list[Task], Settings]:
    return [Task(variant, COMPARISON[0]) for variant in ("bundled", "stress")], Settings(
        images=4, samples=2, held_out=2
    )


def test_rows_do_not_depend_on_the_number_of_processes(pair: tuple[list[Task], Settings]) -> None:
    seen: set[Task] = set()
    results = [dict(run_rows(*pair, jobs, lambda task, fraction, what: seen.add(task))) for jobs in (1, 2)]
    assert seen == set(pair[0]) == set(results[0]) == set(results[1])
    for task in pair[0]:
        one, two = results[0][task], results[1][task]
        assert torch.equal(one.tokens, two.tokens)
        assert torch.equal(one.seen.correct, two.seen.correct)
        assert one.row.frechet == pytest.approx(two.row.frechet, rel=1e-5)


def test_errors_of_workers_arrive(pair: tuple[list[Task], Settings]) -> None:
    wrong = Task("bundled", RowSpec("?", "integer", "w3a3", 3, 3))
    with pytest.raises(ValueError, match="unknown recipe 'w3a3'"):
        list(run_rows([wrong, *pair[0]], pair[1], 2, lambda task, fraction, what: None))
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
        list(run_rows(*pair, 0, lambda task, fraction, what: None))


def test_files_are_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_json(path, {"é": 1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": 1}
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"x": math.nan})
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_random_numbers_are_shared_between_rows() -> None:
    """FP in chunks of 10 and FP again give the same tokens: rows differ by their models only."""
    experiment = Experiment("bundled", Settings(images=20, samples=2, held_out=2, chunk=10))
    first, again = (experiment.run(COMPARISON[0]) for _ in range(2))
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens[:10], first.tokens[10:])
