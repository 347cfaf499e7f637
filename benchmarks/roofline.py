"""Lower bounds of the time of launches on a GPU, from what the compiled kernels do: a prediction, not a measurement.

A launch takes at least the longest of three times:

* memory: every operand comes from or goes to memory once, at the published bandwidth (weights are cold, what blocks
  read again they find in the second-level cache);
* tensor cores: the multiprocessor with the most thread blocks does the products of their tiles, padding included, at
  its share of the published int8 rate;
* issue: the same multiprocessor issues the instructions of their main loops, four warp instructions per clock.

What comes on top is not predicted: starting kernels, filling pipelines, prologues and epilogues, latency that too few
warps do not hide. Floating-point layers are given the same courtesy: the larger of their bytes and their products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .gpu_backends import GpuBackend, gpu_backend
from .gpu_devices import ISSUE_PER_CLOCK, Gpu
from .gpu_steps import Step
from .random_models import size
from .rar_shapes import rar_layers

LABEL = "prediction"


@dataclass(frozen=True)
class Bound:
    """Lower bounds in seconds; ``bytes`` of memory, ``macs`` useful multiply-adds, ``launches``."""

    memory: float
    tensor: float
    issue: float
    bytes: int
    requested: int
    macs: int

    @property
    def seconds(self) -> float:
        return max(self.memory, self.tensor, self.issue)

    @property
    def limit(self) -> str:
        """What takes longest."""
        return max(("memory", "tensor", "issue"), key=lambda name: float(getattr(self, name)))


def of_launch(gpu: Gpu, started: Any, backend: GpuBackend) -> Bound:
    """The bound of one launch, which was recorded for this GPU."""
    least, cut = backend.minimum(started), backend.product(started)
    memory = least.distinct / (gpu.memory_gb_s * 1e9)
    if cut is None:
        return Bound(memory, 0.0, 0.0, least.distinct, least.requested, 0)
    waves = -(-cut.blocks // gpu.multiprocessors)
    macs = waves * cut.steps * cut.bm * cut.bn * cut.bk
    tensor = 2 * macs / (gpu.int8_tops * 1e12 / gpu.multiprocessors)
    loop = backend.hot_loop(started, gpu.capability)
    issued = waves * cut.steps * cut.warps * loop.total / loop.iterations
    issue = issued / (ISSUE_PER_CLOCK * gpu.clock_ghz * 1e9)
    return Bound(memory, tensor, issue, least.distinct, least.requested, cut.m * cut.n * cut.k)


def total(bounds: Sequence[Bound]) -> dict[str, Any]:
    """Launches one after the other."""
    return {
        "launches": len(bounds),
        "seconds": sum(bound.seconds for bound in bounds),
        "bytes": sum(bound.bytes for bound in bounds),
        "requested_bytes": sum(bound.requested for bound in bounds),
        "macs": sum(bound.macs for bound in bounds),
    }


def float_layer(gpu: Gpu, m: int, n: int, k: int) -> float:
    """Seconds of an fp16 layer at the limits of a GPU."""
    return max(2 * (n * k + m * (n + k)) / (gpu.memory_gb_s * 1e9), 2 * m * n * k / (gpu.fp16_tflops * 1e12))


def layer_row(
    gpu: Gpu, backend: GpuBackend, recipe: str, launches: Sequence[Any], m: int, n: int, k: int
) -> dict[str, Any]:
    """The report's line of a layer, quantization included."""
    bounds = [of_launch(gpu, started, backend) for started in launches]
    sums = total(bounds)
    product = bounds[-1]
    fp16 = float_layer(gpu, m, n, k)
    return {
        "kind_of_figure": LABEL,
        "gpu": gpu.name,
        "backend": backend.name,
        "contender": recipe,
        "M": m,
        "N": n,
        "K": k,
        **sums,
        "limit": product.limit,
        "gb_s": sums["bytes"] / sums["seconds"] / 1e9,
        "tops": 2 * m * n * k / sums["seconds"] / 1e12,
        "fp16_seconds": fp16,
        "over_fp16": fp16 / sums["seconds"],
    }


def float_step(gpu: Gpu, model: str, sequences: int, slots: int) -> float:
    """Seconds of a decode step in fp16 at the limits of a GPU: layers, and keys and values in fp16 once."""
    config, layers = size(model), rar_layers(model)
    distinct = max(1, sequences // 2) + 1

    def one(kind: str) -> float:
        return float_layer(gpu, distinct if "adaln" in kind else sequences, *layers[kind])

    cache = 2 * sequences * slots * config.dim * 2 / (gpu.memory_gb_s * 1e9)
    block = cache + sum(one(kind) for kind in layers if not kind.startswith("head"))
    return config.depth * block + sum(one(kind) for kind in layers if kind.startswith("head"))


def step_row(gpu: Gpu, step: Step) -> dict[str, Any]:
    """The report's line of a decode step of a whole model: the modulation of every block and of the head included."""
    config, backend = size(step.model), gpu_backend(step.backend)
    parts = {
        name: total([of_launch(gpu, started, backend) for started in launches])
        for name, launches in step.record(gpu.device()).items()
    }
    times = {"modulation": config.depth, "block": config.depth, "head": 1}
    sums = {key: sum(times[name] * part[key] for name, part in parts.items()) for key in parts["block"]}
    fp16 = float_step(gpu, step.model, step.sequences, step.position + 1)
    return {
        "kind_of_figure": LABEL,
        "gpu": gpu.name,
        "backend": step.backend,
        "model": step.model,
        "contender": step.recipe,
        "sequences": step.sequences,
        "position": step.position,
        **sums,
        "launches_per_block": parts["block"]["launches"],
        "fp16_seconds": fp16,
        "over_fp16": fp16 / sums["seconds"],
        "image_seconds": config.tokens * sums["seconds"],
    }
