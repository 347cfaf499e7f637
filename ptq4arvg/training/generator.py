"""Train the small RAR generator on the tokens of the training pictures.

As published, the order of the image tokens is random at first and annealed to raster order: a sequence is permuted with
a probability that is 1 for the first half of the training, falls linearly to 0 until three quarters, and stays 0. A
tenth of the labels is dropped for classifier-free guidance. The weights kept are an exponential moving average.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ptq4arvg.models.bundled import FASHION
from ptq4arvg.models.rar import RAR
from ptq4arvg.models.tokenizers.small_vq import SmallVQ
from ptq4arvg.training.data import load
from ptq4arvg.training.loop import Run, arguments, cosine

BATCH = 128
LABEL_DROP = 0.1
EMA = 0.998


def encode_all(tokenizer: SmallVQ, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.cat([tokenizer.encode(x) for x in images.split(1000)]).clone()


def permuted_fraction(step: int, steps: int) -> float:
    return min(1.0, max(0.0, (0.75 - step / steps) / 0.25))


def main() -> None:
    args = arguments(__doc__ or "", steps=6000)
    tokenizer = SmallVQ()
    tokenizer.load_state_dict(torch.load(args.out / "tokenizer.pt", weights_only=True)["model"])
    images, labels = load("train")
    tokens = encode_all(tokenizer.eval(), images)
    model = RAR(FASHION).initialize(torch.Generator().manual_seed(args.seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.96), weight_decay=0.03)
    run = Run(args.out / "generator.pt", model, optimizer)
    ema: dict[str, Tensor] = run.extra.setdefault("ema", {k: v.clone() for k, v in model.state_dict().items()})
    length = FASHION.tokens
    raster = torch.arange(length)
    while run.step < args.steps:
        run.learning_rate(cosine(run.step, args.steps, 1.5e-3))
        rows = torch.randint(len(tokens), (BATCH,))
        shuffled = torch.rand(BATCH, 1) < permuted_fraction(run.step, args.steps)
        orders = torch.where(shuffled, torch.rand(BATCH, length).argsort(1), raster)
        classes = torch.where(torch.rand(BATCH) < LABEL_DROP, FASHION.none_class, labels[rows])
        sequence = tokens[rows].gather(1, orders)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(sequence, classes, orders)
        loss = F.cross_entropy(logits.float().flatten(0, 1), sequence.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for key, value in model.state_dict().items():
                ema[key].lerp_(value, 1 - min(EMA, run.step / (run.step + 10)))
        run.done(float(loss.detach()), last=run.step + 1 == args.steps)


if __name__ == "__main__":
    main()
