"""What this machine allows: the ceilings that benchmarks compare the CPU kernels with."""

from __future__ import annotations

from typing import Any

from . import native

READ_BYTES = 512 << 20  # beyond any cache
REPEATS = 7


def measure(threads: int) -> dict[str, Any]:
    """Measure memory and arithmetic, best of several.

    Args:
        threads: at most that many threads, at least 1.

    Returns:
        ``isa``: the instruction set in use; ``read_gb_s``: 10^9 bytes per second when memory is read once;
        ``w8a8_gops``, ``w6a8_gops``, ``w6a6_gops``: 10^9 operations per second (two per multiply-add) of the bare
        register loops of the products.

    Raises:
        RuntimeError: the compiled module is not installed.
    """
    module = native.module()
    limits: dict[str, Any] = {
        "isa": module.instruction_set(),
        "read_gb_s": module.measure_read(READ_BYTES, REPEATS, threads) / 1e9,
    }
    for name, bits in (("w8a8", (8, 8)), ("w6a8", (6, 8)), ("w6a6", (6, 6))):
        limits[f"{name}_gops"] = module.measure_products(*bits, threads) / 1e9
    return limits
