"""Loops of a PTX kernel as ranges of lines of its text."""

from __future__ import annotations

import re

_LABEL = re.compile(r"^\s*(\$[\w$]+):")
_BRANCH = re.compile(r"^\s*(?:@!?%p\d+\s+)?bra(?:\.uni)?\s+(\$[\w$]+)\s*;")


def ptx_loops(text: str) -> list[range]:
    """Lines (counted from 1) of the innermost loops, in order: from a label to the last branch back to it."""
    labels: dict[str, int] = {}
    ends: dict[int, int] = {}
    for line, content in enumerate(text.splitlines(), 1):
        label = _LABEL.match(content)
        if label is not None:
            labels[label[1]] = line
            continue
        branch = _BRANCH.match(content)
        if branch is not None and branch[1] in labels:
            ends[labels[branch[1]]] = line
    found = [range(first, last + 1) for first, last in sorted(ends.items(), key=lambda bounds: bounds[1])]
    return [loop for loop in found if not any(inner != loop and _inside(inner, loop) for inner in found)]


_PRODUCT = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")


def is_product(line: str) -> bool:
    """Whether a line of PTX is a tensor-core instruction."""
    return _PRODUCT.search(line) is not None


def products_per_loop(text: str) -> int:
    """Tensor-core instructions of the innermost loop that has most of them; 0 if none has any."""
    lines = text.splitlines()
    return max((sum(is_product(lines[i - 1]) for i in loop) for loop in ptx_loops(text)), default=0)


def _inside(inner: range, outer: range) -> bool:
    return outer.start <= inner.start and inner.stop <= outer.stop
