"""Fake-quantized execution: values are rounded to the grid and computed with in floating point.

For what the integer laws cannot hold (asymmetric weights, quantized q, k, p, v of the published recipe) and for the
baselines that the integer generators are compared with. Results are marked ``"integer": false`` and cannot be saved as
checkpoints.

* ``rtn``: round to nearest; symmetric per-channel weights, one static scale per layer input, nothing folded.
* ``smoothquant``: the same after folding SmoothQuant factors (α = ½) into every norm → Linear pair.
* ``paper``: the published pipeline (method.md §1.0): its DGC; SmoothQuant factors; symmetric shift to the code below
  the middle; closed-form GPS without clip or search on qkv and fc1; STWQ tables from three percentiles; asymmetric
  weights; q, k, p and v per tensor. Parameters come from floating-point passes pooled over all sequences, where the
  published code measures with quantization switched on.

The baselines keep keys and values as the integer generators do (8 bits, per head, sinks apart), so that what differs is
the linears.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptq4arvg.calibration.dgc import select, select_published
from ptq4arvg.calibration.gps import channel_losses, closed_form, smoothquant_scale
from ptq4arvg.calibration.quantizers import PERCENTILES, UniformParams, fake_quantize, search_columns, symmetric_rows
from ptq4arvg.calibration.stwq import Statistics, kv_groups, measure
from ptq4arvg.calibration.watch import calibration_pass, watch_linears
from ptq4arvg.errors import CalibrationError
from ptq4arvg.fold import fold, pair_weight
from ptq4arvg.pipeline import FORMAT_VERSION, collect_calibration, pair_rows, round_tables
from ptq4arvg.protocol import CalibrationSet, ordinary_positions
from ptq4arvg_kernels.tables import make_table, row_parameters

__all__ = ["RECIPES", "FakeQuantLinear", "FakeQuantOperand", "simulate"]

RECIPES = ("rtn", "smoothquant", "paper")
PUBLISHED_PERCENTILES = (0.999, 0.9999, 0.99999)
PAPER_GPS_ROLES = ("qkv", "fc1")


class FakeQuantLinear(nn.Module):
    """``nn.Linear`` with rounded weight and rounded input: ``F.linear(x̂, Ŵ, b)``.

    Args:
        weight: float ``[N, K]``, already rounded to its grid.
        bias: float ``[N]`` or None.
        table: position table float32 ``[T, 4]`` of the input.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.register_buffer("table", table)
        self.weight: Tensor
        self.bias: Tensor | None
        self.table: Tensor

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if positions is None:
            positions = torch.zeros(1, dtype=torch.int64, device=x.device)
        delta, reciprocal, zero_point, bits = row_parameters(self.table, positions, len(rows)).unsqueeze(-1).unbind(1)
        half = torch.exp2(bits - 1)
        codes = torch.clamp((rows * reciprocal).round() + zero_point, min=-half, max=half - 1)
        return F.linear((codes - zero_point) * delta, self.weight, self.bias).view(*x.shape[:-1], -1)


class FakeQuantOperand(nn.Module):
    """Rounds an attention operand ``[B, H, S, ·]``; parameters broadcast against it once cut to its S slots.

    Args:
        params: of shape ``[1]`` or ``[H, T, 1]``.
    """

    def __init__(self, params: UniformParams) -> None:
        super().__init__()
        self.bits = params.bits
        self.register_buffer("delta", params.delta)
        self.register_buffer("zero_point", params.zero_point)
        self.delta: Tensor
        self.zero_point: Tensor

    def forward(self, x: Tensor) -> Tensor:
        delta, zero_point = self.delta, self.zero_point
        if delta.ndim == 3:
            delta, zero_point = delta[:, : x.shape[2]], zero_point[:, : x.shape[2]]
        return fake_quantize(x, UniformParams(delta, zero_point, self.bits))


def asymmetric_rows(weight: Tensor, bits: int) -> Tensor:
    """Published weight quantizer: per output channel, asymmetric, three percentiles, round to nearest; returns Ŵ."""
    params = search_columns(weight.T, bits, PUBLISHED_PERCENTILES)
    return fake_quantize(weight.T.double(), params).T.to(weight.dtype)


def simulate(
    model: Any,
    recipe: str,
    weight_bits: int = 6,
    act_bits: int = 6,
    calibration: CalibrationSet | None = None,
    *,
    samples: int = 128,
    seed: int = 0,
    batch: int = 32,
) -> Any:
    """Fake-quantize a generator by a baseline or by the published recipe.

    Args:
        model: floating-point generator that speaks the protocol; left unchanged.
        recipe: ``"rtn"``, ``"smoothquant"`` or ``"paper"``.
        weight_bits, act_bits: 8 or 6.
        calibration, samples, seed, batch: as in :func:`ptq4arvg.pipeline.quantize`; the baselines calibrate on the same
            sequences.

    Returns:
        a generator of the same class whose ``quantization["integer"]`` is False.

    Raises:
        ValueError: an unknown recipe or width.
        CalibrationError: no sequences, or NaN or infinity on the way.
    """
    if recipe not in RECIPES:
        raise ValueError(f"unknown simulated recipe {recipe!r}; known: {', '.join(RECIPES)}")
    for name, bits in (("weight_bits", weight_bits), ("act_bits", act_bits)):
        if bits not in (6, 8):
            raise ValueError(f"{name} is {bits}; supported are 6 and 8")
    if calibration is None:
        calibration = collect_calibration(model, samples, seed)
    if len(calibration) == 0:
        raise CalibrationError(
            "calibration holds no sequences; record some with collect_calibration(model, samples ≥ 1)"
        )
    work = copy.deepcopy(model).float().eval()
    paper = recipe == "paper"
    chosen = (select_published if paper else select)(work, calibration, min(samples, len(calibration)), batch)
    sequences = calibration.select(chosen.rows)
    if recipe == "smoothquant":
        _fold_smoothquant(work, sequences, batch, with_sinks=True)
    elif paper:
        _fold_smoothquant(work, sequences, batch, with_sinks=False)
        _fold_published(work, sequences, weight_bits, act_bits, batch)
    operands = ("q", "k", "p", "v") if paper else ("k", "v")
    statistics = measure(work, sequences, per_tensor=not paper, kv_per_tensor=paper, operands=operands, batch=batch)
    _replace_linears(work, statistics, weight_bits, act_bits, paper)
    _replace_operands(work, statistics, act_bits, paper)
    round_tables(work, set(work.linear_specs()))
    work.quantization = {
        "format_version": FORMAT_VERSION,
        "family": model.family,
        "config": model.config_dict(),
        "recipe": {"name": recipe},
        "weight_bits": weight_bits,
        "act_bits": act_bits,
        "integer": False,
        "calibration": {"seed": seed, "sequences": len(sequences), "dgc": chosen.report()},
    }
    return work.eval().requires_grad_(False)


def _fold_smoothquant(model: Any, sequences: CalibrationSet, batch: int, with_sinks: bool) -> None:
    """Fold α = ½ factors into every pair, from the peaks over all tokens or over all but the sinks (heads never exclude
    sinks)."""
    peaks: dict[str, Tensor] = {}
    ordinary = ordinary_positions(model)
    pairs = {pair.linears[0]: pair for pair in model.fold_pairs()}

    def see(path: str, rows: Any) -> None:
        everything = with_sinks or pairs[path].role == "head"
        values = rows.values if everything else rows.values[ordinary[rows.positions]]
        peak = values.abs().amax(0)
        peaks[path] = torch.maximum(peaks[path], peak) if path in peaks else peak

    with watch_linears(model, list(pairs), see):
        calibration_pass(model, sequences, batch)
    for path, pair in pairs.items():
        scale = smoothquant_scale(peaks[path], pair_weight(model, pair))
        fold(model, pair, scale, torch.zeros_like(scale))


def _fold_published(model: Any, sequences: CalibrationSet, weight_bits: int, act_bits: int, batch: int) -> None:
    """Symmetric shift on every pair, then closed-form GPS on qkv and fc1 (steps 5 to 8 of the published pipeline)."""
    pairs = model.fold_pairs()
    rows = pair_rows(model, pairs, sequences, batch)
    for pair in pairs:
        x = rows[pair.norm]
        params = search_columns(x, act_bits, PUBLISHED_PERCENTILES, contain_zero=False)
        shift = (2 ** (act_bits - 1) - 1 - params.zero_point) * params.delta
        # As in channel_shift: the window of a constant channel says nothing about its value.
        shift = shift.clamp(x.double().amin(0), x.double().amax(0))
        fold(model, pair, torch.ones_like(shift), shift)
        if pair.role in PAPER_GPS_ROLES:
            a, b, k = channel_losses(x - shift, pair_weight(model, pair), act_bits, weight_bits)
            scale = closed_form(a, b, k)
            fold(model, pair, scale, torch.zeros_like(scale))


def _replace_linears(model: Any, statistics: Statistics, weight_bits: int, act_bits: int, paper: bool) -> None:
    percentiles = PUBLISHED_PERCENTILES if paper else PERCENTILES
    for path in model.linear_specs():
        layer = model.get_submodule(path)
        weight = layer.weight.detach()
        if paper:
            rounded = asymmetric_rows(weight, weight_bits)
        else:
            codes, scale = symmetric_rows(weight, weight_bits)
            rounded = codes.float() * scale[:, None]
        params = statistics.linear(path, act_bits, percentiles=percentiles)
        table = make_table(params.delta, params.zero_point, params.bits, params.group_of_position)
        bias = None if layer.bias is None else layer.bias.detach()
        model.set_submodule(path, FakeQuantLinear(rounded, bias, table))


def _replace_operands(model: Any, statistics: Statistics, act_bits: int, paper: bool) -> None:
    slots = kv_groups(model)
    for spec in model.block_specs():
        taps = model.get_submodule(f"{spec.attention.path}.taps")
        if paper:
            for operand in ("q", "k", "p", "v"):
                params = statistics.operand(spec.attention.path, operand, act_bits, PUBLISHED_PERCENTILES)
                setattr(taps, operand, FakeQuantOperand(params))
            continue
        for operand in ("k", "v"):
            delta, zero_point = statistics.kv(spec.attention.path, operand, spec.attention.heads)
            by_slot = UniformParams(delta.double()[slots].T[..., None], zero_point.double()[slots].T[..., None], 8)
            setattr(taps, operand, FakeQuantOperand(by_slot))
