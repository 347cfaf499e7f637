"""The plain style of printed tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

Row = Mapping[str, Any]


def plain_table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    """A table with left-aligned columns, then right-aligned ones."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for header in left:
        table.add_column(header, no_wrap=True)
    for header in right:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def span(values: Iterable[float]) -> str:
    """``3`` or ``3–5``."""
    found = sorted(set(values))
    if not found:
        return ""
    return f"{found[0]:g}" if len(found) == 1 else f"{found[0]:g}–{found[-1]:g}"


def markdown(headers: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table whose first ``left`` columns are text."""
    lines = [headers, ["---" if i < left else "---:" for i in range(len(headers))], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def grouped(rows: Sequence[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """Rows by a key, in order."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found
