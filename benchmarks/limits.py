"""The machine a benchmark runs on: its description, its caches, and the measured ceilings of its cores and memory."""

from __future__ import annotations

import importlib
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

DEFAULT_CACHE = 32 << 20
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_LIMITS_MODULE = "ptq4arvg_kernels.backends.cpu.limits"
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def machine_limits(threads: int) -> dict[str, Any] | None:
    """Ceilings measured by the CPU backend, or None where this package has no compiled CPU backend.

    ``read_gb_s`` is the bandwidth of reading memory; ``w8a8_gops``, ``w6a8_gops`` and ``w6a6_gops`` are the rates of
    the inner loops on registers alone, two operations per multiply-add; ``isa`` names the instruction set.
    """
    try:
        module = importlib.import_module(_LIMITS_MODULE)
    except ModuleNotFoundError as error:
        if error.name is not None and _LIMITS_MODULE.startswith(error.name):
            return None
        raise
    return dict(module.measure(threads))


def highest(first: dict[str, Any] | None, second: dict[str, Any] | None) -> dict[str, Any] | None:
    """The larger of two measurements of every limit: a shared machine only ever falls short of them."""
    if first is None or second is None:
        return first or second
    return {key: value if isinstance(value, str) else max(value, second[key]) for key, value in first.items()}


def cache_sizes(folder: Path = _CACHES) -> dict[str, int]:
    """Bytes of the caches that hold data, by name (``L1d``, ``L2``, ``L3``); empty where the system does not say."""
    sizes: dict[str, int] = {}
    for index in sorted(folder.glob("index*")):
        kind = (index / "type").read_text().strip()
        if kind == "Instruction":
            continue
        found = re.fullmatch(r"(\d+)([KMG]?)", (index / "size").read_text().strip())
        if found is not None:
            level = (index / "level").read_text().strip()
            sizes[f"L{level}{'d' if kind == 'Data' else ''}"] = int(found[1]) * _UNITS[found[2]]
    return sizes


def last_level_cache() -> int:
    """Bytes of the largest cache; 32 MiB where the system does not say."""
    return max(cache_sizes().values(), default=DEFAULT_CACHE)


def available_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found is not None else platform.processor() or platform.machine()


def describe(threads: int, limits: dict[str, Any] | None) -> dict[str, Any]:
    """The entry ``machine`` of a report."""
    return {
        "cpu": cpu_name(),
        "cores": available_cores(),
        "threads": threads,
        "caches": cache_sizes(),
        "torch": torch.__version__,
        "isa": None if limits is None else limits["isa"],
        "limits": limits,
    }
