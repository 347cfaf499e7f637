"""Counters of the GEMM and attention kernels, see :mod:`ptq4arvg_kernels.backends.scratch`."""

from ..scratch import _COUNTERS, counters

__all__ = ["_COUNTERS", "counters"]
