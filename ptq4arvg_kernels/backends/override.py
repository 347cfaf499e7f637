"""A value that tests and benchmarks set for the current thread or task, such as a stand-in for a GPU."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Override(Generic[Value]):
    """None, or what :meth:`replace` says inside its block."""

    def __init__(self, name: str) -> None:
        self._value: contextvars.ContextVar[Value | None] = contextvars.ContextVar(f"ptq4arvg_{name}", default=None)

    def get(self) -> Value | None:
        return self._value.get()

    @contextlib.contextmanager
    def replace(self, value: Value) -> Iterator[None]:
        """``value`` for this thread or task; blocks nest."""
        token = self._value.set(value)
        try:
            yield
        finally:
            self._value.reset(token)
