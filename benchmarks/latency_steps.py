"""Decode steps and whole images of RAR models on one device, in buffers that a graph can be captured over."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ptq4arvg.blocks import prepare
from ptq4arvg.models.rar import PREFIX, RARConfig
from ptq4arvg.models.sampling import GuidedSampler
from ptq4arvg.nn import Condition, Window

from .decode_steps import SEED, classes_of
from .random_models import random_generator, random_quantized
from .timers import Run, Timer

# Slots by which the span of a captured step grows.
SPAN = 64

Pass = Callable[[Tensor, Condition, Window, list[Any]], Tensor]


def load(config: RARConfig, contender: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A model with random weights: a recipe's integers prepared for the backend in use, or floats of ``dtype``."""
    if contender.startswith("w"):
        model = random_quantized(config, contender).to(device)
        prepare(model)
        return model
    return random_generator(config).to(device=device, dtype=dtype)


def transformer(model: Any, compiler: str | None = None) -> Pass:
    """From embedded tokens to logits; with ``compiler``, one compiled graph for all blocks and one for the head."""

    def call_block(block: Any, *operands: Any) -> Tensor:
        return block(*operands)

    def call_head(*operands: Any) -> Tensor:
        return model.head(*operands)

    if compiler is not None:
        torch._dynamo.reset()  # else the models before count against its limit of graphs
        call_block = torch.compile(call_block, backend=compiler, fullgraph=True)
        call_head = torch.compile(call_head, backend=compiler, fullgraph=True)

    def run(x: Tensor, condition: Condition, window: Window, caches: list[Any]) -> Tensor:
        for block, cache in zip(model.blocks, caches, strict=True):
            x = call_block(block, x, condition, window, cache)
        return call_head(x, condition, window.positions)

    return run


class Decode:
    """Steps over single positions of one model, in buffers that stay where they are.

    The position and the end of what is visible are read from the device, so that one graph serves all steps that look
    at no more than its span of slots. Spans are multiples of ``SPAN``: a float model reads all of them.

    Args:
        model: of :func:`load`.
        batch: images; sequences are twice as many.
        dtype: of the residual stream.
        compiler: see :func:`transformer`.
    """

    def __init__(self, model: Any, batch: int, dtype: torch.dtype, compiler: str | None = None) -> None:
        self.model, self.batch, self.dtype = model, batch, dtype
        self._eager, self._pass = transformer(model), transformer(model, compiler)
        self._device = model.cls_token.device
        classes = classes_of(model, batch).to(self._device)
        self._both = torch.cat([classes, torch.full_like(classes, model.config.none_class)])
        self.caches = model.new_caches(2 * batch)
        zero = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._position, self._end = zero, torch.ones(1, dtype=torch.int32, device=self._device)
        distinct = self._both.unique()
        self._embedded = model.embeddings(model._class_ids(distinct))
        self._condition = self._cast(model.condition(self._both, zero))
        self._x = torch.zeros(2 * batch, 1, model.config.dim, dtype=dtype, device=self._device)
        self._logits = torch.zeros(2 * batch, model.config.codebook, device=self._device)

    def _cast(self, condition: Condition) -> Condition:
        return Condition(condition.values.to(self.dtype), condition.rows, condition.positions)

    def begin(self) -> Tensor:
        """The first step, over the condition's positions; returns logits ``[2 B, V]``."""
        window = self.model.window(0, PREFIX)
        nothing = self._both.new_empty(2 * self.batch, 0)
        x = self.model.embed(self._both, nothing, window.positions).to(self.dtype)
        condition = self._cast(self.model.condition(self._both, window.positions))
        return self._eager(x, condition, window, self.caches)[:, -1].float()

    def move(self, position: int, drawn: Tensor) -> None:
        """Fill the buffers for the token drawn before ``position``."""
        model = self.model
        self._position.fill_(position)
        self._end.fill_(position + 1)
        self._condition.values.copy_(self._embedded + model.timesteps_embeddings[0, position])
        self._condition.positions.fill_(position)
        token = model.embeddings(drawn) + model.pos_embed[0, position] + model.target_aware_pos_embed[0, position + 1]
        self._x.view(2, self.batch, -1).copy_(token)

    def span(self, position: int) -> int:
        """Slots that a step at ``position`` looks at."""
        return min(-(-(position + 1) // SPAN) * SPAN, self.model.sequence_length)

    def step(self, span: int) -> Tensor:
        """One position through the whole model; what a graph is captured of. Logits ``[2 B, V]``, a buffer."""
        window = Window(self._position, self._end, span)
        logits = self._pass(self._x, self._condition, window, self.caches)
        return self._logits.copy_(logits[:, 0])

    def capture(self, timer: Timer, tokens: int | None = None) -> dict[int, Run]:
        """Replays of :meth:`step` by span, for the steps of an image of ``tokens`` (default: all)."""
        count = self.model.config.tokens if tokens is None else tokens
        spans = dict.fromkeys(self.span(i + PREFIX - 1) for i in range(1, count))
        return {span: timer.capture(functools.partial(self.step, span)) for span in spans}

    def image(self, steps: Mapping[int, Run], tokens: int | None = None) -> Tensor:
        """Tokens ``[B, T]`` of a whole image (or of its first ``tokens``); ``steps`` of :meth:`capture`."""
        config = self.model.config
        count = config.tokens if tokens is None else tokens
        sampler = GuidedSampler(self.batch, config.codebook, config.tokens, SEED, self._device)
        out = torch.empty(self.batch, count, dtype=torch.int64, device=self._device)
        logits = self.begin()
        for i in range(count):
            if i:
                position = i + PREFIX - 1
                self.move(position, out[:, i - 1])
                steps[self.span(position)]()
                logits = self._logits
            out[:, i] = sampler.draw(logits, i, self.model.guidance_weight(i), config.temperature)
        return out


def measure_model(
    name: str,
    config: RARConfig,
    contenders: Mapping[str, str | None],
    batches: list[int],
    timer: Timer,
    dtype: torch.dtype,
    repeats: int,
    tokens: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields a row per contender and batch size: seconds of a step in the middle of an image, and of whole images.

    Args:
        contenders: by name: recipes with None, float contenders with the compiler or None.
        tokens: of an image; default: all.
    """
    middle = config.tokens // 2
    for contender, compiler in contenders.items():
        model = load(config, contender, dtype, timer.device)
        for batch in batches:
            with torch.inference_mode():
                decode = Decode(model, batch, dtype, compiler)
                decode.move(middle, torch.zeros(batch, dtype=torch.int64, device=timer.device))
                exact = timer.capture(functools.partial(decode.step, middle + 1))
                steps = timer.seconds(exact, repeats)
                replays = decode.capture(timer, tokens)
                images = timer.seconds(functools.partial(decode.image, replays, tokens), 2)
            yield {
                "model": name,
                "contender": contender,
                "images": batch,
                "sequences": 2 * batch,
                "position": middle,
                "step_seconds": statistics.median(steps),
                "image_seconds": statistics.median(images) / batch,
                "tokens_per_s": (tokens or config.tokens) * batch / statistics.median(images),
            }
        del model
