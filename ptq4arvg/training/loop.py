"""The little that every training script shares: arguments, seeds, resumable checkpoints, a learning-rate schedule."""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["Run", "arguments", "cosine"]


def arguments(description: str, steps: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--out", type=Path, default=Path("out/training"), help="folder of checkpoints (resumed from if present)"
    )
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    return args


def cosine(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up to ``peak``, then a cosine to 2 % of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    t = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * t)))


class Run:
    """Checkpoints of one training: model, optimizer and extra state, replaced atomically."""

    def __init__(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, every: int = 200) -> None:
        self.path, self.model, self.optimizer, self.every = path, model, optimizer, every
        self.started = time.monotonic()
        self.spent = 0.0
        self.extra: dict[str, Any] = {}
        self.step = 0
        if path.exists():
            state = torch.load(path, weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["rng"])
            self.step, self.spent, self.extra = state["step"], state["spent"], state["extra"]
            print(f"resumed {path} at step {self.step}")

    def learning_rate(self, value: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = value

    def done(self, loss: float, note: str = "", last: bool = False) -> None:
        """Count one step; now and then print and save."""
        self.step += 1
        if self.step % 50 == 0 or last:
            seconds = self.spent + time.monotonic() - self.started
            print(f"step {self.step} loss {loss:.4f} {note} {seconds:.0f} s", flush=True)
        if self.step % self.every == 0 or last:
            state = {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "rng": torch.get_rng_state(),
                "step": self.step,
                "spent": self.spent + time.monotonic() - self.started,
                "extra": self.extra,
            }
            temporary = self.path.with_suffix(".tmp")
            torch.save(state, temporary)
            os.replace(temporary, self.path)
