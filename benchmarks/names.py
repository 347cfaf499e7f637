"""Lists on a command line."""

from __future__ import annotations


def names(text: str) -> list[str]:
    """Names from ``"a,b"``, each once."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def numbers(option: str, text: str) -> list[int]:
    """Positive numbers from ``"1,8"``, each once.

    Raises:
        ValueError: not positive numbers.
    """
    parts = names(text)
    if not parts or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{option} {text!r} is not a list of positive numbers; write 1,8")
    return [int(part) for part in parts]
