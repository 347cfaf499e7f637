"""Timing of whole images and of chosen steps of an image, contenders in alternation."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptq4arvg.decode import CHUNK_ROWS
from ptq4arvg.models.sampling import GuidedSampler

from .contention import Contention
from .timing import SETTLE_S

SEED = 1
# Steps at the start that are not part of step_ms: two positions at once, first uses of buffers.
FIRST_STEPS = 2
# Steps of the warm-up: compilation, packing and the first touch of every weight.
WARM_STEPS = 4


class Stop(Exception):
    """Raised by a callback of ``generate`` to end an image early."""


def classes_of(model: Any, batch: int) -> Tensor:
    """Class labels ``[batch]``, all different where there are enough."""
    return torch.arange(batch) * 7 % model.config.classes


def image(model: Any, batch: int, steps: int | None = None) -> tuple[list[float], Tensor | None]:
    """Seconds of every step of an image, or of its first ``steps``, and the tokens of a whole one.

    Raises:
        RuntimeError: a token is not one of the codebook.
    """
    stamps: list[float] = []

    def stamp(step: int) -> None:
        stamps.append(time.perf_counter())
        if steps is not None and step + 1 >= steps:
            raise Stop

    tokens: Tensor | None = None
    start = time.perf_counter()
    try:
        tokens = model.generate(classes_of(model, batch), SEED, progress=stamp)
    except Stop:
        pass
    else:
        stamps[-1] = time.perf_counter()  # with what comes after the last step
        shape, codes = (batch, model.config.tokens), model.config.codebook
        if tuple(tokens.shape) != shape or int(tokens.min()) < 0 or int(tokens.max()) >= codes:
            raise RuntimeError(f"not an image of {shape[1]} tokens below {codes}: {tokens}")
    return np.diff([start, *stamps]).tolist(), tokens


def run_length(model: Any, batch: int) -> int:
    """Consecutive steps that must be timed together: those that share one computation of the modulation."""
    if getattr(model, "quantization", None) is None:
        return 1
    distinct = len(classes_of(model, batch).unique()) + 1
    return max(1, min(CHUNK_ROWS // distinct, model.config.tokens - 1))


def spread(tokens: int, steps: int, run: int) -> list[range]:
    """About ``steps`` steps in runs of ``run``, spread evenly over the steps ``1 … tokens - 1``."""
    available = tokens - 1
    count = max(1, min(round(steps / run), available // run))
    gap = available / count
    return [range(start := 1 + int(i * gap + (gap - run) / 2), start + run) for i in range(count)]


class Steps:
    """Single steps of an image, as ``generate`` does them, at any place; the tokens before it are random."""

    def __init__(self, model: Any, batch: int) -> None:
        config, classes = model.config, classes_of(model, batch)
        self._model, self._batch = model, batch
        self._both = torch.cat([classes, torch.full_like(classes, config.none_class)])
        self._caches = model.new_caches(2 * batch)
        for cache in self._caches:  # memory that was never written is not there
            cache.k.fill_(1)
            cache.v.fill_(1)
        self._decoder = model._decoder(self._both, self._caches)
        self._sampler = GuidedSampler(batch, config.codebook, config.tokens, SEED, classes.device)
        generator = torch.Generator().manual_seed(SEED)
        self._tokens = torch.randint(config.codebook, (batch, config.tokens), generator=generator)

    def step(self, step: int) -> Tensor:
        """The token after ``step`` ≥ 1 others."""
        model, config, position = self._model, self._model.config, step + 1
        if self._decoder is not None:
            model._embed_token(self._decoder.x, self._tokens[:, step - 1], position)
            logits = self._decoder.step(position)
        else:
            window = model.window(position, 1)
            logits = model.step(self._both, self._tokens[:, :step].repeat(2, 1), window, self._caches)[:, -1].float()
        return self._sampler.draw(logits, step, model.guidance_weight(step), config.temperature)

    def time(self, runs: Sequence[range]) -> list[float]:
        """Mean seconds per step of every run."""
        means = []
        with torch.inference_mode():
            for run in runs:
                start = time.perf_counter()
                for step in run:
                    self.step(step)
                means.append((time.perf_counter() - start) / len(run))
        return means


def image_seconds(runs: Sequence[range], means: Sequence[float], tokens: int) -> float:
    """Time of an image from the mean times of steps in runs, linear between their middles."""
    middles = [(run.start + run.stop - 1) / 2 for run in runs]
    return float(np.interp(np.arange(tokens), middles, means).sum())


@dataclass
class Turns:
    """What was measured of one contender: a list entry per turn."""

    seconds: list[float] = field(default_factory=list)
    steps: list[list[float]] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    tokens: Tensor | None = None
    estimated: bool = False

    def row(self, batch: int, tokens: int) -> dict[str, Any]:
        """Medians over the turns."""
        seconds = statistics.median(self.seconds) / batch
        per_step = np.median(np.array(self.steps), axis=0)
        return {
            "seconds_per_image": seconds,
            "tokens_per_s": tokens / seconds,
            "step_ms": float(np.median(per_step)) * 1e3,
            "round_seconds": self.seconds,
            "estimated": self.estimated,
            "others": max(self.others, default=None),
        }


class Contender:
    """A model at one batch size, timed turn by turn.

    Args:
        model, batch: what is run.
        steps: steps of a turn; None for whole images by ``generate``.
        rounds: in how many turns it takes part.
    """

    def __init__(self, model: Any, batch: int, steps: int | None, rounds: int) -> None:
        self.model, self.batch, self.rounds = model, batch, rounds
        tokens = model.config.tokens
        self.runs = None if steps is None or steps >= tokens else spread(tokens, steps, run_length(model, batch))
        self.turns = Turns(estimated=self.runs is not None)
        self._steps = None if self.runs is None else Steps(model, batch)

    def warm_up(self) -> float:
        """Seconds of the first steps, with all that happens only once."""
        start = time.perf_counter()
        image(self.model, self.batch, WARM_STEPS)
        if self._steps is not None:
            self._steps.time([range(1, 3)])
        return time.perf_counter() - start

    def turn(self) -> None:
        """Time one image or its chosen steps.

        Raises:
            RuntimeError: invalid tokens, or not those of the turn before.
        """
        contention, turns = Contention(), self.turns
        if self.runs is None or self._steps is None:
            times, tokens = image(self.model, self.batch)
            assert tokens is not None
            if turns.tokens is not None and not torch.equal(tokens, turns.tokens):
                raise RuntimeError("the same seed gave other tokens than before")
            turns.tokens = tokens
            turns.seconds.append(sum(times))
            turns.steps.append(times[FIRST_STEPS:])
        else:
            means = self._steps.time(self.runs)
            turns.seconds.append(image_seconds(self.runs, means, self.model.config.tokens))
            turns.steps.append(means)
        others = contention.others()
        if others is not None:
            turns.others.append(others)


def alternate(contenders: Sequence[Contender], settle_s: float = SETTLE_S) -> None:
    """All turns, contenders with fewer rounds spread over those of the others."""
    rounds = max(contender.rounds for contender in contenders)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for i in range(rounds):
            order = contenders if i % 2 == 0 else contenders[::-1]
            for contender in order:
                if (i * contender.rounds) // rounds != ((i - 1) * contender.rounds) // rounds:
                    time.sleep(settle_s)
                    contender.turn()
    finally:
        if collecting:
            gc.enable()
