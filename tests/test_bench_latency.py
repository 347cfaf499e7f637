"""The GPU benchmark without a GPU: the same code with a CPU clock on tiny sizes, and the predictions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

pytest.importorskip("triton")

from benchmarks import latency, latency_steps, rar_shapes, roofline, shapes
from benchmarks.contenders import Contender, Layer
from benchmarks.decode_steps import SEED, classes_of
from benchmarks.gpu_backends import gpu_backend
from benchmarks.gpu_contenders import TorchLayer, gpu_contenders
from benchmarks.gpu_devices import GPUS, Gpu, gpu, matching
from benchmarks.gpu_steps import Step
from benchmarks.latency_layers import COLD_FACTOR, MIN_CALLS, copies_for, measure_shape
from benchmarks.latency_report import plot
from benchmarks.timers import WARM_CALLS, CpuTimer
from benchmarks.triton_launches import is_gemm
from ptq4arvg.models import rar
from ptq4arvg.models.rar import RARConfig
from ptq4arvg_kernels import use_backend

MANIFESTS = Path(__file__).parent / "data" / "manifests"
SHAPE = shapes.LayerShape(48, 32, ("tiny.qkv",))
TINY = RARConfig(32, 2, 2, 48, codebook=16, classes=5, grid=4, pos_rows=18, time_rows=18, guidance=2.0)
SMALL_CACHE = 4096


class CountingTimer(CpuTimer):
    """A clock that tells how often it captured and replayed, and says that every replay took a second."""

    def __init__(self) -> None:
        super().__init__(SMALL_CACHE)
        self.captured, self.replayed = 0, 0

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        self.captured += 1
        return super().capture(run)

    def seconds(self, replay: Callable[[], Any], repeats: int) -> list[float]:
        self.replayed += len(super().seconds(replay, repeats))
        return [1.0] * repeats


def test_layers_are_measured_through_the_timer() -> None:
    timer = CountingTimer()
    contenders = gpu_contenders(torch.float32, compiler=None)
    with use_backend("reference", strict=True):
        [rows] = latency.time_layers(timer, [SHAPE], [2, 5], contenders, 3, baseline="fp32")
    assert [(row["contender"], row["M"]) for row in rows] == [
        (name, m) for name in ("w8a8", "w6a8", "w6a6", "fp32") for m in (2, 5)
    ]
    assert (timer.captured, timer.replayed) == (8, 24)
    for row in rows:
        # A replay of a second goes through all copies once.
        assert row["seconds"] == pytest.approx(1 / row["copies"])
        assert row["copies"] * 48 * 32 * (4 if row["contender"] == "fp32" else 0.75) >= COLD_FACTOR * SMALL_CACHE
        assert row["tops"] == pytest.approx(2 * row["M"] * 48 * 32 * row["copies"] / 1e12)
        assert row["over_fp32"] > 0
        assert row["roofline_fraction"] is None  # the limits of this device are not known


def test_plans_are_measured_where_the_backend_has_them() -> None:
    with use_backend("cpu", strict=True):
        rows = list(measure_shape(SHAPE, [3], gpu_contenders(torch.float32, "eager"), CpuTimer(SMALL_CACHE), 3))
    assert [row["contender"] for row in rows] == ["w8a8", "w6a8", "w6a6", "fp32", "fp32 compiled"]
    assert all(row["seconds"] > 0 for row in rows)


def test_a_contender_that_shares_weights_is_found_out() -> None:
    class Sharing(TorchLayer):
        def layers(self, weight: Tensor, bias: Tensor, copies: int) -> list[Layer]:
            return super().layers(weight, bias, 1) * copies

    contenders: dict[str, Contender] = {"sharing": Sharing(torch.float32)}
    with pytest.raises(RuntimeError, match="sharing does not compute this layer"):
        list(measure_shape(SHAPE, [2], contenders, CpuTimer(SMALL_CACHE), 3))


def test_copies_are_cold() -> None:
    assert copies_for(1 << 20, 50 << 20) == 250
    assert copies_for(100 << 20, 1 << 20) == MIN_CALLS
    with pytest.raises(ValueError, match="exceed 8 GiB"):
        copies_for(1 << 30, 1 << 20)


@pytest.mark.parametrize("contender", ["fp32", "w8a8", "w6a6"])
def test_an_image_of_captured_steps_is_that_of_generate(contender: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_steps, "SPAN", 6)  # several captured steps per image
    with use_backend("reference", strict=True), torch.inference_mode():
        model = latency_steps.load(TINY, contender, torch.float32, torch.device("cpu"))
        decode = latency_steps.Decode(model, 3, torch.float32)
        steps = decode.capture(CpuTimer())
        assert list(steps) == [6, 12, 17]
        wanted = model.generate(classes_of(model, 3), SEED)
        assert torch.equal(decode.image(steps), wanted)
        assert len(wanted.unique()) > 4


def test_models_are_measured_through_the_timer() -> None:
    timer = CountingTimer()
    contenders = {"w6a8": None, "fp32": None, "fp32 compiled": "eager"}
    with use_backend("reference", strict=True):
        [rows] = latency.time_models(timer, {"tiny": TINY}, [1, 2], contenders, torch.float32, 3, 4, baseline="fp32")
    assert [(row["contender"], row["images"]) for row in rows] == [(name, n) for name in contenders for n in (1, 2)]
    for row in rows:
        assert row["step_seconds"] == 1
        assert row["image_seconds"] == 1 / row["images"]
        assert row["tokens_per_s"] == 4 * row["images"]
        assert row["over_fp32"] == 1


def test_capturing_warms_up() -> None:
    calls: list[int] = []
    replay = CpuTimer().capture(lambda: calls.append(1))
    assert len(calls) == WARM_CALLS
    replay()
    assert len(calls) == WARM_CALLS + 1


# ------------------------------------------------------------------------------------------------------- predictions
@pytest.mark.parametrize("device", GPUS, ids=lambda device: device.name)
def test_published_figures_fit_each_other(device: Gpu) -> None:
    # int8 operations per clock and multiprocessor: a power of two on all of them.
    per_clock = {80: 4096, 86: 2048, 89: 2048, 90: 8192}[device.capability]
    assert device.int8_tops == pytest.approx(device.multiprocessors * per_clock * device.clock_ghz / 1e3, rel=0.01)
    ratio = 4 if device.name.startswith("RTX") else 2  # GeForce accumulates fp16 in fp32 at half the rate
    assert device.int8_tops == pytest.approx(ratio * device.fp16_tflops, rel=0.01)


def test_devices_are_found_by_name() -> None:
    assert matching("NVIDIA A100-SXM4-40GB") is gpu("a100")
    assert matching("NVIDIA GeForce RTX 4090") is gpu("RTX 4090")
    assert matching("cpu") is None
    with pytest.raises(ValueError, match="unknown GPU 'V100'"):
        gpu("V100")


@pytest.mark.parametrize("model", rar_shapes.RAR_MODELS)
def test_layers_are_those_of_the_published_checkpoints(model: str) -> None:
    manifest = json.loads((MANIFESTS / f"{model}.json").read_text(encoding="utf-8"))
    names = {
        "qkv": "blocks.0.attn.qkv",
        "proj": "blocks.0.attn.proj",
        "fc1": "blocks.0.mlp.fc1",
        "fc2": "blocks.0.mlp.fc2",
        "adaln": "blocks.0.adaLN_modulation.1",
        "head_adaln": "adaln_before_head.adaLN_modulation.1",
        "head": "lm_head",
    }
    layers = rar_shapes.rar_layers(model)
    assert layers == {kind: tuple(manifest[f"{name}.weight"][0]) for kind, name in names.items()}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RARConfig(256, 3, 4, 512, codebook=256, classes=9, grid=4, pos_rows=18, time_rows=18)
    monkeypatch.setitem(rar.CONFIGS, "tiny", config)


def test_a_bound_by_hand(tiny: None) -> None:
    device = gpu("A100")
    [qkv, *_] = [one for one in Step("tiny", "w8a8", 2, 9).record(device.device())["block"] if is_gemm(one)]
    bound = roofline.of_launch(device, qkv, gpu_backend("triton"))
    n, k = 768, 256
    assert bound.macs == 2 * n * k
    assert bound.bytes == n * k + 2 * k + 2 * n * 2
    assert bound.memory == pytest.approx(bound.bytes / 1555e9)
    c = qkv.constants
    assert bound.tensor == pytest.approx(2 * c["BM"] * c["BN"] * k / (624e12 / 108))  # a wave of less than 108 blocks
    assert bound.limit in ("memory", "issue")
    assert bound.seconds == max(bound.memory, bound.tensor, bound.issue)


def test_predictions_say_so_and_grow(tiny: None) -> None:
    shape = shapes.LayerShape(1024, 512, ("tiny.qkv",))
    rows = list(latency.predict_layers([gpu("RTX 3090")], [shape], [2, 512]))
    assert {row["kind_of_figure"] for row in rows} == {"prediction"}
    for recipe in ("w8a8", "w6a8"):
        seconds = [row["seconds"] for row in rows if row["contender"] == recipe]
        assert seconds == sorted(seconds)
    first = {row["contender"]: row for row in rows if row["M"] == 2}
    # Few rows: the weights' bytes are the time.
    assert first["w6a8"]["seconds"] < 0.8 * first["w8a8"]["seconds"]
    assert 1.8 < first["w8a8"]["over_fp16"] < 2.1
    [step] = latency.predict_models([gpu("L4")], ["tiny"], [1], ["w8a8"])
    assert step["launches_per_block"] <= 7
    assert step["launches"] == 3 * (2 + step["launches_per_block"]) + 4
    assert step["image_seconds"] == pytest.approx(16 * step["seconds"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to time")
def test_without_a_gpu_nothing_is_timed(tiny: None, tmp_path: Path) -> None:
    path, picture = tmp_path / "latency.json", tmp_path / "latency.png"
    arguments = ["--models", "tiny", "--layers", "qkv,fc2", "--rows", "2", "--images", "1", "--gpus", "A100"]
    result = CliRunner().invoke(latency.app, [*arguments, "--json", str(path), "--plot", str(picture)])
    assert result.exit_code == 0, result.output
    assert "Nothing was timed: no NVIDIA GPU" in result.output
    assert result.output.count("PREDICTION for A100") == 1
    report = json.loads(path.read_text(encoding="utf-8"))
    assert (report["timed"], report["kind_of_figures"]) == (False, "prediction")
    assert len(report["rows"]) == 2 * 2
    assert all(row["kind_of_figure"] == "prediction" for row in report["rows"] + report["steps"])
    assert "machine" not in report
    assert picture.stat().st_size > 5000


def test_a_picture_of_measured_figures(tmp_path: Path) -> None:
    rows = [
        {"contender": name, "M": m, "over_fp16": 1.5, "seconds": 1e-6} for name in ("w8a8", "fp16") for m in (2, 16)
    ]
    report = {"rows": rows, "steps": [], "timed": True, "machine": {"device": "some GPU"}}
    plot(tmp_path / "a.png", report)
    assert (tmp_path / "a.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "cpu"], "unknown backend 'cpu'"),
        (["--parts", "heads"], "unknown part 'heads'"),
        (["--predict", "--gpus", "V100"], "unknown GPU 'V100'"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(latency.app, arguments)
    assert result.exit_code == 2
    assert message in result.output
