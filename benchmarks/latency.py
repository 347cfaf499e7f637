"""Linear layers, decode steps and whole images of the RAR models on a GPU: integer kernels against fp16 torch.

    python -m benchmarks.latency --json out/latency.json --plot out/latency.png
    python -m benchmarks.latency --models rar_l --rows 2,16 --parts layers
    python -m benchmarks.latency --predict
    python -m benchmarks.latency --backend triton,cuda

Timed with CUDA events around CUDA graphs. Layers rotate over copies whose weights together are five times the
second-level cache, so that every call reads them from memory; quantization of the activations is part of a call. A
decode step runs the whole model, modulation included. Baselines: fp16 torch (products of cuBLAS), and it compiled.

Without a GPU nothing is timed: what is printed is a prediction for some GPUs, from the compiled kernels and published
limits (benchmarks/roofline.py), a lower bound of every time.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from ptq4arvg.files import write_json
from ptq4arvg.models.rar import RARConfig
from ptq4arvg_kernels import BackendError, use_backend

from .contenders import Contender, Layer
from .gpu_backends import BACKENDS, GpuBackend, gpu_backend
from .gpu_contenders import IntegerLayer, gpu_contenders
from .gpu_devices import ARCHITECTURES, GPUS, Gpu, gpu, matching
from .gpu_report import PRINTED_WIDTH
from .gpu_steps import Step
from .latency_layers import measure_shape
from .latency_report import layer_table, plot, prediction_table, ratio_table, step_table
from .latency_steps import measure_model
from .linear_cpu import checked_backend
from .names import names, numbers
from .random_models import size
from .rar_shapes import RAR_MODELS, rar_shapes
from .roofline import LABEL, layer_row, step_row
from .shapes import LayerShape
from .timers import CudaTimer, Timer

PARTS = ("layers", "models")
ROWS, IMAGES, REPEATS = (2, 16, 64, 200), (1, 8, 100), 15
PREDICTED = ("w8a8", "w6a8")
BACKEND = "triton"
MODEL_CONTENDERS: Mapping[str, str | None] = {
    "w8a8": None,
    "w6a8": None,
    "w6a6": None,
    "fp16": None,
    "fp16 compiled": "inductor",
}
BASELINE = "fp16"
NOTHING_TIMED = "Nothing was timed: {reason}. What follows is a prediction, a lower bound of every time."


def with_ratios(rows: Sequence[dict[str, Any]], keys: Sequence[str], seconds: str, baseline: str) -> None:
    """Add ``over_<baseline>``, the times faster than the baseline, to rows that agree with it in ``keys``."""
    known = {tuple(row[key] for key in keys): row[seconds] for row in rows if row["contender"] == baseline}
    for row in rows:
        other = known.get(tuple(row[key] for key in keys))
        row[f"over_{baseline}"] = None if other is None else other / row[seconds]


def with_roofline(rows: Sequence[dict[str, Any]], device: Gpu | None) -> None:
    """Add ``roofline_fraction`` to layers: the time of bytes or products at the limits, over the measured one."""
    for row in rows:
        row["roofline_fraction"] = None
        if device is not None:
            peak = device.int8_tops if row["contender"].startswith("w") else device.fp16_tflops
            products = 2 * row["M"] * row["N"] * row["K"] / (peak * 1e12)
            row["roofline_fraction"] = max(row["bytes"] / (device.memory_gb_s * 1e9), products) / row["seconds"]


def time_layers(
    timer: Timer,
    shapes: Sequence[LayerShape],
    counts: Sequence[int],
    contenders: Mapping[str, Contender],
    repeats: int,
    baseline: str = BASELINE,
) -> Iterator[list[dict[str, Any]]]:
    """Yields the rows of every shape, with ratios and fractions of the roofline."""
    device = matching(str(timer.describe()["device"]))
    for shape in shapes:
        with torch.inference_mode():
            rows = list(measure_shape(shape, counts, contenders, timer, repeats))
        with_ratios(rows, ("N", "K", "M"), "seconds", baseline)
        with_roofline(rows, device)
        yield rows


def time_models(
    timer: Timer,
    models: Mapping[str, RARConfig],
    images: Sequence[int],
    contenders: Mapping[str, str | None],
    dtype: torch.dtype,
    repeats: int,
    tokens: int | None = None,
    baseline: str = BASELINE,
) -> Iterator[list[dict[str, Any]]]:
    """Yields the rows of every model: a decode step in the middle, and whole images."""
    for name, config in models.items():
        rows = list(measure_model(name, config, contenders, list(images), timer, dtype, repeats, tokens))
        with_ratios(rows, ("model", "images"), "step_seconds", baseline)
        yield rows


def _layer_of(shape: LayerShape, recipe: str, backend: GpuBackend) -> Layer:
    """A layer of random weights with the backend's plans, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(shape.n, shape.k, generator=generator), torch.zeros(shape.n)
    contender = IntegerLayer(int(recipe[1]), int(recipe[3]), torch.float16)
    with backend.launching(ARCHITECTURES[80], lambda _: None):
        return contender.layers(weight, bias, 1)[0]


def predict_layers(
    gpus: Sequence[Gpu],
    shapes: Sequence[LayerShape],
    counts: Sequence[int],
    recipes: Sequence[str] = PREDICTED,
    backend: str = BACKEND,
) -> Iterator[dict[str, Any]]:
    """A row per shape, recipe, M and GPU."""
    ours = gpu_backend(backend)
    for shape in shapes:
        for recipe in recipes:
            layer = _layer_of(shape, recipe, ours)
            for m in counts:
                x = torch.zeros(m, shape.k, dtype=torch.float16)
                call = layer(x, x.new_empty(m, shape.n))
                for device in gpus:
                    launches = ours.record(device.device(), call)
                    row = layer_row(device, ours, recipe, launches, m, shape.n, shape.k)
                    yield row | {"layers": list(shape.users), "kind": shape.kind}


def predict_models(
    gpus: Sequence[Gpu],
    models: Sequence[str],
    images: Sequence[int],
    recipes: Sequence[str] = PREDICTED,
    backend: str = BACKEND,
) -> Iterator[dict[str, Any]]:
    """A row per model, recipe, number of images and GPU: a decode step in the middle, and an image of such steps."""
    for model in models:
        for recipe in recipes:
            for count in images:
                step = Step(model, recipe, 2 * count, size(model).tokens // 2, backend=backend)
                for device in gpus:
                    row = step_row(device, step)
                    yield row | {"images": count, "image_seconds": row["image_seconds"] / count}


def _predict(
    console: Console, parts: Sequence[str], gpus: Sequence[Gpu], models: Sequence[str], options: Mapping[str, Any]
) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    steps: list[dict[str, Any]] = []
    for backend in options["backends"]:
        if "layers" in parts:
            rows += predict_layers(gpus, rar_shapes(models, options["layers"]), options["rows"], backend=backend)
        if "models" in parts:
            steps += predict_models(gpus, models, options["images"], backend=backend)
    if len(options["backends"]) > 1:  # side by side
        for row in rows + steps:
            side_by_side([row], row["backend"], several=True)
        rows.sort(key=lambda row: (row["N"], row["K"], row["contender"][:4], row["M"]))
        steps.sort(key=lambda row: (models.index(row["model"]), row["contender"][:4], row["images"]))
    for device in gpus:
        layers = [row for row in rows if row["gpu"] == device.name]
        console.print(prediction_table(device, layers, [row for row in steps if row["gpu"] == device.name]))
    return {"kind_of_figures": LABEL, "timed": False, "rows": rows, "steps": steps}


def _time(
    console: Console, timer: Timer, parts: Sequence[str], models: Sequence[str], options: Mapping[str, Any]
) -> dict[str, Any]:
    report: dict[str, Any] = {"kind_of_figures": "measured", "timed": True, "rows": [], "steps": []}
    if "layers" in parts:
        contenders = gpu_contenders(torch.float16)
        shapes = rar_shapes(models, options["layers"])
        for shape, rows in zip(
            shapes, time_layers(timer, shapes, options["rows"], contenders, options["repeats"]), strict=True
        ):
            report["rows"] += rows
            console.print(layer_table(f"{shape.name}: {', '.join(shape.users)}", rows))
        console.print(ratio_table(report["rows"], BASELINE))
    if "models" in parts:
        configs = {name: size(name) for name in models}
        for rows in time_models(timer, configs, options["images"], MODEL_CONTENDERS, torch.float16, options["repeats"]):
            report["steps"] += rows
            console.print(step_table(rows, BASELINE))
    return report


def side_by_side(rows: Sequence[dict[str, Any]], backend: str, several: bool) -> None:
    """Note the backend of our contenders, with ``several`` in their names too."""
    for row in rows:
        if row["contender"].startswith("w"):
            row["backend"] = backend
            if several:
                row["contender"] = f"{row['contender']} {backend}"


def _time_backends(
    console: Console, timer: Timer, parts: Sequence[str], models: Sequence[str], options: Mapping[str, Any]
) -> dict[str, Any]:
    """:func:`_time` with every backend; baselines are kept of the first."""
    report: dict[str, Any] = {}
    for backend in options["backends"]:
        with use_backend(checked_backend(backend), strict=True):
            console.print(f"our kernels: {backend}")
            found = _time(console, timer, parts, models, options)
        for key in ("rows", "steps"):
            side_by_side(found[key], backend, len(options["backends"]) > 1)
            if report:
                report[key] += [row for row in found[key] if "backend" in row]
        report = report or found
    return report


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(help="Linear layers, decode steps and whole images on a GPU, against fp16 torch.")
def main(
    models: Annotated[str, typer.Option(help=f"of {','.join(RAR_MODELS)}")] = ",".join(RAR_MODELS),
    layers: Annotated[str, typer.Option(help="kinds of layers; default: all")] = "",
    rows: Annotated[str, typer.Option(help="numbers of rows M of layers")] = ",".join(map(str, ROWS)),
    images: Annotated[str, typer.Option(help="images at once, two sequences each")] = ",".join(map(str, IMAGES)),
    parts: Annotated[str, typer.Option(help=f"of {','.join(PARTS)}")] = ",".join(PARTS),
    gpus: Annotated[str, typer.Option(help="to predict for; default: all that are known")] = "",
    backend: Annotated[
        str, typer.Option(help=f"of our kernels, {' or '.join(BACKENDS)}, no other stands in for it; or several")
    ] = BACKEND,
    repeats: Annotated[int, typer.Option(min=3, help="replays, of which the median counts")] = REPEATS,
    predict: Annotated[bool, typer.Option("--predict", help="predict even if there is a GPU")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="rar_b: two layers, two rows; one image")] = False,
    json: Annotated[Path | None, typer.Option(help="file of figures")] = None,
    picture: Annotated[Path | None, typer.Option("--plot", help="PNG")] = None,
) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=PRINTED_WIDTH)
    start = time.monotonic()
    timer: Timer | None = None
    try:
        chosen_models = ["rar_b"] if quick else names(models)
        chosen_parts = names(parts)
        for part in chosen_parts:
            if part not in PARTS:
                raise ValueError(f"--parts: unknown part {part!r}; known are {', '.join(PARTS)}")
        chosen_backends = names(backend)
        for name in chosen_backends:
            if name not in BACKENDS:
                raise ValueError(f"--backend: unknown backend {name!r}; known are {', '.join(BACKENDS)}")
        options = {
            "layers": ["qkv", "fc1"] if quick else names(layers),
            "rows": [2] if quick else numbers("--rows", rows),
            "images": [1] if quick else numbers("--images", images),
            "repeats": repeats,
            "backends": chosen_backends,
        }
        chosen_gpus = [gpu(name) for name in names(gpus)] if gpus else list(GPUS)
        reason = "--predict was given"
        if not predict:
            try:
                timer = CudaTimer()
            except RuntimeError as error:
                reason = str(error)
        if timer is None:
            console.print(NOTHING_TIMED.format(reason=reason), soft_wrap=True)
            report = _predict(console, chosen_parts, chosen_gpus, chosen_models, options)
            report["reason"] = reason
            console.print("All figures above are predictions; nothing was timed.")
        else:
            report = _time_backends(console, timer, chosen_parts, chosen_models, options)
            report["machine"] = timer.describe()
    except (ValueError, RuntimeError, BackendError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    report = {
        "command": shlex.join(["python", "-m", "benchmarks.latency", *sys.argv[1:]]),
        "backend": backend,
        "minutes": (time.monotonic() - start) / 60,
    } | report
    if json is not None:
        write_json(json, report)
    if picture is not None:
        plot(picture, report)


if __name__ == "__main__":
    app()
