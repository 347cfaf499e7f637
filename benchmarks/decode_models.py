"""What takes part in a benchmark of whole images: generators of one model in every form, as files and in memory."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ptq4arvg
from ptq4arvg.models.bundled import FASHION, load_bundled
from ptq4arvg.models.rar import RAR, RARConfig
from ptq4arvg.nn import KVCache, Linear, Window
from ptq4arvg.recipes import named_recipe
from ptq4arvg.state_dict import load_strict, read_state_dict, write_safetensors_atomic

from .random_models import random_generator, random_quantized, size

MODELS: tuple[str, ...] = ("rar_b", "rar_l", "bundled")
OURS: tuple[str, ...] = ("w6a6", "w6a8", "w8a8")
PEERS: tuple[str, ...] = ("fp32", "compiled", "dynamic_int8")
CONTENDERS: tuple[str, ...] = ("w6a6", "w8a8", *PEERS)

# Sequences that the bundled model is calibrated on. Decoding takes the same time whatever was done to find the weights:
# what makes them good, and takes long, is left out.
SAMPLES = 8
BRIEF: dict[str, Any] = {"scaled_roles": (), "compensate": False, "dgc": False}
# Up to this depth all blocks are compiled as one graph (20 % faster with 6 blocks). At 24 blocks that takes ten times
# the compile time and no step becomes faster, so one graph serves every block there.
WHOLE_DEPTH = 8
# x86 is torch's default and the fastest of its engines for a few rows; fbgemm equals it within the noise.
ENGINES = ("x86", "fbgemm", "onednn", "qnnpack")


def config_of(model: str) -> RARConfig:
    """The configuration called ``model``.

    Raises:
        ValueError: unknown name.
    """
    if model not in MODELS:
        raise ValueError(f"unknown model {model!r}; known: {', '.join(MODELS)}")
    return FASHION if model == "bundled" else size(model)


def checked(contender: str) -> str:
    """The contender's name.

    Raises:
        ValueError: unknown name.
    """
    if contender not in (*OURS, *PEERS):
        raise ValueError(f"unknown contender {contender!r}; known: {', '.join((*OURS, *PEERS))}")
    return contender


def file_of(folder: Path, model: str, contender: str) -> Path:
    """Where :func:`make_file` puts a contender; all peers start from the same floating-point file."""
    return folder / f"{model}-{contender if contender in OURS else 'fp32'}.safetensors"


def make_file(folder: Path, model: str, contender: str) -> Path:
    """Write the checkpoint of a contender, unless it is there: random weights, or those of the bundled model."""
    path, config = file_of(folder, model, contender), config_of(model)
    if path.exists():
        return path
    if contender in OURS:
        bundled = model == "bundled"
        quantized = (
            ptq4arvg.quantize(load_bundled(), dataclasses.replace(named_recipe(contender), **BRIEF), samples=SAMPLES)
            if bundled
            else random_quantized(config, contender)
        )
        ptq4arvg.save(quantized, path)
    else:
        generator = load_bundled() if model == "bundled" else random_generator(config)
        write_safetensors_atomic(path, generator.state_dict())
    return path


def load(path: Path, model: str, contender: str, mapped: bool = False) -> Any:
    """A contender, ready to generate, from its file.

    Args:
        path, model, contender: as given to and got from :func:`make_file`.
        mapped: floating-point weights stay the file's pages in memory, so that they exist only once; else they are
            copied into memory of their own, as ``RAR.from_published`` does.
    """
    if contender in OURS:
        return ptq4arvg.load(path)
    kind = {"fp32": RAR, "compiled": CompiledRAR, "dynamic_int8": DynamicRAR}[contender]
    with torch.device("meta"):
        generator = kind(config_of(model))
    if mapped:
        generator.load_state_dict(read_state_dict(path), strict=True, assign=True)
    else:
        generator.to_empty(device="cpu")
        load_strict(generator, read_state_dict(path), source=path)
    generator.eval().requires_grad_(False)
    return dynamic_int8(generator) if isinstance(generator, DynamicRAR) else generator


def contenders(folder: Path, model: str, chosen: Sequence[str]) -> dict[str, Any]:
    """All chosen contenders of a model at once; the compiled one shares the weights of fp32."""
    found = {
        name: load(make_file(folder, model, name), model, name)
        for name in chosen
        if name != "compiled" or "fp32" not in chosen
    }
    if "compiled" in chosen and "compiled" not in found:
        found["compiled"] = CompiledRAR.sharing(found["fp32"])
    return {name: found[name] for name in chosen}


class CompiledRAR(RAR):
    """RAR whose steps of one position run compiled from the embedded token to the logits; sampling stays as it is.

    Sizes are dynamic from the start, above all the span that a query sees, so that one graph serves every position.
    """

    def __init__(self, config: RARConfig) -> None:
        super().__init__(config)
        self._whole: Callable[..., Tensor] | None = None
        self._block: Callable[..., Tensor] | None = None
        self._head: Callable[..., Tensor] | None = None

    @classmethod
    def sharing(cls, generator: RAR) -> CompiledRAR:
        """A compiled generator with the parameters of another."""
        with torch.device("meta"):
            made = cls(generator.config)
        made.load_state_dict(generator.state_dict(), strict=True, assign=True)
        return made.eval().requires_grad_(False)

    def _compile(self) -> None:
        def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return torch.compile(function, dynamic=True, fullgraph=True)

        if self.config.depth <= WHOLE_DEPTH:
            self._whole = compiled(self._transformer)
        else:
            self._block = compiled(lambda block, *operands: block(*operands))
            self._head = compiled(self.head)

    def _transformer(self, x: Tensor, condition: Any, window: Window, caches: list[KVCache]) -> Tensor:
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, condition, window, cache)
        return self.head(x, condition, window.positions)

    def step(
        self, classes: Tensor, tokens: Tensor, window: Window, caches: list[Any] | None, orders: Tensor | None = None
    ) -> Tensor:
        if len(window.positions) != 1 or caches is None:
            return super().step(classes, tokens, window, caches, orders)
        if self._whole is None and self._block is None:
            self._compile()
        x = self.embed(classes, tokens, window.positions, orders)
        condition = self.condition(classes, window.positions)
        if self._whole is not None:
            return self._whole(x, condition, window, caches)
        assert self._block is not None
        assert self._head is not None
        for block, cache in zip(self.blocks, caches, strict=True):
            x = self._block(block, x, condition, window, cache)
        return self._head(x, condition, window.positions)


class DynamicRAR(RAR):
    """RAR whose linears :func:`dynamic_int8` replaced; their ``weight`` is a method, which ``new_cache`` cannot ask."""

    def new_caches(self, batch: int) -> list[Any]:
        config, token = self.config, self.cls_token
        shape = (batch, config.heads, self.sequence_length, config.dim // config.heads)
        return [KVCache(*shape, token.dtype, token.device) for _ in self.blocks]


class _DynamicLinear(torch.ao.nn.quantized.dynamic.Linear):
    """torch's dynamically quantized linear with the call of :class:`ptq4arvg.nn.Linear`."""

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        return super().forward(x)

    @classmethod
    def from_float(cls, mod: nn.Linear, use_precomputed_fake_quant: bool = False) -> Any:
        plain = nn.Linear(mod.in_features, mod.out_features, mod.bias is not None, device="meta")
        plain.weight, plain.bias = mod.weight, mod.bias
        plain.qconfig = mod.qconfig
        return super().from_float(plain, use_precomputed_fake_quant)


def dynamic_int8(generator: DynamicRAR) -> DynamicRAR:
    """The generator, in place, with every linear quantized by ``torch.ao.quantization.quantize_dynamic``."""
    supported = torch.backends.quantized.supported_engines
    torch.backends.quantized.engine = next(engine for engine in ENGINES if engine in supported)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated
        torch.ao.quantization.quantize_dynamic(
            generator, {Linear}, mapping={Linear: _DynamicLinear}, dtype=torch.qint8, inplace=True
        )
    left = [name for name, module in generator.named_modules() if isinstance(module, nn.Linear)]
    if left:
        raise RuntimeError(f"{len(left)} linears were not quantized: {', '.join(left[:4])}")
    return generator
