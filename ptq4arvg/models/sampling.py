"""Drawing tokens from guided logits, in buffers made once."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["GuidedSampler"]


class GuidedSampler:
    """Classifier-free guidance and sampling by inversion of the cumulative distribution.

    ``logits = (u + w (c - u)) / temperature``, softmax and cumulative sum in float64; the token is the first whose
    cumulative probability exceeds a uniform number. After construction nothing is allocated.

    Args:
        batch, codes: B and V.
        steps: how many tokens will be drawn.
        seed: of the uniform numbers: two samplers with one seed consume the same.
        device: of the logits.
    """

    def __init__(self, batch: int, codes: int, steps: int, seed: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._uniform = torch.rand(steps, batch, generator=generator, dtype=torch.float64).to(device)
        self._batch, self._last = batch, codes - 1
        # Python numbers become tensors, allocated for every operation; these are filled instead.
        self._weight = torch.ones((), device=device)
        self._temperature = torch.ones((), device=device)
        self._guided = torch.empty(batch, codes, device=device)
        self._logits = torch.empty(batch, codes, dtype=torch.float64, device=device)
        self._probabilities = torch.empty_like(self._logits)
        self._cumulative = torch.empty_like(self._logits)
        self._tokens = torch.empty(batch, 1, dtype=torch.int64, device=device)

    def draw(self, logits: Tensor, step: int, weight: float, temperature: float) -> Tensor:
        """Tokens int64 ``[B]`` (a buffer, reused) from logits float32 ``[2 B, V]``: conditional rows first."""
        conditional, unconditional = logits[: self._batch], logits[self._batch :]
        guided = torch.sub(conditional, unconditional, out=self._guided)
        guided.mul_(self._weight.fill_(weight)).add_(unconditional).div_(self._temperature.fill_(temperature))
        self._logits.copy_(guided)
        torch.ops.aten._softmax.out(self._logits, -1, False, out=self._probabilities)
        torch.cumsum(self._probabilities, -1, out=self._cumulative)
        torch.searchsorted(self._cumulative, self._uniform[step][:, None], right=True, out=self._tokens)
        return self._tokens.clamp_max_(self._last)[:, 0]
