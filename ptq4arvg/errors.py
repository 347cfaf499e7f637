"""Errors that a user can act on."""

__all__ = ["CalibrationError", "CheckpointError"]


class CheckpointError(ValueError):
    """A file with weights is missing, damaged, of another kind or for another model."""


class CalibrationError(ValueError):
    """The statistics seen so far do not determine a scale, a shift or a factor."""
