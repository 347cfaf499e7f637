"""The half-precision yardstick."""

from __future__ import annotations

import torch

from benchmarks.precision import Autocast, margins
from ptq4arvg.metrics import evaluate_teacher_forced
from tests.tiny import tiny_rar


def test_margins_are_those_of_the_guided_logits() -> None:
    model = tiny_rar(0).eval()
    length, codebook = model.config.tokens, model.config.codebook
    tokens = torch.randint(codebook, (3, length), generator=torch.Generator().manual_seed(0))
    classes = torch.tensor([0, 1, 2])
    found = margins(model, tokens, classes).view(3, length)
    assert bool((found >= 0).all())
    with torch.inference_mode():
        cond, uncond = model(tokens, classes), model(tokens, torch.full_like(classes, model.config.none_class))
        ordered = model.guided(cond[:, 4], uncond[:, 4], 4).sort(-1, descending=True).values
    torch.testing.assert_close(found[:, 4], ordered[:, 0] - ordered[:, 1])


def test_lower_precision_is_further_from_fp32() -> None:
    model = tiny_rar(0).eval()
    tokens = torch.randint(model.config.codebook, (4, model.config.tokens), generator=torch.Generator().manual_seed(1))
    classes = torch.arange(4)
    coarse, fine = (
        evaluate_teacher_forced(model, Autocast(model, dtype), tokens, classes).logit_sqnr_db
        for dtype in (torch.bfloat16, torch.float16)
    )
    assert 25 < coarse < fine
