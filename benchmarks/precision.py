"""How far plain half-precision inference of the bundled model is from fp32, as a yardstick for the quantized rows.

    python -m benchmarks.precision

Prints SQNR, KL and top-1 agreement of torch's autocast in bfloat16 and float16 on the held-out samples of the accuracy
benchmark, and how close the two best guided logits are: top-1 agreement is lost where that margin is below the error.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptq4arvg.evaluation import Settings
from ptq4arvg.metrics import evaluate_teacher_forced
from ptq4arvg.models.bundled import load_bundled
from ptq4arvg.models.rar import RAR

HELD_OUT = 256
FRACTIONS = (0.01, 0.03, 0.05, 0.1, 0.5)


class Autocast(nn.Module):
    """A model whose forward runs under CPU autocast."""

    def __init__(self, model: RAR, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, tokens: Tensor, classes: Tensor) -> Tensor:
        with torch.autocast("cpu", self.dtype):
            return self.model(tokens, classes).float()


@torch.inference_mode()
def margins(model: RAR, tokens: Tensor, classes: Tensor) -> Tensor:
    """Difference of the two largest guided logits at every position, ``[n · T]``."""
    cond = model(tokens, classes)
    uncond = model(tokens, torch.full_like(classes, model.conditioning.unconditional))
    guided = torch.stack([model.guided(cond[:, i], uncond[:, i], i) for i in range(cond.shape[1])], 1)
    best = guided.topk(2, -1).values
    return (best[..., 0] - best[..., 1]).flatten()


def main() -> None:
    model = load_bundled()
    classes = torch.arange(HELD_OUT) % model.conditioning.classes
    tokens = model.generate(classes, Settings().held_out_seed)
    for dtype in (torch.bfloat16, torch.float16):
        found = evaluate_teacher_forced(model, Autocast(model, dtype), tokens, classes)
        print(
            f"{dtype}: SQNR {found.logit_sqnr_db:.1f} dB, KL {found.kl_nats:.5f} nats, top-1 {found.top1_agreement:.1%}"
        )
    margin = margins(model, tokens, classes)
    for fraction in FRACTIONS:
        limit = float(margin.quantile(fraction))
        print(f"margin of the best guided logit is below {limit:.3f} in {fraction:.0%} of positions")


if __name__ == "__main__":
    main()
