"""RAR (Randomized AutoRegressive visual generation), the class-conditional generator of bytedance/1d-tokenizer.

Described in method.md §2.1.

Sequence: position 0 a learned ``cls_token``, position 1 the class embedding, position 2+i the image token i; the last
image token is never fed back. The condition of a token is ``E[class] + timesteps_embeddings[position]``, so every
position has its own modulation. State-dict keys and shapes are those of the published checkpoints, which load
unmodified.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptq4arvg.decode import Decoder, can_decode
from ptq4arvg.models.sampling import GuidedSampler
from ptq4arvg.nn import AttentionTaps, Condition, KVCache, Linear, Norm, Window, attend
from ptq4arvg.protocol import (
    AttentionSpec,
    BlockSpec,
    CalibrationSet,
    Conditioning,
    FoldPair,
    HeadSpec,
    LinearSpec,
    Modulation,
)

__all__ = ["CONFIGS", "RAR", "RARConfig"]

SAMPLE_CHUNK = 64  # sequences drawn at once for calibration
PREFIX = 2  # cls_token and class token precede the image tokens


@dataclass(frozen=True)
class RARConfig:
    """Sizes and published sampling settings of one RAR.

    Attributes:
        dim, depth, heads, mlp_dim: width D, blocks, attention heads, hidden width of the MLP.
        codebook: image codes; the embedding table has ``codebook + 1 + classes + 1`` rows (codes, mask, classes,
            "none").
        classes: number of classes.
        grid: image tokens per side; a sequence has ``grid² + 1`` positions that are fed (two prefixes, all tokens but
            the last).
        pos_rows, time_rows: rows of the position tables in the checkpoint (1280 and 356 in the published ones).
        temperature, guidance, power: the published sampling settings (temp, g, pow of method.md §2.1).
    """

    dim: int
    depth: int
    heads: int
    mlp_dim: int
    codebook: int = 1024
    classes: int = 1000
    grid: int = 16
    pos_rows: int = 1280
    time_rows: int = 356
    temperature: float = 1.0
    guidance: float = 1.0
    power: float = 1.0

    def __post_init__(self) -> None:
        for field in ("dim", "depth", "heads", "mlp_dim", "codebook", "classes", "grid"):
            if getattr(self, field) < 1:
                raise ValueError(f"RARConfig.{field} must be positive, got {getattr(self, field)}")
        if self.dim % self.heads:
            raise ValueError(f"RARConfig.dim {self.dim} is not a multiple of heads {self.heads}")
        needed = self.tokens + PREFIX
        if self.pos_rows < needed or self.time_rows < needed:
            raise ValueError(
                f"a {self.grid}×{self.grid} grid needs {needed} rows in the position tables, got "
                f"pos_rows={self.pos_rows} and time_rows={self.time_rows}"
            )

    @property
    def tokens(self) -> int:
        """Image tokens of one picture."""
        return self.grid * self.grid

    @property
    def none_class(self) -> int:
        """Class index that stands for "no class" (the unconditional branch)."""
        return self.classes


CONFIGS: dict[str, RARConfig] = {
    "rar_b": RARConfig(768, 24, 16, 3072, temperature=1.0, guidance=16.0, power=2.75),
    "rar_l": RARConfig(1024, 24, 16, 4096, temperature=1.02, guidance=15.5, power=2.5),
    "rar_xl": RARConfig(1280, 32, 16, 5120, temperature=1.02, guidance=6.9, power=1.5),
    "rar_xxl": RARConfig(1408, 40, 16, 6144, temperature=1.02, guidance=8.0, power=1.2),
}


class Attention(nn.Module):
    """Multi-head attention with LayerNorm on q and k; the cache stores normalised k and raw v."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.qkv = Linear(dim, 3 * dim)
        self.q_norm = Norm(self.head_dim)
        self.k_norm = Norm(self.head_dim)
        self.proj = Linear(dim, dim)
        self.taps = AttentionTaps()

    def forward(self, x: Tensor, window: Window, cache: KVCache | None) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(x, window.positions).view(batch, length, 3, self.heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if cache is not None:
            cache.append(k, v, window.positions)
            k, v = cache.k, cache.v
        return self.proj(attend(q, k, v, window, self.head_dim**-0.5, self.taps), window.positions)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x, positions)), positions)


def modulation_layer(dim: int, chunks: int) -> nn.Sequential:
    """SiLU and the linear that produces ``chunks`` blocks of D modulation channels (published keys end in ``.1``)."""
    return nn.Sequential(nn.SiLU(), Linear(dim, chunks * dim))


def modulate(layer: nn.Sequential, condition: Condition, chunks: int, shape: tuple[int, int]) -> tuple[Tensor, ...]:
    """Modulation chunks, each ``[B, P, D]``, computed once per distinct condition and then spread over the rows."""
    distinct = layer[1](layer[0](condition.values), condition.positions)
    return distinct.index_select(0, condition.rows).view(*shape, chunks, -1).unbind(2)


class Block(nn.Module):
    """Attention and MLP, each behind a modulated LayerNorm and a gate.

    Chunks of the modulation: shift1, scale1, gate1, shift2, scale2, gate2.
    """

    def __init__(self, config: RARConfig) -> None:
        super().__init__()
        self.norm1 = Norm(config.dim)
        self.attn = Attention(config.dim, config.heads)
        self.norm2 = Norm(config.dim)
        self.mlp = Mlp(config.dim, config.mlp_dim)
        self.adaLN_modulation = modulation_layer(config.dim, 6)

    def forward(self, x: Tensor, condition: Condition, window: Window, cache: KVCache | None = None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = modulate(
            self.adaLN_modulation, condition, 6, (x.shape[0], x.shape[1])
        )
        x = x + gate1 * self.attn(self.norm1(x, scale1, shift1), window, cache)
        return x + gate2 * self.mlp(self.norm2(x, scale2, shift2), window.positions)

    def new_cache(self, batch: int, slots: int) -> KVCache:
        weight = self.attn.qkv.weight
        return KVCache(batch, self.attn.heads, slots, self.attn.head_dim, weight.dtype, weight.device)


class FinalModulation(nn.Module):
    """LayerNorm without affine, modulated by (scale, shift): the last norm before the head."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = Norm(dim, affine=False)
        self.adaLN_modulation = modulation_layer(dim, 2)

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        scale, shift = modulate(self.adaLN_modulation, condition, 2, (x.shape[0], x.shape[1]))
        return self.norm(x, scale, shift)


class RAR(nn.Module):
    """Class-conditional RAR generator.

    It speaks the protocol of :mod:`ptq4arvg.protocol`, so that calibration, folding and quantization need not know its
    family.
    """

    family = "rar"

    def __init__(self, config: RARConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.pos_rows, dim))
        self.target_aware_pos_embed = nn.Parameter(torch.zeros(1, config.pos_rows, dim))
        self.timesteps_embeddings = nn.Parameter(torch.zeros(1, config.time_rows, dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        rows = config.codebook + 1 + config.classes + 1
        # Given its weight, the module draws none: drawing on the meta device imports a computer algebra system.
        self.embeddings = nn.Embedding(rows, dim, _weight=torch.zeros(rows, dim))
        self.adaln_before_head = FinalModulation(dim)
        self.lm_head = Linear(dim, config.codebook)
        self.fused_head: nn.Module | None = None

    # --- construction -------------------------------------------------------------------------------------------------

    @classmethod
    def from_config(cls, name: str) -> RAR:
        """A RAR with random weights of a published size; ``name`` is a key of :data:`CONFIGS`."""
        if name not in CONFIGS:
            raise ValueError(f"unknown RAR config {name!r}; known: {', '.join(CONFIGS)}")
        return cls(CONFIGS[name])

    @classmethod
    def from_published(cls, name: str, path: str | Path) -> RAR:
        """Load a published ``.bin`` checkpoint (read with ``weights_only=True``), or safetensors of the same keys.

        Raises:
            CheckpointError: unreadable file, or keys and shapes that are not those of ``name``.
        """
        from ptq4arvg.state_dict import load_strict, read_state_dict

        with torch.device("meta"):
            model = cls.from_config(name)
        model.to_empty(device="cpu")
        load_strict(model, read_state_dict(path), source=str(path))
        return model.float().eval()

    def initialize(self, generator: torch.Generator, std: float = 0.02) -> RAR:
        """Draw every matrix and table from N(0, std²); modulations start at zero, as for training. Returns self."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "adaLN_modulation" in name or name.endswith("bias"):
                    parameter.zero_()
                elif "norm" in name:
                    parameter.fill_(1.0)
                else:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        return self

    # --- forward ------------------------------------------------------------------------------------------------------

    @property
    def sequence_length(self) -> int:
        """Positions that are ever fed: cls, class, and all image tokens but the last."""
        return self.config.tokens + 1

    def window(self, start: int, length: int) -> Window:
        """Causal window over the positions ``start … start + length − 1``."""
        positions = torch.arange(start, start + length, device=self.cls_token.device)
        return Window(positions, (positions + 1).to(torch.int32), start + length)

    def condition(self, classes: Tensor, positions: Tensor) -> Condition:
        """Distinct vectors ``E[class] + timesteps[position]`` for classes ``[B]`` (``config.none_class``: no class)."""
        distinct, index = classes.unique(return_inverse=True)
        values = self.embeddings(self._class_ids(distinct))[:, None] + self.timesteps_embeddings[0, positions]
        rows = index[:, None] * len(positions) + torch.arange(len(positions), device=positions.device)
        return Condition(values.flatten(0, 1), rows.flatten().to(torch.int32), positions.repeat(len(distinct)))

    def _class_ids(self, classes: Tensor) -> Tensor:
        return classes + (self.config.codebook + 1)

    def _check_classes(self, classes: Tensor) -> None:
        limit = self.config.none_class
        if classes.numel() and (int(classes.min()) < 0 or int(classes.max()) > limit):
            bad = classes[(classes < 0) | (classes > limit)][0].item()
            raise ValueError(
                f"class {bad} is out of range: this model has classes 0 … {limit - 1} ({limit} = unconditional)"
            )

    def embed(self, classes: Tensor, tokens: Tensor, positions: Tensor, orders: Tensor | None = None) -> Tensor:
        """Input embeddings ``[B, P, D]`` of ``positions``.

        ``tokens`` ``[B, n]`` are all image tokens known so far, in sequence order. The target-aware part of a slot is
        the position embedding of the token that the slot predicts; slot 0 predicts none. ``orders`` ``[B, tokens]``
        gives the raster index of the token at each sequence slot; None means raster order.
        """
        batch = len(classes)
        ids = torch.cat([self._class_ids(classes)[:, None], tokens], 1)  # slots 1 …
        first = int(positions[0])
        stop = first + len(positions)
        x = self.embeddings(ids[:, max(first - 1, 0) : stop - 1])
        if first == 0:
            x = torch.cat([self.cls_token.expand(batch, 1, -1), x], 1)
        if orders is None:
            place = positions.expand(batch, -1)
            target = (positions + 1).expand(batch, -1)
        else:
            prefix = torch.arange(PREFIX, device=orders.device).expand(batch, -1)
            slots = torch.cat([prefix, orders + PREFIX], 1)
            place, target = slots[:, first:stop], slots[:, first + 1 : stop + 1]
        aware = self.target_aware_pos_embed[0, target] * (positions > 0)[:, None]
        return x + self.pos_embed[0, place] + aware

    def head(self, x: Tensor, condition: Condition, positions: Tensor) -> Tensor:
        """Logits ``[B, P, codebook]`` of the residual stream x ``[B, P, D]``."""
        if self.fused_head is not None:
            return self.fused_head(x, condition, positions)
        return self.lm_head(self.adaln_before_head(x, condition), positions)

    def forward(self, tokens: Tensor, classes: Tensor, orders: Tensor | None = None) -> Tensor:
        """Teacher-forced full causal pass.

        Args:
            tokens: int64 ``[B, n]``, n ≤ grid²; with n = grid² the last token is not fed. In sequence order if
                ``orders`` is given.
            classes: int64 ``[B]``; ``config.none_class`` selects the unconditional branch.
            orders: int64 ``[B, grid²]``, raster index of the token at each sequence slot; None means raster order.

        Returns:
            float ``[B, min(n + 1, grid²), codebook]``: row i holds the logits of image token i.

        Raises:
            ValueError: a class out of range, a token out of range, or more tokens than the position tables hold.
        """
        self._check_classes(classes)
        if tokens.shape[1] > self.config.tokens:
            raise ValueError(
                f"{tokens.shape[1]} tokens per sequence, but this model's tables hold {self.config.tokens} "
                f"({self.config.grid}×{self.config.grid}); pass at most that many"
            )
        if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= self.config.codebook):
            bad = tokens[(tokens < 0) | (tokens >= self.config.codebook)][0].item()
            raise ValueError(
                f"image token {bad} is out of range: the codebook has entries 0 … {self.config.codebook - 1}"
            )
        tokens = tokens[:, : self.config.tokens - 1]
        window = self.window(0, tokens.shape[1] + PREFIX)
        return self.step(classes, tokens, window, None, orders)[:, 1:]

    def step(
        self, classes: Tensor, tokens: Tensor, window: Window, caches: list[Any] | None, orders: Tensor | None = None
    ) -> Tensor:
        """One pass over the positions of ``window``; logits ``[B, P, codebook]`` for every one of them.

        With ``caches`` (from :meth:`new_caches`) earlier positions are read from there and the new ones appended.
        """
        x = self.embed(classes, tokens, window.positions, orders)
        condition = self.condition(classes, window.positions)
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x = block(x, condition, window, cache)
        return self.head(x, condition, window.positions)

    def new_caches(self, batch: int) -> list[Any]:
        """One empty cache per block (its own kind of cache), for ``batch`` sequences."""
        blocks: list[Any] = list(self.blocks)
        return [block.new_cache(batch, self.sequence_length) for block in blocks]

    # --- sampling -----------------------------------------------------------------------------------------------------

    def guidance_weight(self, step: int, guidance: float | None = None, power: float | None = None) -> float:
        """``w = (g − 1)·½(1 − cos(π (step/steps)^pow)) + 1`` (method.md §2.1)."""
        g = self.config.guidance if guidance is None else guidance
        p = self.config.power if power is None else power
        return (g - 1.0) * 0.5 * (1.0 - math.cos(math.pi * (step / self.config.tokens) ** p)) + 1.0

    def guided(self, cond: Tensor, uncond: Tensor, step: int) -> Tensor:
        """Guided logits of one step, divided by the temperature: ``(u + w (c − u)) / temperature``."""
        return (uncond + self.guidance_weight(step) * (cond - uncond)) / self.config.temperature

    @torch.inference_mode()
    def generate(
        self,
        classes: Tensor,
        seed: int = 0,
        *,
        cached: bool = True,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Sample image tokens under classifier-free guidance.

        Args:
            classes: int64 ``[B]``, 0 … classes − 1.
            seed: seeds the uniform numbers from which tokens are drawn by inversion of the cumulative distribution; two
                models given the same seed consume the same random numbers.
            cached: decode with a KV cache (one new position per step) or recompute the whole prefix at every step.
            progress: called with the step index after every step.

        Returns:
            int64 ``[B, grid²]`` tokens in raster order.
        """
        if classes.ndim != 1 or len(classes) == 0:
            raise ValueError(f"classes must be a non-empty 1-D tensor, got shape {tuple(classes.shape)}")
        self._check_classes(classes)
        if bool((classes == self.config.none_class).any()):
            raise ValueError(
                f"class {self.config.none_class} means unconditional and cannot be asked for; "
                f"use 0 … {self.config.classes - 1}"
            )
        device = self.cls_token.device
        classes = classes.to(device)
        batch = len(classes)
        sampler = GuidedSampler(batch, self.config.codebook, self.config.tokens, seed, device)
        both = torch.cat([classes, torch.full_like(classes, self.config.none_class)])
        caches = self.new_caches(2 * batch) if cached else None
        decoder = None if caches is None else self._decoder(both, caches)
        tokens = classes.new_empty(batch, self.config.tokens)
        drawn = tokens[:, 0]
        for step in range(self.config.tokens):
            start = step + 1 if cached and step else 0
            if decoder is not None and step:
                # One position, in buffers of the decoder; the same numbers as below.
                self._embed_token(decoder.x, drawn, start)
                logits = decoder.step(start)
            else:
                window = self.window(start, step + PREFIX - start)
                logits = self.step(both, tokens[:, :step].repeat(2, 1), window, caches)[:, -1].float()
            drawn = sampler.draw(logits, step, self.guidance_weight(step), self.config.temperature)
            tokens[:, step] = drawn
            if progress is not None:
                progress(step)
        return tokens

    def _decoder(self, classes: Tensor, caches: list[Any]) -> Decoder | None:
        """A decoder for rows of these classes, if the model is prepared for one; else steps go block by block."""
        blocks: list[Any] = list(self.blocks)
        head: Any = self.fused_head
        if self.cls_token.dtype != torch.float32 or not can_decode(blocks, head):
            return None
        distinct, index = classes.unique(return_inverse=True)
        classes_embedded = self.embeddings(self._class_ids(distinct))[:, None]

        def conditions(out: Tensor, first: int) -> None:
            torch.add(classes_embedded, self.timesteps_embeddings[0, first : first + out.shape[1]], out=out)

        return Decoder(blocks, head, caches, self.config.dim, index, self.sequence_length, conditions)

    def _embed_token(self, out: Tensor, tokens: Tensor, position: int) -> None:
        """:meth:`embed` of one position in raster order: the same token for both branches, out ``[2 B, D]``."""
        half = out[: len(tokens)]
        torch.index_select(self.embeddings.weight, 0, tokens, out=half)
        half.add_(self.pos_embed[0, position]).add_(self.target_aware_pos_embed[0, position + 1])
        out[len(tokens) :] = half

    # --- protocol for calibration -------------------------------------------------------------------------------------

    @property
    def conditioning(self) -> Conditioning:
        return Conditioning(classes=self.config.classes, unconditional=self.config.none_class)

    @property
    def sinks(self) -> tuple[int, ...]:
        """Positions that carry the condition: cls and class token."""
        return tuple(range(PREFIX))

    def linear_specs(self) -> dict[str, LinearSpec]:
        """Role and position groups of every quantized linear (granularity of method.md §1.6)."""
        length = self.sequence_length
        rest = (0, 1) + (PREFIX,) * (length - PREFIX)
        every = tuple(range(length))
        specs: dict[str, LinearSpec] = {}
        for spec in self.block_specs():
            assert spec.modulation is not None
            specs[spec.modulation.linear] = LinearSpec("adaln", every, activation="silu")
            for role, path in (("qkv", spec.qkv), ("proj", spec.proj), ("fc1", spec.fc1), ("fc2", spec.fc2)):
                specs[path] = LinearSpec(role, rest)
        head = self.head_spec()
        assert head.modulation is not None
        specs[head.modulation.linear] = LinearSpec("adaln", every, activation="silu")
        specs[head.linear] = LinearSpec("head", (0,) * length)
        return specs

    def fold_pairs(self) -> list[FoldPair]:
        pairs = []
        for spec in self.block_specs():
            pairs.append(FoldPair(spec.norm1, spec.modulation1, (spec.qkv,), "qkv"))
            pairs.append(FoldPair(spec.norm2, spec.modulation2, (spec.fc1,), "fc1"))
        head = self.head_spec()
        pairs.append(FoldPair(head.norm, head.modulation, (head.linear,), "head"))
        return pairs

    def block_specs(self) -> list[BlockSpec]:
        return list(self._block_specs())

    def _block_specs(self) -> Iterator[BlockSpec]:
        head_dim = self.config.dim // self.config.heads
        for i in range(self.config.depth):
            path = f"blocks.{i}"
            linear = f"{path}.adaLN_modulation.1"
            yield BlockSpec(
                path=path,
                norm1=f"{path}.norm1",
                norm2=f"{path}.norm2",
                modulation1=Modulation(linear, chunks=6, shift=0, scale=1, gate=2),
                modulation2=Modulation(linear, chunks=6, shift=3, scale=4, gate=5),
                qkv=f"{path}.attn.qkv",
                proj=f"{path}.attn.proj",
                fc1=f"{path}.mlp.fc1",
                fc2=f"{path}.mlp.fc2",
                activation="gelu_erf",
                attention=AttentionSpec(
                    path=f"{path}.attn",
                    heads=self.config.heads,
                    head_dim=head_dim,
                    qk_kind="layer_norm",
                    softmax_scale=head_dim**-0.5,
                    q_norm=f"{path}.attn.q_norm",
                    k_norm=f"{path}.attn.k_norm",
                ),
            )

    def head_spec(self) -> HeadSpec:
        linear = "adaln_before_head.adaLN_modulation.1"
        return HeadSpec(
            path="adaln_before_head",
            norm="adaln_before_head.norm",
            modulation=Modulation(linear, chunks=2, shift=1, scale=0),
            linear="lm_head",
        )

    def replace_head(self, head: nn.Module) -> None:
        """Put one module, called with (x, condition, positions), in place of the last norm and the head's linear."""
        del self.adaln_before_head, self.lm_head
        self.fused_head = head

    def sample_calibration(
        self, classes: Tensor, seed: int, progress: Callable[[int], None] | None = None
    ) -> CalibrationSet:
        """The model's own guided samples, of both branches: rows 0 … B−1 conditional, B … 2B−1 unconditional.

        Drawn ``SAMPLE_CHUNK`` at a time (chunk i from seed + i), which bounds the memory of the caches.
        """
        parts = classes.split(SAMPLE_CHUNK)
        drawn = []
        for i, part in enumerate(parts):

            def report(step: int, i: int = i) -> None:
                if progress is not None:
                    progress((i * self.config.tokens + step) // len(parts))

            drawn.append(self.generate(part, seed + i, progress=report))
        return self.calibration_set(torch.cat(drawn), classes)

    def calibration_set(self, tokens: Tensor, classes: Tensor) -> CalibrationSet:
        """Sequences to calibrate on, of both branches, from tokens ``[B, grid²]`` and classes ``[B]``.

        Use it to calibrate on recorded samples or on tokenized real pictures.
        """
        none = torch.full_like(classes, self.config.none_class)
        return CalibrationSet(
            inputs={"tokens": tokens.repeat(2, 1), "classes": torch.cat([classes, none])},
            conditional=torch.arange(2 * len(classes)) < len(classes),
        )

    def calibration_forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Full causal pass over recorded sequences: logits ``[n, grid², codebook]``."""
        return self(inputs["tokens"], inputs["classes"])

    def config_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self.config)
