"""After the first step decoding allocates nothing: neither in the blocks, nor in the head, nor in sampling."""

from __future__ import annotations

import pytest
import torch

from benchmarks.decode_alloc import allocations
from ptq4arvg.models.rar import RAR
from ptq4arvg.pipeline import quantize
from ptq4arvg_kernels.backends.cpu import native
from tests.tiny import tiny_calibration, tiny_rar

pytestmark = pytest.mark.skipif(native.WHY_NOT is not None, reason=str(native.WHY_NOT))


@pytest.fixture(scope="module", params=["w8a8", "w6a6"])
def model(request: pytest.FixtureRequest) -> RAR:
    original = tiny_rar(3, grid=8)  # 64 steps: several chunks of modulation
    return quantize(original, request.param, tiny_calibration(original, 4), samples=4)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_steps_allocate_nothing(model: RAR, batch: int) -> None:
    found = allocations(model, batch, steps=30)
    assert found == {"batch": batch, "steps": 30, "allocations_per_step": 0, "net_bytes_per_step": 0}


def test_the_profiler_sees_allocations_elsewhere() -> None:
    found = allocations(tiny_rar(3), 1)
    assert found["allocations_per_step"] > 10


def test_making_a_decoder_allocates_for_the_whole_image(model: RAR) -> None:
    """What steps do not allocate was allocated before: buffers are reused from step to step."""
    classes = torch.tensor([1, 2, model.config.none_class, model.config.none_class])
    decoder = model._decoder(classes, model.new_caches(4))
    assert decoder is not None
    decoder.x.fill_(0.5)
    first = decoder.step(2)
    decoder.x.fill_(0.5)
    assert decoder.step(3).data_ptr() == first.data_ptr() == decoder.logits.data_ptr()
