"""What calibration sees of a running generator: every row with its position, and nothing after it stops looking."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ptq4arvg.calibration.watch import Rows, calibration_pass, watch_attention, watch_linears
from ptq4arvg.errors import CalibrationError
from ptq4arvg.models.rar import RAR
from tests.tiny import tiny_calibration, tiny_rar


@pytest.fixture
def model() -> RAR:
    return tiny_rar(0)


def look(model: RAR, paths: list[str], batch: int, samples: int = 3) -> dict[str, list[Rows]]:
    seen: dict[str, list[Rows]] = {path: [] for path in paths}
    with watch_linears(model, paths, lambda path, rows: seen[path].append(rows)):
        calibration_pass(model, tiny_calibration(model, samples), batch)
    return seen


def hooks(model: RAR) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def test_every_linear_is_seen_once_per_forward_with_all_rows(model: RAR) -> None:
    paths = list(model.linear_specs())
    length = model.sequence_length
    for path, parts in look(model, paths, batch=4).items():
        assert len(parts) == 2  # six sequences: four and two
        for size, rows in zip((4, 2), parts, strict=True):
            assert rows.values.shape == (len(rows.positions), model.get_submodule(path).in_features)
            counts = torch.ones(len(rows.positions), dtype=torch.int64) if rows.counts is None else rows.counts
            per_position = torch.zeros(length, dtype=torch.int64).scatter_add_(0, rows.positions, counts)
            assert per_position.tolist() == [size] * length, path


def test_rows_carry_the_right_position(model: RAR) -> None:
    """Position 0 is the same for every sequence of a class; compare with the layer's real input, row by row."""
    path = "blocks.1.attn.qkv"
    inputs: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    (rows,) = look(model, [path], batch=6)[path]
    handle.remove()
    for row, position in enumerate(rows.positions.tolist()):
        sequence = row // model.sequence_length
        assert torch.equal(rows.values[row], inputs[0][sequence, position])


@pytest.mark.parametrize("path", ["blocks.0.adaLN_modulation.1", "adaln_before_head.adaLN_modulation.1"])
def test_conditions_come_activated_and_counted(model: RAR, path: str) -> None:
    """Distinct conditions with multiplicities stand for exactly the conditions of all rows."""
    sequences = tiny_calibration(model, 3)
    (rows,) = look(model, [path], batch=6)[path]
    assert rows.counts is not None
    assert len(rows.values) < 6 * model.sequence_length  # the unconditional half shares its rows
    classes = sequences.inputs["classes"]
    every = (
        model.embeddings(model._class_ids(classes))[:, None] + model.timesteps_embeddings[0, : model.sequence_length]
    )
    expected = F.silu(every)
    repeated = rows.values.repeat_interleave(rows.counts, 0)
    positions = rows.positions.repeat_interleave(rows.counts)
    for position in range(model.sequence_length):
        got = repeated[positions == position]
        want = expected[:, position]
        assert torch.allclose(got[got[:, 0].argsort()], want[want[:, 0].argsort()])


@pytest.mark.parametrize("operand", ["q", "k", "v", "p"])
def test_attention_operands(model: RAR, operand: str) -> None:
    seen: dict[str, Tensor] = {}
    with watch_attention(model, (operand,), lambda path, name, x: seen.__setitem__(f"{path}.{name}", x)):
        calibration_pass(model, tiny_calibration(model, 2), 4)
    length, config = model.sequence_length, model.config
    last = length if operand == "p" else config.dim // config.heads
    assert {path: tuple(x.shape) for path, x in seen.items()} == {
        f"blocks.{i}.attn.{operand}": (4, config.heads, length, last) for i in range(config.depth)
    }
    if operand == "p":
        p = seen["blocks.0.attn.p"]
        assert torch.allclose(p.sum(-1), torch.ones(()), atol=1e-5)
        assert p.triu(1).abs().max() == 0


def test_hooks_are_gone_afterwards(model: RAR) -> None:
    look(model, list(model.linear_specs()), 4)
    assert hooks(model) == 0

    def fail(*_args: object) -> None:
        raise RuntimeError("observer failed")

    for context in (
        watch_linears(model, ["blocks.0.attn.qkv"], fail),
        watch_attention(model, ("k",), fail),
    ):
        with pytest.raises(RuntimeError, match="observer failed"), context:
            calibration_pass(model, tiny_calibration(model, 1), 2)
    assert hooks(model) == 0


def test_progress_ends_at_one(model: RAR) -> None:
    steps: list[float] = []
    calibration_pass(model, tiny_calibration(model, 5), 4, steps.append)
    assert steps == [0.4, 0.8, 1.0]


def test_no_sequences(model: RAR) -> None:
    with pytest.raises(CalibrationError, match="at least one sequence, got none"):
        calibration_pass(model, tiny_calibration(model, 2).select(slice(0, 0)), 4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_damaged_model_is_noticed(model: RAR, bad: float) -> None:
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight[3, 5] = bad
    with pytest.raises(CalibrationError, match=r"NaN or infinity.*check the checkpoint"):
        calibration_pass(model, tiny_calibration(model, 2), 4)
