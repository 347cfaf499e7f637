"""Package the trained checkpoints: fp16 safetensors and the reference statistics under ``ptq4arvg/assets``.

Everything is measured with the models as they ship, that is with weights that went through fp16.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from ptq4arvg.files import write_json
from ptq4arvg.metrics import Frechet
from ptq4arvg.models.bundled import ASSETS, load_bundled, load_classifier, load_tokenizer
from ptq4arvg.scoring import Scorer
from ptq4arvg.state_dict import write_safetensors_atomic
from ptq4arvg.training.data import load
from ptq4arvg.training.scores import score_generator

LIMIT = 6_000_000
# Not among the seeds that the sampling settings were tuned with.
SEED = 20_000
IMAGES = 2000


def to_half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """fp16 copies of the floating tensors.

    Raises:
        ValueError: a value too large for fp16.
    """
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    for key, value in half.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(f"{key} has values that fp16 cannot hold (largest {float(state[key].abs().max()):.3g})")
    return half


def write_weights(training: Path) -> None:
    for name in ("generator", "tokenizer", "classifier"):
        checkpoint = torch.load(training / f"{name}.pt", weights_only=True)
        # The generator is used with the moving average of its weights.
        state = checkpoint["extra"]["ema"] if name == "generator" else checkpoint["model"]
        write_safetensors_atomic(ASSETS / f"{name}.safetensors", to_half(state))
        print(f"{name}: step {checkpoint['step']}, trained for {checkpoint['spent'] / 60:.0f} minutes")


@torch.inference_mode()
def reconstruct(images: Tensor) -> Tensor:
    tokenizer = load_tokenizer()
    return torch.cat([tokenizer.decode_tokens(tokenizer.encode(part)) for part in images.split(500)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--training", type=Path, default=Path("out/training"), help="folder of the training checkpoints"
    )
    args = parser.parse_args()
    ASSETS.mkdir(exist_ok=True)
    write_weights(args.training)

    images, labels = load("t10k")
    classifier = load_classifier()
    tokenizer = load_tokenizer()
    unset = Frechet(torch.zeros(classifier.feature_dim), torch.eye(classifier.feature_dim))
    seen = Scorer(tokenizer, classifier, unset).observe_images(images, labels)
    statistics = Frechet.of(seen.features)
    write_safetensors_atomic(
        ASSETS / "reference.safetensors", {"mean": statistics.mean, "covariance": statistics.covariance}
    )
    scorer = Scorer(tokenizer, classifier, statistics)
    rebuilt = scorer.observe_images(reconstruct(images), labels)
    accuracy, distance = score_generator(load_bundled(), scorer, IMAGES, SEED)
    figures: dict[str, float | int] = {
        "classifier_test_accuracy": seen.class_accuracy,
        "reconstruction_class_accuracy": rebuilt.class_accuracy,
        "reconstruction_frechet": scorer.frechet(rebuilt),
        "generator_class_accuracy": accuracy,
        "generator_frechet": distance,
        "generator_images": IMAGES,
        "generator_seed": SEED,
    }
    write_json(ASSETS / "reference.json", figures)
    for name, value in figures.items():
        print(f"{name:32} {value:.4f}" if isinstance(value, float) else f"{name:32} {value}")
    sizes = {path.name: path.stat().st_size for path in sorted(ASSETS.iterdir())}
    for name, size in sizes.items():
        print(f"{name:32} {size / 1e6:.3f} MB")
    total = sum(sizes.values())
    print(f"{'total':32} {total / 1e6:.3f} MB")
    if total > LIMIT:
        raise SystemExit(f"the assets take {total} bytes, more than the {LIMIT} they may")


if __name__ == "__main__":
    main()
