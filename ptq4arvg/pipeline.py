"""The pipeline: a floating-point generator and a recipe in, a generator in integers out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ptq4arvg.blocks import QuantBlock, QuantHead, prepare
from ptq4arvg.calibration.dgc import select
from ptq4arvg.calibration.gps import ChannelScale, channel_shift, gps_scale
from ptq4arvg.calibration.gptq import compensated_rows
from ptq4arvg.calibration.observers import RowSample
from ptq4arvg.calibration.quantizers import symmetric_rows
from ptq4arvg.calibration.stwq import GroupParams, kv_groups, measure
from ptq4arvg.calibration.watch import calibration_pass, watch_linears
from ptq4arvg.errors import CalibrationError
from ptq4arvg.fold import fold, pair_weight
from ptq4arvg.linear import QuantLinear
from ptq4arvg.protocol import AttentionSpec, CalibrationSet, FoldPair, LinearSpec, ordinary_positions
from ptq4arvg.recipes import Recipe, named_recipe

__all__ = ["FORMAT_VERSION", "assemble", "collect_calibration", "pair_rows", "quantize", "round_tables"]

FORMAT_VERSION = 1
Progress = Callable[[float, str], None]

# Rows per norm → Linear pair from which shifts and scales are derived.
PAIR_ROWS = 4096
# Rows of every linear's input on which weight rounding is compensated.
INPUT_ROWS = 4096


def collect_calibration(
    model: Any, samples: int = 128, seed: int = 0, progress: Progress | None = None
) -> CalibrationSet:
    """Sequences drawn by the model itself under guidance, both branches recorded: 2·samples of them. No data set is
    needed.

    Args:
        model: floating-point generator that speaks the protocol.
        samples: class labels drawn at random.
        seed: of labels and sampling.

    Raises:
        CalibrationError: fewer than one sample.
    """
    if samples < 1:
        raise CalibrationError(f"calibration needs at least one sample, got {samples}; pass samples ≥ 1")
    labels = torch.randint(model.conditioning.classes, (samples,), generator=torch.Generator().manual_seed(seed))
    steps = model.sequence_length
    report = (
        None
        if progress is None
        else (lambda step: progress(min(1.0, (step + 1) / steps), "sample calibration sequences"))
    )
    return model.sample_calibration(labels, seed, report)


def pair_rows(
    model: Any, pairs: list[FoldPair], sequences: CalibrationSet, batch: int, limit: int = PAIR_ROWS
) -> dict[str, Tensor]:
    """A sample of the non-sink rows that each pair's linears read, float32 ``[n, D]`` by norm path."""
    paths = [pair.linears[0] for pair in pairs]
    samples = _sample_inputs(model, paths, ordinary_positions(model), sequences, batch, limit)
    return {pair.norm: samples[path].rows() for pair, path in zip(pairs, paths, strict=True)}


def _sample_inputs(
    model: Any, paths: list[str], positions: Tensor, sequences: CalibrationSet, batch: int, limit: int
) -> dict[str, RowSample]:
    """A sample of the input rows of every linear in ``paths``, at the positions of the mask ``positions [T]``."""
    samples = {path: RowSample(len(sequences), positions, limit) for path in paths}
    if paths:
        with watch_linears(model, paths, lambda path, rows: samples[path].see(rows.values, rows.positions)):
            calibration_pass(model, sequences, batch)
    return samples


def quantize(
    model: Any,
    recipe: str | Recipe = "w8a8",
    calibration: CalibrationSet | None = None,
    *,
    samples: int = 128,
    seed: int = 0,
    batch: int = 32,
    progress: Progress | None = None,
) -> Any:
    """Quantize a generator without training: DGC, channel shift and GPS, folding, STWQ, packing.

    Args:
        model: floating-point generator that speaks :class:`ptq4arvg.protocol.GeneratorProtocol`; left unchanged.
        recipe: ``"w8a8"``, ``"w6a8"``, ``"w6a6"`` or a :class:`~ptq4arvg.recipes.Recipe`.
        calibration: recorded sequences (:func:`collect_calibration`); None records ``2·samples`` from the model now.
        samples: how many sequences calibration keeps (DGC chooses them among those recorded).
        seed: of the recording.
        batch: sequences per calibration forward.
        progress: called with a fraction and what is being done.

    Returns:
        a generator of the same class, with the same ``generate`` and ``forward``, whose blocks and head compute in
        integers. Its attribute ``quantization`` says how it was made (JSON-able).

    Raises:
        ValueError: an unknown recipe, one that integers cannot hold, or a model that is quantized already.
        CalibrationError: no calibration sequences, or NaN or infinity on the way.
    """
    recipe = named_recipe(recipe)
    done = getattr(model, "quantization", None)
    if done is not None:
        raise ValueError(
            f"this model is already quantized ({done['recipe']['name']}); pass the floating-point generator instead"
        )
    tell = progress or (lambda fraction, what: None)
    if calibration is None:
        calibration = collect_calibration(model, samples, seed, lambda fraction, what: tell(0.3 * fraction, what))
    if samples < 1:
        raise CalibrationError(f"calibration needs at least one sequence, got samples={samples}; pass samples ≥ 1")
    if len(calibration) == 0:
        raise CalibrationError(
            "calibration holds no sequences; record some with collect_calibration(model, samples ≥ 1)"
        )
    tell(0.3, "choose sequences")
    work = copy.deepcopy(model).float().eval()
    keep = min(samples, len(calibration))
    chosen = select(work, calibration, keep, batch) if recipe.dgc else None
    sequences = calibration.select(_alternating(calibration, keep) if chosen is None else chosen.rows)

    pairs = [pair for pair in work.fold_pairs() if pair.role in recipe.scaled_roles]
    scales = _scale_pairs(
        work, pairs, recipe, sequences, batch, lambda fraction: tell(0.35 + 0.3 * fraction, "scale channels")
    )
    statistics = measure(
        work, sequences, batch=batch, progress=lambda fraction: tell(0.65 + 0.25 * fraction, "measure static scales")
    )
    tell(0.9, "pack")
    specs = work.linear_specs()
    compensated = [path for path, spec in specs.items() if spec.role != "adaln"] if recipe.compensate else []
    everywhere = torch.ones(work.sequence_length, dtype=torch.bool)
    inputs = _sample_inputs(work, compensated, everywhere, sequences, batch, INPUT_ROWS)
    result = assemble(
        work,
        lambda path: _pack_linear(
            work.get_submodule(path),
            specs[path],
            recipe,
            statistics.linear(path, recipe.act_bits[specs[path].role], recipe.sink_bits),
            inputs.get(path),
        ),
        lambda attention, operand: statistics.kv(attention.path, operand, attention.heads),
    )
    result.quantization = {
        "format_version": FORMAT_VERSION,
        "family": model.family,
        "config": model.config_dict(),
        "recipe": recipe.to_dict(),
        "weight_bits": max(recipe.weight_bits.values()),
        "act_bits": max(recipe.act_bits.values()),
        "integer": True,
        "calibration": {"seed": seed, "sequences": len(sequences), "dgc": None if chosen is None else chosen.report()},
        "scaling": scales,
    }
    prepare(result)
    tell(1.0, "done")
    return result


def _alternating(calibration: CalibrationSet, count: int) -> Tensor:
    """The first ``count`` rows, taking one of each branch in turn."""
    branch_order = torch.where(
        calibration.conditional, calibration.conditional.cumsum(0), (~calibration.conditional).cumsum(0)
    )
    return branch_order.argsort(stable=True)[:count]


def _scale_pairs(
    model: Any,
    pairs: list[FoldPair],
    recipe: Recipe,
    sequences: CalibrationSet,
    batch: int,
    progress: Callable[[float], None],
) -> dict[str, Any]:
    """Shift and scale every pair, folding as it goes; returns what was found, by norm path."""
    if not pairs:
        return {}
    rows = pair_rows(model, pairs, sequences, batch)
    report: dict[str, Any] = {}
    for done, pair in enumerate(pairs):
        act_bits, weight_bits = recipe.act_bits[pair.role], recipe.weight_bits[pair.role]
        x = rows.pop(pair.norm).double()
        shift = channel_shift(x, act_bits)
        found: ChannelScale = gps_scale(x - shift, pair_weight(model, pair), act_bits, weight_bits)
        # x/s − p with p in scaled units: the shift was found before scaling.
        fold(model, pair, found.scale, shift / found.scale)
        report[pair.norm] = {
            "start": found.start,
            "rounds": found.rounds,
            "factor": found.factor,
            "relative_error": found.error,
            "relative_error_unscaled": found.unscaled_error,
        }
        progress((done + 1) / len(pairs))
    return report


def round_tables(model: nn.Module, replaced: set[str]) -> None:
    """Round the parameters that stay in floating point and are tables (embeddings) to fp16, in which checkpoints store
    them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and not any(name.startswith(path) for path in replaced):
                parameter.copy_(parameter.half().to(parameter.dtype))


def _pack_linear(
    layer: nn.Linear, spec: LinearSpec, recipe: Recipe, params: GroupParams, sample: RowSample | None
) -> QuantLinear:
    """Round and pack one linear.

    With a sample of its input, rounding errors are compensated in the weight and their mean in the bias.
    """
    weight, bits = layer.weight.detach(), recipe.weight_bits[spec.role]
    bias = None if layer.bias is None else layer.bias.detach()
    if sample is None:
        codes, scale = symmetric_rows(weight, bits)
    else:
        exact = sample.rows()
        rounded = params.rounded(exact, sample.positions())
        codes, scale = compensated_rows(weight, bits, rounded)
        if bias is not None:
            dequantized = codes.double() * scale.double()[:, None]
            drift = exact.double().mean(0) @ weight.double().T - rounded.double().mean(0) @ dequantized.T
            bias = (bias.double() + drift).float()
    return QuantLinear.from_codes(
        codes,
        scale,
        bias,
        bits,
        params.delta,
        params.zero_point,
        params.bits,
        params.group_of_position,
        spec.activation,
    )


def assemble(
    model: Any, make: Callable[[str], QuantLinear], kv: Callable[[AttentionSpec, str], tuple[Tensor, Tensor]]
) -> Any:
    """Replace blocks and head of a generator by integer ones, in place; returns it.

    Args:
        model: its norms are kept, its linears are not.
        make: gives the integer layer for the linear at a path.
        kv: gives ``(delta, zero_point)``, ``[G, H]`` each, of an attention's ``"k"`` or ``"v"``.
    """

    def norm(path: str | None) -> Any:
        return None if path is None else model.get_submodule(path)

    blocks: dict[str, nn.Module] = {}
    for spec in model.block_specs():
        layers = {"qkv": make(spec.qkv), "proj": make(spec.proj), "fc1": make(spec.fc1), "fc2": make(spec.fc2)}
        if spec.modulation is not None:
            layers["adaln"] = make(spec.modulation.linear)
        at = spec.attention
        blocks[spec.path] = QuantBlock(
            spec,
            norm(spec.norm1),
            norm(spec.norm2),
            norm(at.q_norm),
            norm(at.k_norm),
            layers,
            kv(at, "k"),
            kv(at, "v"),
            kv_groups(model),
        )
    head = model.head_spec()
    adaln = None if head.modulation is None else make(head.modulation.linear)
    fused = QuantHead(head, norm(head.norm), adaln, make(head.linear))
    for path, block in blocks.items():
        model.set_submodule(path, block)
    model.replace_head(fused)
    round_tables(model, {*blocks, "fused_head"})
    return model.eval().requires_grad_(False)
