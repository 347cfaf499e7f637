"""Train the scoring classifier (shifts and flips as augmentation) and print its accuracy on the test set."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import convert_conv2d_weight_memory_format

from ptq4arvg.models.classifier import Classifier
from ptq4arvg.training.data import load
from ptq4arvg.training.loop import Run, arguments, cosine

BATCH = 256


def augment(x: Tensor) -> Tensor:
    """A random mirror per picture and one random shift of up to two pixels per batch."""
    x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)
    dy, dx = torch.randint(-2, 3, (2,)).tolist()
    return torch.roll(x, (dy, dx), (2, 3))


def main() -> None:
    args = arguments(__doc__ or "", steps=2000)
    images, labels = load("train")
    model = Classifier()
    convert_conv2d_weight_memory_format(model, torch.channels_last)
    run = Run(args.out / "classifier.pt", model, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.02))
    while run.step < args.steps:
        run.learning_rate(cosine(run.step, args.steps, 4e-3))
        rows = torch.randint(len(images), (BATCH,))
        x = augment(images[rows]).contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(model(x), labels[rows], label_smoothing=0.05)
        run.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        run.optimizer.step()
        run.done(float(loss.detach()), last=run.step + 1 == args.steps)
    model.eval()
    images, labels = load("t10k")
    with torch.inference_mode():
        correct = sum(
            int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(1000), labels.split(1000), strict=True)
        )
    print(f"test accuracy {correct / len(labels):.4f}")


if __name__ == "__main__":
    main()
