"""Backends in order of preference, and the choice among them.

A backend declines an operator with a reason a person can act on; the next one is tried, and when none is left the error
lists every reason. All backends compute the same arithmetic, so falling back changes speed, never precision. Nothing
here is called from traced code: operators are opaque to ``torch.compile`` and select at run time.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

LOGGER = logging.getLogger("ptq4arvg_kernels")


@dataclass(frozen=True)
class OpSpec:
    """What a backend may base its decision on: metadata of one call, never tensor data. Unused fields keep defaults.

    Attributes:
        device: device of all operands.
        dtype: floating dtype of the operand read (x, qkv, q, residual) or written (``out_dtype`` of ``linear``);
            int8 for ``linear_quant`` and ``linear_swiglu_quant``, which touch no floating activation.
        rows: M.
        in_features: K, or D of ``adaln_quant``.
        out_features: N (rows of the weight).
        w_bits: 6 or 8 for the linear family.
        kind: activation, ``norm_kind`` or ``qk_kind``.
        head_dim, num_heads: d and H.
        capacity: S, slots of the cache.
    """

    device: torch.device
    dtype: torch.dtype
    rows: int
    in_features: int = 0
    out_features: int = 0
    w_bits: int = 0
    kind: str = "none"
    head_dim: int = 0
    num_heads: int = 0
    capacity: int = 0


class Backend:
    """A set of operator implementations. Subclass to state when it is unavailable or declines.

    An implementation receives the operator's arguments in schema order, already checked (metadata) and dense: every
    tensor is contiguous except ``mod_scale``, ``mod_shift`` and ``gate`` (last stride 1) and the caches (strides of the
    first two dimensions free), which it must write in place. It owns all data-dependent checks.
    """

    def __init__(self, name: str, implementations: Mapping[str, Callable[..., Any]]) -> None:
        self.name = name
        self.implementations = dict(implementations)

    def unavailable(self) -> str | None:
        """Reason why this backend cannot run at all on this machine, or None. Cheap and constant per process."""
        return None

    def declines(self, op: str, spec: OpSpec) -> str | None:
        """Reason why this available backend does not serve this call of an operator it implements, or None.

        Reasons are logged once each, so they should not carry numbers that change from token to token.
        """
        return None

    def details(self) -> str:
        """What to say of this backend where it is available."""
        return "available"

    def why_not(self, op: str, spec: OpSpec) -> str | None:
        """None if this backend serves the call, else a readable reason."""
        reason = self.unavailable()
        if reason is not None:
            return reason
        if op not in self.implementations:
            return f"does not implement {op}"
        return self.declines(op, spec)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"


class BackendError(RuntimeError):
    """No backend serves an operator, or the requested one declined under ``strict``; the message lists the reasons."""


class BackendStatus(NamedTuple):
    """One line of :func:`doctor`."""

    backend: str
    available: bool
    reason: str


class _Request(NamedTuple):
    name: str
    strict: bool


_BACKENDS: list[tuple[int, Backend]] = []
_LOGGED: set[tuple[str, str, str]] = set()
_changes = 0  # of the list of backends
_REQUEST: contextvars.ContextVar[_Request | None] = contextvars.ContextVar("ptq4arvg_backend", default=None)
_strict = False


def register_backend(backend: Backend, priority: int) -> None:
    """Add a backend; the one with the highest priority is tried first (the reference has 0).

    Raises:
        ValueError: a backend of that name is registered.
    """
    if any(known.name == backend.name for _, known in _BACKENDS):
        raise ValueError(f"backend {backend.name!r} is already registered; call unregister_backend first to replace it")
    global _changes
    _changes += 1
    _BACKENDS.append((priority, backend))
    # The sort is stable: among equals the earlier registration is preferred.
    _BACKENDS.sort(key=lambda entry: -entry[0])


def unregister_backend(name: str) -> None:
    """Remove a backend, and forget what was logged about it.

    Raises:
        ValueError: unknown name.
    """
    global _changes
    _changes += 1
    backend = _find(name)
    _BACKENDS[:] = [entry for entry in _BACKENDS if entry[1] is not backend]
    _LOGGED.difference_update({key for key in _LOGGED if key[1] == name})


def backends() -> list[Backend]:
    """All registered backends, most preferred first, available or not."""
    return [backend for _, backend in _BACKENDS]


def _find(name: str) -> Backend:
    for _, backend in _BACKENDS:
        if backend.name == name:
            return backend
    known = ", ".join(backend.name for _, backend in _BACKENDS) or "none"
    raise ValueError(f"unknown backend {name!r}; registered backends: {known}")


def set_strict(enabled: bool) -> None:
    """Process-wide default: when True, a backend requested by :func:`use_backend` that declines is an error."""
    global _strict
    _strict = bool(enabled)


@contextlib.contextmanager
def use_backend(name: str, strict: bool = False) -> Iterator[None]:
    """Request a backend for the calls inside the block (this thread or task only; blocks nest, the innermost wins).

    When it declines a call, the next backend in order of preference serves it and a warning is logged once; with
    ``strict=True`` (or :func:`set_strict`) :class:`BackendError` is raised instead.

    Raises:
        ValueError: unknown name.
    """
    _find(name)
    token = _REQUEST.set(_Request(name, strict))
    try:
        yield
    finally:
        _REQUEST.reset(token)


def explain(op: str, spec: OpSpec) -> dict[str, str | None]:
    """Reason of every backend for declining the call, in order of preference; None for those that would serve it."""
    return {backend.name: backend.why_not(op, spec) for _, backend in _BACKENDS}


def doctor() -> list[BackendStatus]:
    """Availability of every backend on this machine, in order of preference."""
    report = []
    for _, backend in _BACKENDS:
        reason = backend.unavailable()
        report.append(BackendStatus(backend.name, reason is None, backend.details() if reason is None else reason))
    return report


def serving(op: str, spec: OpSpec) -> Backend | None:
    """The backend that serves a call if it is the one the operators would use, else None; never raises.

    For plans (``"layer"``, ``"block"``), which bundle several operators: only the requested backend, or without a
    request the most preferred one that serves the device, may offer one. Callers without a plan use the operators,
    which enforce ``strict``.
    """
    request = _REQUEST.get()
    candidates = backends() if request is None else [_find(request.name)]
    for backend in candidates:
        if backend.why_not("linear", spec) is not None:
            continue
        reason = backend.why_not(op, spec)
        if reason is None:
            return backend
        _log_once(logging.INFO, op, backend.name, f"one operator at a time: {reason}")
        return None
    return None


class Served:
    """:func:`serving` for one operator of one layer, remembered: asking again costs a fraction of a microsecond.

    Args:
        op: name of the plan.
        spec: what is asked for a dtype.
    """

    def __init__(self, op: str, spec: Callable[[torch.dtype], OpSpec]) -> None:
        self._op, self._spec = op, spec
        self._answers: dict[tuple[torch.dtype, _Request | None, int], Backend | None] = {}

    def __call__(self, dtype: torch.dtype) -> Backend | None:
        key = (dtype, _REQUEST.get(), _changes)
        if key not in self._answers:
            self._answers = {key: serving(self._op, self._spec(dtype))}
        return self._answers[key]


def _log_once(level: int, op: str, backend: str, reason: str) -> None:
    key = (op, backend, reason)
    if key not in _LOGGED:
        _LOGGED.add(key)
        LOGGER.log(level, "%s: using backend %s (%s)", op, backend, reason)


def _listed(op: str, reasons: Mapping[str, str]) -> str:
    return "\n".join([f"{op}:"] + [f"  {name}: {reason}" for name, reason in reasons.items()])


def select(op: str, spec: OpSpec) -> Backend:
    """Choose the backend that serves a call: the requested one, else the most preferred one that does not decline.

    The choice is logged once per (operator, backend, reason).

    Raises:
        BackendError: nothing serves the call, or the requested backend declines under ``strict``.
    """
    request = _REQUEST.get()
    declined: dict[str, str] = {}
    if request is not None:
        wanted = _find(request.name)
        reason = wanted.why_not(op, spec)
        if reason is None:
            _log_once(logging.INFO, op, wanted.name, "requested")
            return wanted
        if request.strict or _strict:
            raise BackendError(
                f"{op}: the requested backend {wanted.name!r} declines: {reason}; choose another backend, or drop "
                "strict to let the next one serve it"
            )
        declined[wanted.name] = reason
    for _, backend in _BACKENDS:
        if backend.name in declined:
            continue
        reason = backend.why_not(op, spec)
        if reason is not None:
            declined[backend.name] = reason
            continue
        why = "; ".join(f"{name} declined: {text}" for name, text in declined.items()) or "first in preference"
        level = logging.WARNING if request is not None else logging.INFO
        _log_once(level, op, backend.name, why)
        return backend
    if not declined:
        raise BackendError(f"{op}: no backend is registered; import ptq4arvg_kernels to register the built-in ones")
    raise BackendError("no backend serves " + _listed(op, declined))
