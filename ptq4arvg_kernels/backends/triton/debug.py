"""Checks of data on the host, see :mod:`ptq4arvg_kernels.backends.debug`."""

from ..debug import check, enabled

__all__ = ["check", "enabled"]
