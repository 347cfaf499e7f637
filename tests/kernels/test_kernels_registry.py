"""Backend selection: preference, reasons, requests, strictness, logging."""

import logging
import threading
from collections.abc import Iterator

import pytest
import torch

import ptq4arvg_kernels as kernels
from ptq4arvg_kernels import registry
from ptq4arvg_kernels.registry import Backend, BackendError, OpSpec
from ptq4arvg_kernels.tables import make_table

SPEC = OpSpec(torch.device("cpu"), torch.float32, rows=4, in_features=8)


class Picky(Backend):
    def unavailable(self) -> str | None:
        return "needs a moon phase" if self.name == "absent" else None

    def declines(self, op: str, spec: OpSpec) -> str | None:
        return "rows must be odd" if spec.rows % 2 == 0 else None


@pytest.fixture(autouse=True)
def isolated() -> Iterator[None]:
    """Three preferred backends: ``absent`` (unavailable), ``picky`` (odd rows only), ``narrow`` (only ``quantize``)."""
    registry.register_backend(Backend("narrow", {"quantize": lambda *a: "narrow"}), 1010)
    registry.register_backend(Picky("picky", {"quantize": lambda *a: "picky", "linear": lambda *a: "picky"}), 1020)
    registry.register_backend(Picky("absent", {"quantize": lambda *a: "absent"}), 1030)
    yield
    for name in ("narrow", "picky", "absent"):
        registry.unregister_backend(name)
    registry.set_strict(False)


def test_order_of_preference() -> None:
    names = [backend.name for backend in registry.backends()]
    assert [name for name in names if name in ("absent", "picky", "narrow")] == ["absent", "picky", "narrow"]
    assert names[-1] == "reference"


def test_first_that_does_not_decline_serves() -> None:
    odd = OpSpec(torch.device("cpu"), torch.float32, rows=3)
    assert registry.select("quantize", odd).name == "picky"
    assert registry.select("quantize", SPEC).name == "narrow"
    with registry.use_backend("reference"):
        assert registry.select("quantize", odd).name == "reference"
    assert registry.select("quantize", odd).name == "picky"


def test_explain_and_doctor_give_every_reason() -> None:
    reasons = registry.explain("linear", SPEC)
    assert reasons["absent"] == "needs a moon phase"
    assert reasons["picky"] == "rows must be odd"
    assert reasons["narrow"] == "does not implement linear"
    assert reasons["reference"] is None
    report = {status.backend: status for status in registry.doctor()}
    assert report["absent"] == ("absent", False, "needs a moon phase")
    assert report["reference"].available
    assert report["picky"].available


def test_nothing_serves_lists_all_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError) as caught:
        registry.select("no_such_operator", SPEC)
    for line in ("absent: needs a moon phase", "picky: does not implement", "reference: does not implement"):
        assert line in str(caught.value)
    monkeypatch.setattr(registry, "_BACKENDS", [])
    with pytest.raises(BackendError, match="no backend is registered"):
        registry.select("quantize", SPEC)


def test_request_that_declines_falls_back_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="ptq4arvg_kernels"), registry.use_backend("picky"):
        assert registry.select("quantize", SPEC).name == "narrow"
        assert registry.select("quantize", SPEC).name == "narrow"
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "using backend narrow" in warnings[0].getMessage()
    assert "picky declined: rows must be odd" in warnings[0].getMessage()


def test_strict_request_raises() -> None:
    with registry.use_backend("picky", strict=True), pytest.raises(BackendError, match="'picky' declines: rows must"):
        registry.select("quantize", SPEC)
    registry.set_strict(True)
    with registry.use_backend("absent"), pytest.raises(BackendError, match="needs a moon phase"):
        registry.select("quantize", SPEC)
    assert registry.select("quantize", SPEC).name == "narrow"  # nothing was requested, so nothing is refused


def test_logged_once_per_operator_backend_and_reason(caplog: pytest.LogCaptureFixture) -> None:
    odd = OpSpec(torch.device("cpu"), torch.float32, rows=5)
    with caplog.at_level(logging.INFO, logger="ptq4arvg_kernels"):
        for _ in range(3):
            registry.select("quantize", odd)
            registry.select("quantize", SPEC)
            registry.select("linear", odd)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(set(messages)) == 3
    assert "linear: using backend picky (absent declined: needs a moon phase)" in messages


def test_unknown_and_duplicate_names() -> None:
    with pytest.raises(ValueError, match="unknown backend 'cude'; registered backends: absent, picky, narrow"):
        registry.use_backend("cude").__enter__()
    with pytest.raises(ValueError, match="already registered"):
        registry.register_backend(Backend("picky", {}), 1)
    with pytest.raises(ValueError, match="unknown backend"):
        registry.unregister_backend("cude")


def test_requests_nest_and_stay_in_their_thread() -> None:
    seen: list[str] = []
    with registry.use_backend("reference"):
        with registry.use_backend("narrow"):
            assert registry.select("quantize", SPEC).name == "narrow"
        assert registry.select("quantize", SPEC).name == "reference"
        thread = threading.Thread(target=lambda: seen.append(registry.select("quantize", SPEC).name))
        thread.start()
        thread.join()
    assert seen == ["narrow"]  # the default choice: the request belongs to the other thread


def test_request_ends_with_an_exception() -> None:
    with pytest.raises(RuntimeError, match="stop"), registry.use_backend("reference"):
        raise RuntimeError("stop")
    assert registry.select("quantize", SPEC).name == "narrow"


def test_operators_go_through_the_registry() -> None:
    taken: list[OpSpec] = []

    class Recorder(Backend):
        def declines(self, op: str, spec: OpSpec) -> str | None:
            taken.append(spec)
            return "only records"

    registry.register_backend(Recorder("recorder", {"adaln_quant": lambda *a: None}), 2000)
    try:
        with registry.use_backend("recorder"):
            table, positions = make_table(1.0, 128, 8, [0]), torch.tensor([0])
            x = torch.ones(3, 5, dtype=torch.bfloat16)
            codes, _ = kernels.adaln_quant(x, "rms", 1e-6, *[None] * 5, 1.0, table, positions)
    finally:
        registry.unregister_backend("recorder")
    assert codes.shape == (3, 5)
    assert taken[0] == OpSpec(torch.device("cpu"), torch.bfloat16, 3, in_features=5, kind="rms")
    assert "reference" in repr(kernels.backends()[-1])


def test_backends_receive_dense_operands() -> None:
    """What a backend may rely on: contiguous operands, conditioning rows of stride 1, caches as they are."""
    received: list[torch.Tensor] = []

    def adaln(*operands: object) -> tuple[torch.Tensor, torch.Tensor]:
        received.extend(operand for operand in operands if isinstance(operand, torch.Tensor))
        return torch.zeros(4, 6, dtype=torch.int8), torch.zeros(4, dtype=torch.int32)

    registry.register_backend(Backend("probe", {"adaln_quant": adaln}), 2000)
    try:
        x, weight = torch.randn(6, 4).t(), torch.randn(12)[::2]
        scale, shift = torch.randn(4, 12)[:, :6], torch.randn(6, 4).t()
        table, positions = make_table(1.0, 128, 8, [0, 0]), torch.tensor([0, 5, 1, 5])[::2]
        kernels.adaln_quant(x, "rms", 1e-6, weight, None, scale, shift, None, 1.0, table, positions)
    finally:
        registry.unregister_backend("probe")
    got_x, got_weight, got_scale, got_shift, _, got_positions = received
    for got, given in ((got_x, x), (got_weight, weight), (got_positions, positions)):
        assert got.is_contiguous()
        assert torch.equal(got, given)
    assert got_scale.data_ptr() == scale.data_ptr()  # a view already: not copied
    assert got_scale.stride() == (12, 1)
    assert got_shift.stride(-1) == 1
    assert torch.equal(got_shift, shift)
