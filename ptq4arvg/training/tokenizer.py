"""Train the small VQ tokenizer: reconstruction loss, straight-through codes, an exponential-moving-average codebook."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import convert_conv2d_weight_memory_format

from ptq4arvg.models.tokenizers.small_vq import SmallVQ
from ptq4arvg.training.data import load
from ptq4arvg.training.loop import Run, arguments, cosine

BATCH = 256
DECAY = 0.99
COMMITMENT = 0.25


class MovingCodebook:
    """EMA codebook: every code moves to the mean of its vectors; a code that dies is put on a random vector."""

    def __init__(self, model: SmallVQ, extra: dict[str, Any]) -> None:
        self.model = model
        if "count" not in extra:
            extra["count"] = torch.zeros(model.config.codebook)
            extra["total"] = torch.zeros_like(model.codes)
        self.extra = extra

    @torch.no_grad()
    def update(self, z: Tensor, index: Tensor) -> None:
        count, total = self.extra["count"], self.extra["total"]
        hits = torch.bincount(index, minlength=len(count)).float()
        count.mul_(DECAY).add_(hits, alpha=1 - DECAY)
        total.mul_(DECAY).index_add_(0, index, z, alpha=1 - DECAY)
        dead = count < 0.05
        fresh = z[torch.randint(len(z), (int(dead.sum()),))]
        count[dead], total[dead] = 1.0, fresh
        self.model.codes.copy_(total / count[:, None])


def main() -> None:
    args = arguments(__doc__ or "", steps=1600)
    images, _ = load("train")
    model = SmallVQ()
    convert_conv2d_weight_memory_format(model, torch.channels_last)
    run = Run(args.out / "tokenizer.pt", model, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4))
    codebook = MovingCodebook(model, run.extra)
    if run.step == 0:
        with torch.no_grad():
            z = model.encoder(images[torch.randint(len(images), (BATCH,))]).permute(0, 2, 3, 1).flatten(0, 2)
            model.codes.copy_(z[torch.randperm(len(z))[: model.config.codebook]])
    while run.step < args.steps:
        run.learning_rate(cosine(run.step, args.steps, 1.5e-3))
        x = images[torch.randint(len(images), (BATCH,))].contiguous(memory_format=torch.channels_last)
        z = model.encoder(x)
        flat = z.permute(0, 2, 3, 1).flatten(0, 2)
        with torch.no_grad():
            index = model.nearest(flat)
            code = model.codes[index].view(len(x), 7, 7, -1).permute(0, 3, 1, 2)
        reconstruction = model.decoder(z + (code - z).detach())
        mse, mae = F.mse_loss(reconstruction, x), F.l1_loss(reconstruction, x)
        loss = mse + 0.1 * mae + COMMITMENT * F.mse_loss(z, code)
        run.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        run.optimizer.step()
        if run.step < 0.9 * args.steps:  # the last tenth trains the decoder against codes that stand still
            codebook.update(flat.detach(), index)
        used = int((run.extra["count"] > 0.2).sum())
        run.done(float(loss.detach()), f"mse {float(mse.detach()):.5f} codes {used}", run.step + 1 == args.steps)


if __name__ == "__main__":
    main()
