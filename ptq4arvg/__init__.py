"""Low-bit inference for autoregressive image generators: calibration, models and the pipeline that joins them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["CalibrationError", "CheckpointError", "Recipe", "collect_calibration", "load", "quantize", "save"]

if TYPE_CHECKING:
    from ptq4arvg.checkpoint import load, save
    from ptq4arvg.errors import CalibrationError, CheckpointError
    from ptq4arvg.pipeline import collect_calibration, quantize
    from ptq4arvg.recipes import Recipe

_HOMES = {
    "CalibrationError": "errors",
    "CheckpointError": "errors",
    "Recipe": "recipes",
    "collect_calibration": "pipeline",
    "load": "checkpoint",
    "quantize": "pipeline",
    "save": "checkpoint",
}


def __getattr__(name: str) -> Any:
    # Torch is imported when something is used, so that the command line answers at once.
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
