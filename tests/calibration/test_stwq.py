"""Static token-wise quantization: tables by group of positions (method.md §1.6, invariants 14, 24, 25, 29)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ptq4arvg.calibration.observers import Histogram
from ptq4arvg.calibration.quantizers import fake_quantize, search_histogram, uniform_params
from ptq4arvg.calibration.stwq import Statistics, kv_groups, measure
from ptq4arvg.calibration.watch import Rows, calibration_pass, watch_attention, watch_linears
from ptq4arvg.errors import CalibrationError
from ptq4arvg.models.rar import RAR
from tests.tiny import tiny_calibration, tiny_rar

BLOCK_ADALN, QKV, FC2 = "blocks.0.adaLN_modulation.1", "blocks.0.attn.qkv", "blocks.1.mlp.fc2"
HEAD_ADALN, HEAD = "adaln_before_head.adaLN_modulation.1", "lm_head"


@pytest.fixture(scope="module")
def model() -> RAR:
    return tiny_rar(1)


@pytest.fixture(scope="module")
def statistics(model: RAR) -> Statistics:
    return measure(model, tiny_calibration(model, 6), batch=12)


def rows_of(model: RAR, path: str) -> tuple[Tensor, Tensor]:
    """All activation rows of one linear, repeated as often as they stand for, and their positions."""
    seen: list[Rows] = []
    with watch_linears(model, [path], lambda _path, rows: seen.append(rows)):
        calibration_pass(model, tiny_calibration(model, 6), 12)
    (rows,) = seen
    counts = torch.ones(len(rows.values), dtype=torch.int64) if rows.counts is None else rows.counts
    return rows.values.repeat_interleave(counts, 0).double(), rows.positions.repeat_interleave(counts)


def test_groups_are_those_of_the_method(model: RAR, statistics: Statistics) -> None:
    """Modulations by position, block linears by sink and rest, the head in one (method.md §1.6)."""
    length = model.sequence_length
    for path, spec in model.linear_specs().items():
        params = statistics.linear(path, 8)
        if spec.role == "adaln":
            expected = list(range(length))
        elif spec.role == "head":
            expected = [0] * length
        else:
            expected = [0, 1] + [2] * (length - 2)
        assert params.group_of_position.tolist() == expected, path
        assert params.delta.shape == params.zero_point.shape == params.bits.shape == (max(expected) + 1,)
        assert params.delta.dtype == torch.float32
        assert params.zero_point.dtype == torch.int64


@pytest.mark.parametrize("path", [BLOCK_ADALN, HEAD_ADALN, QKV, FC2])
@pytest.mark.parametrize("position", [0, 1, 2, 9])
def test_a_position_gets_the_range_of_its_own_rows(
    model: RAR, statistics: Statistics, path: str, position: int
) -> None:
    """Also of the final modulation at step 0, where positions 0 and 1 come together and the published table is off by
    one: row t of every table describes position t of the sequence."""
    params = statistics.linear(path, 8, percentiles=(1.0,))
    values, positions = rows_of(model, path)
    group = params.group_of_position
    mine = values[group[positions] == group[position]]
    expected = uniform_params(mine.min(), mine.max(), 8)
    index = int(group[position])
    assert params.delta[index].item() == pytest.approx(expected.delta.item(), rel=1e-6)
    assert params.zero_point[index].item() == expected.zero_point.item()
    # Other groups have other parameters, so an index that is off by one would show.
    assert len(params.delta.unique()) == len(params.delta)


def test_zero_points_are_codes(model: RAR, statistics: Statistics) -> None:
    for path in model.linear_specs():
        for bits in (6, 8):
            params = statistics.linear(path, bits)
            assert params.bits.tolist() == [bits] * len(params.bits)
            assert bool(((params.zero_point >= 0) & (params.zero_point <= 2**bits - 1)).all())
            assert bool((torch.isfinite(params.delta) & (params.delta > 0)).all())


@pytest.mark.parametrize("path", [QKV, BLOCK_ADALN])
def test_sinks_get_8_bit_codes_in_a_6_bit_layer(statistics: Statistics, path: str) -> None:
    mixed, narrow, wide = statistics.linear(path, 6, 8), statistics.linear(path, 6), statistics.linear(path, 8)
    assert mixed.bits.tolist() == [8, 8] + [6] * (len(mixed.bits) - 2)
    for name in ("delta", "zero_point"):
        assert torch.equal(getattr(mixed, name)[:2], getattr(wide, name)[:2])
        assert torch.equal(getattr(mixed, name)[2:], getattr(narrow, name)[2:])


def test_sinks_that_share_a_group_stay_narrow(statistics: Statistics) -> None:
    assert statistics.linear(HEAD, 6, 8).bits.tolist() == [6]
    assert statistics.linear(QKV, 8, 6).bits.tolist() == [8, 8, 8]


def test_per_tensor_statistics_have_one_group(model: RAR) -> None:
    pooled = measure(model, tiny_calibration(model, 6), per_tensor=True, batch=12)
    for path in (QKV, BLOCK_ADALN):
        params = pooled.linear(path, 8, percentiles=(1.0,))
        values, _ = rows_of(model, path)
        expected = uniform_params(values.min(), values.max(), 8)
        assert params.group_of_position.tolist() == [0] * model.sequence_length
        assert params.delta.tolist() == pytest.approx([expected.delta.item()], rel=1e-6)


@pytest.mark.parametrize("path", [BLOCK_ADALN, QKV, FC2])
@pytest.mark.parametrize("bits", [6, 8])
def test_groups_lose_less_than_one_range_for_all(model: RAR, statistics: Statistics, path: str, bits: int) -> None:
    """Invariant 14 on real activations, in squared error over all rows."""
    values, positions = rows_of(model, path)
    params = statistics.linear(path, bits)
    group = params.group_of_position[positions]

    def error(delta: Tensor, zero_point: Tensor) -> float:
        q = ((values / delta).round() + zero_point).clamp(0, 2**bits - 1)
        return float(((q - zero_point) * delta - values).square().sum())

    pooled = measure(model, tiny_calibration(model, 6), per_tensor=True, batch=12).linear(path, bits)
    own = error(params.delta.double()[group][:, None], params.zero_point.double()[group][:, None])
    assert own < error(pooled.delta.double(), pooled.zero_point.double())


def same(a: Statistics, b: Statistics) -> bool:
    tables = [(a.linears[path], b.linears[path]) for path in a.linears]
    tables += [(a.attention[key], b.attention[key]) for key in a.attention]
    return all(torch.equal(x, y) for one, two in tables for x, y in zip(one.table(), two.table(), strict=True))


def test_measuring_twice_gives_the_same(model: RAR, statistics: Statistics) -> None:
    assert same(statistics, measure(model, tiny_calibration(model, 6), batch=12))


def test_the_batch_split_does_not_matter(model: RAR, statistics: Statistics) -> None:
    """Up to the rounding of the forward pass itself, whose sums may be ordered by the batch's size; the pooling is
    exact (next test)."""
    for batch in (1, 5):
        other = measure(model, tiny_calibration(model, 6), batch=batch)
        for path in model.linear_specs():
            mine, theirs = statistics.linears[path], other.linears[path]
            assert torch.allclose(mine.low, theirs.low, atol=1e-5)
            assert torch.allclose(mine.high, theirs.high, atol=1e-5)
            assert torch.equal(mine.table()[1].sum(1), theirs.table()[1].sum(1))
            a, b = statistics.linear(path, 8), other.linear(path, 8)
            assert torch.allclose(a.delta, b.delta, rtol=1e-2)


def test_histograms_of_all_batches_are_pooled_exactly(model: RAR, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same activations, handed over sequence by sequence or together, give equal tables."""
    sequences = tiny_calibration(model, 6)
    whole: dict[str, list[Tensor]] = {}
    with watch_linears(model, [QKV], lambda path, rows: whole.setdefault(path, []).append(rows.values)):
        calibration_pass(model, sequences, 12)
    x = whole[QKV][0]
    group = torch.tensor(model.linear_specs()[QKV].group_of_position).repeat(12)
    tables = []
    for size in (1, 5, 12):
        histogram = Histogram(3, QKV)
        parts = list(zip(x.split(size * 17), group.split(size * 17), strict=True))
        for values, g in parts:
            histogram.see_range(values, g)
        for values, g in parts:
            histogram.see_values(values, g)
        tables.append(histogram.table())
    for centres, counts in tables[1:]:
        assert torch.equal(centres, tables[0][0])
        assert torch.equal(counts, tables[0][1])


# ------------------------------------------------------------------------------------------------- keys and values


def test_slot_groups(model: RAR) -> None:
    assert kv_groups(model).tolist() == [0, 0] + [1] * (model.sequence_length - 2)


@pytest.mark.parametrize("operand", ["k", "v"])
def test_keys_and_values_by_slot_group_and_head(model: RAR, statistics: Statistics, operand: str) -> None:
    heads = model.config.heads
    delta, zero_point = statistics.kv("blocks.1.attn", operand, heads)
    assert delta.shape == zero_point.shape == (2, heads)
    seen: dict[str, Tensor] = {}
    with watch_attention(model, (operand,), lambda path, _name, x: seen.__setitem__(path, x)):
        calibration_pass(model, tiny_calibration(model, 6), 12)
    x = seen["blocks.1.attn"].double()  # [B, H, S, d]
    for group, slots in enumerate((slice(0, 2), slice(2, None))):
        for head in range(heads):
            values = x[:, head, slots].reshape(1, -1)
            histogram = Histogram(1, "one")
            histogram.see_range(values, torch.zeros(1, dtype=torch.int64))
            histogram.see_values(values, torch.zeros(1, dtype=torch.int64))
            expected = search_histogram(*histogram.table(), 8)
            assert delta[group, head].item() == pytest.approx(expected.delta.item(), rel=1e-6)
            assert zero_point[group, head].item() == expected.zero_point.item()
            params = expected
            error = (fake_quantize(values, params) - values).abs()
            assert float(error.square().mean().sqrt()) < float(params.delta) / 2


def test_published_operands_are_per_tensor(model: RAR) -> None:
    statistics = measure(model, tiny_calibration(model, 4), kv_per_tensor=True, operands=("q", "k", "p", "v"), batch=8)
    assert {operand for _, operand in statistics.attention} == {"q", "k", "p", "v"}
    for path, operand in statistics.attention:
        assert statistics.operand(path, operand, 6).delta.shape == (1,)
    # Probabilities start at 0, which must stay exact.
    assert statistics.operand("blocks.0.attn", "p", 6).zero_point.item() == 0


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_activations_are_named_with_their_layer(bad: float) -> None:
    model = tiny_rar(2)
    with torch.no_grad():
        model.blocks[0].attn.proj.bias[0] = bad
    with pytest.raises(CalibrationError, match=r"blocks\.0\.mlp\.fc1: calibration saw nan"):
        measure(model, tiny_calibration(model, 2))
    model = tiny_rar(2)
    with torch.no_grad():
        model.blocks[0].adaLN_modulation[1].bias[0] = bad  # the shift of one channel that qkv reads
    with pytest.raises(CalibrationError, match=rf"blocks\.0\.attn\.qkv: calibration saw {bad}"):
        measure(model, tiny_calibration(model, 2))


def test_no_sequences(model: RAR) -> None:
    with pytest.raises(CalibrationError, match="at least one sequence, got none"):
        measure(model, tiny_calibration(model, 1).select(slice(0, 0)))


def test_constant_activations_have_parameters() -> None:
    """A dead layer input: all zeros get a step of 1, the zero code and an exact zero."""
    model = tiny_rar(3)
    with torch.no_grad():
        fc1 = model.blocks[0].mlp.fc1
        fc1.weight.zero_()
        fc1.bias.zero_()
    params = measure(model, tiny_calibration(model, 2)).linear("blocks.0.mlp.fc2", 8)
    assert params.delta.tolist() == [1.0, 1.0, 1.0]
    assert params.zero_point.tolist() == [0, 0, 0]


def test_progress_is_monotone_and_complete(model: RAR) -> None:
    steps: list[float] = []
    measure(model, tiny_calibration(model, 4), batch=4, progress=steps.append)
    assert steps == sorted(steps)
    assert steps[-1] == 1.0
    assert len(steps) == 4
