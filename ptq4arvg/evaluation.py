"""One row of a comparison: build a model at some precision, measure its logits, let it draw, score the pictures.

The demo and the accuracy benchmark share this runner, so that their figures mean the same.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ptq4arvg.metrics import evaluate_teacher_forced
from ptq4arvg.models.bundled import load_bundled, load_scorer
from ptq4arvg.models.rar import RAR
from ptq4arvg.protocol import CalibrationSet
from ptq4arvg.scoring import Observations, Scorer

__all__ = ["COMPARISON", "PAPER", "Experiment", "Outcome", "Row", "RowSpec", "Settings", "row_specs"]

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class RowSpec:
    """How the model of a row is made.

    Attributes:
        name: what the table calls it.
        kind: ``"fp"``, ``"integer"`` (packed and decoded in integer arithmetic) or ``"simulated"`` (fake-quantized).
        recipe: argument of ``quantize`` or ``simulate``.
    """

    name: str
    kind: str
    recipe: str
    weight_bits: int
    act_bits: int


COMPARISON = (
    RowSpec("FP", "fp", "", 16, 16),
    RowSpec("W8A8", "integer", "w8a8", 8, 8),
    RowSpec("W6A8", "integer", "w6a8", 6, 8),
    RowSpec("W6A6", "integer", "w6a6", 6, 6),
    RowSpec("RTN W6A6", "simulated", "rtn", 6, 6),
    RowSpec("SmoothQuant W6A6", "simulated", "smoothquant", 6, 6),
)
PAPER = (
    RowSpec("paper W8A8", "simulated", "paper", 8, 8),
    RowSpec("paper W6A6", "simulated", "paper", 6, 6),
)


def row_specs(names: list[str]) -> list[RowSpec]:
    """The rows of these names, upper and lower case alike.

    Raises:
        ValueError: an unknown name.
    """
    known = {spec.name.lower(): spec for spec in (*COMPARISON, *PAPER)}
    for name in names:
        if name.lower() not in known:
            raise ValueError(f"unknown row {name!r}; known: {', '.join(spec.name for spec in known.values())}")
    return [known[name.lower()] for name in names]


@dataclass(frozen=True)
class Row:
    """The figures of one row.

    Attributes:
        size_mb: the generator on disk in 10⁶ bytes: fp16 tensors for FP, the saved checkpoint for integer rows, None
            for simulated ones, which exist in floating point only.
        logit_sqnr_db: None for FP, which is its own reference.
        tokens_per_s: image tokens per second of wall-clock time while drawing, all pictures of a chunk in one batch, on
            this machine, while other rows may run beside it. Simulated rows time the simulation.
    """

    name: str
    variant: str
    weight_bits: int
    act_bits: int
    integer: bool
    size_mb: float | None
    logit_sqnr_db: float | None
    kl_nats: float
    top1_agreement: float
    class_accuracy: float
    frechet: float
    images: int
    tokens_per_s: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Outcome:
    """A row, the tokens ``[images, T]`` behind it and what the classifier saw in their pictures."""

    row: Row
    tokens: Tensor
    seen: Observations


@dataclass(frozen=True)
class Settings:
    """What all rows of a comparison have in common. The seeds are far apart, so that no two purposes share random
    numbers.

    Attributes:
        images: pictures per row, classes in turn.
        samples: calibration samples per guidance branch.
        held_out: floating-point samples for the teacher-forced figures, drawn from a seed that calibration never uses.
        chunk: pictures drawn in one batch.
    """

    images: int = 500
    samples: int = 128
    held_out: int = 128
    chunk: int = 500
    calibration_seed: int = 0
    held_out_seed: int = 1_000_000
    image_seed: int = 2_000_000

    def __post_init__(self) -> None:
        for name, least in (("images", 2), ("samples", 1), ("held_out", 1), ("chunk", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Experiment:
    """The comparison on one variant of the bundled model. Original and samples are made once for all rows."""

    variant: str
    settings: Settings
    scorer: Scorer = field(default_factory=load_scorer)

    def __post_init__(self) -> None:
        self.model: RAR = load_bundled(self.variant)
        self.calibration: CalibrationSet | None = None
        self.held_out: tuple[Tensor, Tensor] | None = None

    def prepare(self, progress: Progress = lambda fraction, what: None) -> None:
        """Sample the calibration sequences and the held-out sequences, unless that is done."""
        from ptq4arvg.pipeline import collect_calibration

        if self.calibration is not None:
            return
        settings, steps = self.settings, self.model.config.tokens
        self.calibration = collect_calibration(self.model, settings.samples, settings.calibration_seed)
        progress(0.5, "held-out samples")
        classes = torch.arange(settings.held_out) % self.model.config.classes
        tokens = self.model.generate(
            classes,
            settings.held_out_seed,
            progress=lambda step: progress(0.5 + 0.5 * (step + 1) / steps, "held-out samples"),
        )
        self.held_out = tokens, classes
        progress(1.0, "done")

    def run(self, spec: RowSpec, progress: Progress = lambda fraction, what: None) -> Outcome:
        """Build, measure, draw and score one row."""
        self.prepare()
        assert self.held_out is not None
        settings = self.settings
        model, size = self._build(spec, lambda fraction: progress(0.3 * fraction, "quantize"))
        sqnr: float | None = None
        kl, agreement = 0.0, 1.0
        if spec.kind != "fp":
            found = evaluate_teacher_forced(
                self.model,
                model,
                *self.held_out,
                progress=lambda fraction: progress(0.3 + 0.2 * fraction, "compare logits"),
            )
            sqnr, kl, agreement = found.logit_sqnr_db, found.kl_nats, found.top1_agreement
            if not math.isfinite(sqnr):
                raise ValueError(
                    f"{spec.name} ({self.variant}): the SQNR is {sqnr}; its logits are not those of a quantized model"
                )
        tokens, classes, seconds = self._draw(model, lambda fraction: progress(0.5 + 0.5 * fraction, "draw"))
        seen = self.scorer.observe(tokens, classes)
        row = Row(
            name=spec.name,
            variant=self.variant,
            weight_bits=spec.weight_bits,
            act_bits=spec.act_bits,
            integer=spec.kind == "integer",
            size_mb=size,
            logit_sqnr_db=sqnr,
            kl_nats=kl,
            top1_agreement=agreement,
            class_accuracy=seen.class_accuracy,
            frechet=self.scorer.frechet(seen),
            images=settings.images,
            tokens_per_s=tokens.numel() / seconds,
        )
        progress(1.0, "done")
        return Outcome(row, tokens, seen)

    def _build(self, spec: RowSpec, progress: Callable[[float], None]) -> tuple[RAR, float | None]:
        """The model of a row, and its size on disk."""
        if spec.kind == "fp":
            half = {key: value.half() for key, value in self.model.state_dict().items()}
            return self.model, len(save(half)) / 1e6
        if spec.kind == "simulated":
            from ptq4arvg.simulate import simulate

            simulated = simulate(
                self.model,
                spec.recipe,
                weight_bits=spec.weight_bits,
                act_bits=spec.act_bits,
                calibration=self.calibration,
            )
            return simulated, None
        from ptq4arvg import checkpoint
        from ptq4arvg.pipeline import quantize

        quantized = quantize(
            self.model, spec.recipe, self.calibration, progress=lambda fraction, what: progress(fraction)
        )
        # Measured and shown is what a user gets back from the file, not what was in memory before.
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "generator.safetensors"
            checkpoint.save(quantized, path)
            return checkpoint.load(path), path.stat().st_size / 1e6

    def _draw(self, model: RAR, progress: Callable[[float], None]) -> tuple[Tensor, Tensor, float]:
        """Tokens, classes and the seconds that drawing took."""
        settings, steps = self.settings, self.model.config.tokens
        classes = torch.arange(settings.images) % self.model.config.classes
        parts = classes.split(settings.chunk)
        drawn: list[Tensor] = []

        def show(step: int) -> None:
            progress((len(drawn) + (step + 1) / steps) / len(parts))

        started = time.perf_counter()
        for i, part in enumerate(parts):
            drawn.append(model.generate(part, settings.image_seed + i, progress=show))
        return torch.cat(drawn), classes, time.perf_counter() - started
