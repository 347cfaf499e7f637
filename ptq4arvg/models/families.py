"""Families by name, for files that say which one they hold."""

from __future__ import annotations

from typing import Any

from ptq4arvg.models.rar import RAR, RARConfig

__all__ = ["build"]

_FAMILIES: dict[str, tuple[type, type]] = {"rar": (RAR, RARConfig)}


def build(family: str, config: dict[str, Any]) -> Any:
    """A generator of ``family`` with uninitialised weights.

    Raises:
        ValueError: an unknown family, or a config that does not fit it.
    """
    if family not in _FAMILIES:
        raise ValueError(f"unknown family {family!r}; known: {', '.join(_FAMILIES)}")
    model_class, config_class = _FAMILIES[family]
    try:
        return model_class(config_class(**config))
    except TypeError as error:
        raise ValueError(f"the config does not describe a generator of family {family!r}: {error}") from error
