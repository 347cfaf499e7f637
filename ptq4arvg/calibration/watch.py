"""Looking into a generator while it runs over the calibration sequences.

Everything a calibrator needs is seen through forward hooks on the modules that the protocol names. Observations carry
the position of every row and, where one row stands for several, how many, so that statistics do not depend on how
sequences are cut into batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptq4arvg.errors import CalibrationError
from ptq4arvg.nn import Condition
from ptq4arvg.protocol import CalibrationSet

__all__ = ["Rows", "calibration_pass", "watch_attention", "watch_linears"]


@dataclass(frozen=True)
class Rows:
    """Rows of a layer's input.

    Attributes:
        values: float ``[n, K]``.
        positions: int64 ``[n]``, sequence position of each row.
        counts: int64 ``[n]``, how many activation rows each one stands for; None means one each.
    """

    values: Tensor
    positions: Tensor
    counts: Tensor | None = None


@contextmanager
def _hooks(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def watch_linears(model: Any, paths: list[str], see: Callable[[str, Rows], None]) -> Any:
    """Context in which ``see(path, rows)`` is called with the input of every linear in ``paths`` at every forward.

    The input of a modulation linear is taken from the condition of its block, where the multiplicity of its rows is
    known.
    """
    specs = model.linear_specs()
    owners = {
        spec.modulation.linear: spec.path for spec in [*model.block_specs(), model.head_spec()] if spec.modulation
    }
    handles = []

    def on_condition(path: str, activation: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            condition: Condition = args[1]
            values = F.silu(condition.values) if activation == "silu" else condition.values
            counts = torch.bincount(condition.rows, minlength=len(values))
            see(path, Rows(values, condition.positions, counts))

        return hook

    def on_input(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            x, positions = args[0], args[1]
            rows = x.flatten(0, -2)
            see(path, Rows(rows, positions.repeat(len(rows) // len(positions))))

        return hook

    for path in paths:
        if path in owners:
            handles.append(
                model.get_submodule(owners[path]).register_forward_pre_hook(on_condition(path, specs[path].activation))
            )
        else:
            handles.append(model.get_submodule(path).register_forward_pre_hook(on_input(path)))
    return _hooks(handles)


def watch_attention(model: Any, operands: tuple[str, ...], see: Callable[[str, str, Tensor], None]) -> Any:
    """Context in which ``see(attention path, operand, tensor [B, H, ·, ·])`` is called for the taps named in
    ``operands``."""
    handles = []

    def on_tap(path: str, operand: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            see(path, operand, args[0])

        return hook

    for spec in model.block_specs():
        taps = model.get_submodule(f"{spec.attention.path}.taps")
        handles += [
            getattr(taps, operand).register_forward_pre_hook(on_tap(spec.attention.path, operand))
            for operand in operands
        ]
    return _hooks(handles)


@torch.inference_mode()
def calibration_pass(
    model: Any, sequences: CalibrationSet, batch: int, progress: Callable[[float], None] | None = None
) -> None:
    """Run the model over all sequences in batches; hooks do the rest.

    Raises:
        CalibrationError: no sequences, or a NaN or infinity in the model's output.
    """
    if len(sequences) == 0:
        raise CalibrationError("calibration needs at least one sequence, got none; pass samples ≥ 1")
    done = 0
    for part in sequences.batches(batch):
        logits = model.calibration_forward(part.inputs)
        if not bool(torch.isfinite(logits).all()):
            raise CalibrationError(
                "the floating-point model produced NaN or infinity on its calibration sequences; "
                "check the checkpoint it was loaded from"
            )
        done += len(part)
        if progress is not None:
            progress(done / len(sequences))
