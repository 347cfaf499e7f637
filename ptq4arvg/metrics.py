"""How far a quantized generator is from its floating-point original, and how good its pictures are.

Two kinds of figures. Teacher-forced ones compare the logits of two models on the same token sequences; they are sharp
and cheap. Picture ones compare sets of generated pictures with reference statistics; they are what a user sees, and
noisy, hence the bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptq4arvg.protocol import GeneratorProtocol

__all__ = [
    "Frechet",
    "Interval",
    "TeacherForced",
    "bootstrap",
    "evaluate_teacher_forced",
    "frechet_interval",
    "kl_nats",
    "logit_sqnr_db",
    "mean_interval",
    "top1_agreement",
]


def _centred(logits: Tensor) -> Tensor:
    """float64 logits without their mean over the vocabulary, which the softmax ignores."""
    logits = logits.double()
    return logits - logits.mean(-1, keepdim=True)


def _check_pair(ref: Tensor, test: Tensor) -> None:
    if ref.shape != test.shape:
        raise ValueError(f"logits of different shapes cannot be compared: {tuple(ref.shape)} and {tuple(test.shape)}")
    if ref.numel() == 0:
        raise ValueError(f"no logits to compare: shape {tuple(ref.shape)}")


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def logit_sqnr_db(ref: Tensor, test: Tensor) -> float:
    """Signal to quantization noise of logits ``[..., V]``: ``10·log10(Σ‖l‖² / Σ‖l − l̂‖²)``, both mean-centred per row.

    The centring is over the vocabulary because adding a constant to a row changes no probability. Equal logits give
    ``inf``.
    """
    _check_pair(ref, test)
    clean = _centred(ref)
    return _decibels(float(clean.square().sum()), float((clean - _centred(test)).square().sum()))


def kl_nats(ref: Tensor, test: Tensor) -> float:
    """Mean over rows of KL(softmax(ref) ‖ softmax(test)) in nats, of logits ``[..., V]``."""
    _check_pair(ref, test)
    p, q = ref.double().log_softmax(-1), test.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def top1_agreement(ref: Tensor, test: Tensor) -> float:
    """Fraction of rows of logits ``[..., V]`` whose largest entry is at the same place."""
    _check_pair(ref, test)
    return float((ref.argmax(-1) == test.argmax(-1)).double().mean())


@dataclass(frozen=True)
class TeacherForced:
    """Figures of a model against its original: SQNR of both guidance branches, KL and top-1 of the guided logits."""

    logit_sqnr_db: float
    kl_nats: float
    top1_agreement: float


@torch.inference_mode()
def evaluate_teacher_forced(
    fp_model: nn.Module,
    model: nn.Module,
    tokens: Tensor,
    classes: Tensor,
    batch: int = 32,
    progress: Callable[[float], None] | None = None,
) -> TeacherForced:
    """Compare ``model`` with ``fp_model`` on held-out sequences.

    Both models speak the generator protocol and are called as ``model(tokens, classes)``. The logits of the conditional
    and of the unconditional branch are computed for every sequence; SQNR pools both, KL and top-1 agreement look at the
    guided logits of every position, combined with the guidance weight of the step that samples it.

    Args:
        tokens: int64 ``[n, T]`` in sequence order, best sampled by ``fp_model`` with a seed that calibration did not
            use.
        classes: int64 ``[n]``.
        batch: sequences per forward pass.
        progress: called with the finished fraction.

    Raises:
        ValueError: no sequences, or numbers of tokens and classes that differ.
    """
    assert isinstance(fp_model, GeneratorProtocol)
    if len(tokens) == 0:
        raise ValueError("no held-out sequences to evaluate on; pass at least one")
    if len(tokens) != len(classes):
        raise ValueError(f"{len(tokens)} token sequences but {len(classes)} classes")
    signal = noise = kl = agreement = 0.0
    for start in range(0, len(tokens), batch):
        part, wanted = tokens[start : start + batch], classes[start : start + batch]
        none = torch.full_like(wanted, fp_model.conditioning.unconditional)
        branches = []
        for branch in (wanted, none):
            ref, test = fp_model(part, branch), model(part, branch)
            clean = _centred(ref)
            signal += float(clean.square().sum())
            noise += float((clean - _centred(test)).square().sum())
            branches.append((ref.double(), test.double()))
        (ref_c, test_c), (ref_u, test_u) = branches
        for step in range(ref_c.shape[1]):
            ref = fp_model.guided(ref_c[:, step], ref_u[:, step], step)
            test = fp_model.guided(test_c[:, step], test_u[:, step], step)
            share = len(part) / (len(tokens) * ref_c.shape[1])
            kl += kl_nats(ref, test) * share
            agreement += top1_agreement(ref, test) * share
        if progress is not None:
            progress(min(1.0, (start + batch) / len(tokens)))
    return TeacherForced(_decibels(signal, noise), kl, agreement)


@dataclass(frozen=True)
class Frechet:
    """Mean ``[F]`` and covariance ``[F, F]`` (float64) of feature vectors: all that a Fréchet distance needs."""

    mean: Tensor
    covariance: Tensor

    @staticmethod
    def of(features: Tensor) -> Frechet:
        """Statistics of features ``[n, F]``.

        Raises:
            ValueError: fewer than two rows, or values that are not finite.
        """
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"features must be [n ≥ 2, F], got shape {tuple(features.shape)}")
        features = features.double()
        if not bool(features.isfinite().all()):
            raise ValueError(
                f"{int((~features.isfinite()).sum())} of {features.numel()} feature values are NaN or infinite"
            )
        mean = features.mean(0)
        centred = features - mean
        return Frechet(mean, centred.T @ centred / (len(features) - 1))

    def distance(self, other: Frechet) -> float:
        """Squared Fréchet distance ``‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁^½ Σ₂ Σ₁^½)^½)``, never negative.

        Symmetric eigendecompositions with eigenvalues clipped at 0: unlike a general matrix square root this needs no
            jitter when a
        covariance is singular (dead features) and cannot return complex numbers.
        """
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"statistics of {len(self.mean)} and of {len(other.mean)} features cannot be compared")
        values, vectors = torch.linalg.eigh(self.covariance)
        root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
        cross = torch.linalg.eigvalsh(root @ other.covariance @ root).clamp_min(0).sqrt().sum()
        spread = self.covariance.trace() + other.covariance.trace() - 2 * cross
        return max(0.0, float((self.mean - other.mean).square().sum() + spread))


@dataclass(frozen=True)
class Interval:
    """A figure and the bounds of its confidence interval."""

    value: float
    low: float
    high: float


def bootstrap(
    statistic: Callable[[Tensor], float], rows: int, replicas: int = 1000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of a statistic of ``rows`` exchangeable observations.

    Args:
        statistic: maps int64 row indices ``[rows]`` (drawn with replacement) to the figure.
        replicas: number of resamples.
        level: coverage.
        seed: seeds the resampling.

    The replicas are moved by the difference between the statistic and their mean. For a mean this changes nothing to
    speak of; a Fréchet distance of n samples, however, exceeds that of infinitely many by about c/n, and resampling
    adds c/n once more: without the correction the interval could lie wholly above the figure it belongs to.
    """
    if rows < 2 or replicas < 2:
        raise ValueError(f"a bootstrap needs at least 2 rows and 2 replicas, got {rows} and {replicas}")
    if not 0 < level < 1:
        raise ValueError(f"the confidence level must lie between 0 and 1, got {level}")
    generator = torch.Generator().manual_seed(seed)
    value = statistic(torch.arange(rows))
    draws = torch.tensor(
        [statistic(torch.randint(rows, (rows,), generator=generator)) for _ in range(replicas)], dtype=torch.float64
    )
    draws += value - draws.mean()
    tail = (1 - level) / 2
    low, high = torch.quantile(draws, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(value, low, high)


def mean_interval(values: Tensor, replicas: int = 1000, level: float = 0.95, seed: int = 0) -> Interval:
    """Bootstrap interval of the mean of values ``[n]``."""
    values = values.double()
    return bootstrap(lambda rows: float(values[rows].mean()), len(values), replicas, level, seed)


def frechet_interval(
    features: Tensor, reference: Frechet, replicas: int = 1000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Bootstrap interval of the Fréchet distance of features ``[n, F]`` to fixed reference statistics."""
    features = features.double()
    found = bootstrap(lambda rows: reference.distance(Frechet.of(features[rows])), len(features), replicas, level, seed)
    return Interval(found.value, max(0.0, found.low), found.high)
