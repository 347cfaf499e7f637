"""Checks of data on the host, for debugging: they wait for the device, so they run only with ``PTQ4ARVG_DEBUG=1``."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from . import reference

_WRITTEN = {"qkv_append": (1, 2)}  # arguments that an operator writes to


def enabled(operand: Tensor) -> bool:
    """Whether to check: ``PTQ4ARVG_DEBUG`` is set to something other than 0, and no graph is being captured."""
    if os.environ.get("PTQ4ARVG_DEBUG", "0") in ("", "0"):
        return False
    return not (operand.is_cuda and torch.cuda.is_current_stream_capturing())


def check(op: str, args: tuple[Any, ...]) -> None:
    """Raise what the reference raises for these arguments. It reads them all, and writes to copies."""
    copies = _WRITTEN.get(op, ())
    getattr(reference, op)(*(value.clone() if i in copies else value for i, value in enumerate(args)))
