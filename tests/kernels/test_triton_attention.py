"""Attention of the Triton backend, emulated or interpreted: schedules, splits, the fused decode step, codes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import ptq4arvg_kernels as kernels

pytest.importorskip("triton")

from ptq4arvg_kernels.backends import gpu, scratch
from ptq4arvg_kernels.backends.heads import Grouping
from ptq4arvg_kernels.backends.triton import attention, block_attention, decode, handover, softmax, support
from ptq4arvg_kernels.backends.triton.attention import Schedule
from tests.kernels.attention_cases import Step, same_step, step
from tests.kernels.triton_cases import (
    barriers,
    compiled_ptx,
    device,
    distinct_bytes,
    edited,
    recorded,
    sector_efficiency,
    without_barrier,
)
from tests.ptxsim import HazardError, MemFault

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
compiled = pytest.mark.skipif(support.interpreted(), reason="looks at the compiled kernel")


def fused(given: Step, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, their sums, and the caches afterwards."""
    caches, sums = given.caches(), torch.zeros(len(given.qkv), dtype=torch.int32)
    operands = (given.visible_end, given.case.slots, given.layer(), given.positions, given.out_table, sums)
    with device(**options):
        codes = attention.append_attend_quantize(given.qkv, *caches, *operands)
    return codes, sums, *caches


# --- schedule ---------------------------------------------------------------------------------------------------------


def test_schedule_fills_the_device() -> None:
    few, many = attention.schedule(32, 1, 257, 108), attention.schedule(3200, 1, 257, 108)
    assert few == Schedule(1, 32, 4, 1)  # three steps of 128 slots
    assert many == Schedule(1, 16, 2, 1)
    assert attention.schedule(4, 1, 4096, 108).splits == 8
    assert attention.schedule(32, 4, 256, 108) == Schedule(16, 32, 4, 2)
    assert attention.schedule(32, 256, 680, 108) == Schedule(64, 32, 8, 1)


@pytest.mark.parametrize("multiprocessors", [16, 108, 132])
def test_schedule_has_no_useless_blocks(multiprocessors: int) -> None:
    for pairs in (1, 32, 500, 3200):
        for period in (1, 2, 16, 17, 256):
            for span in (1, 31, 33, 257, 680, 4096):
                how = attention.schedule(pairs, period, span, multiprocessors)
                assert how.rows in (1, 16, 32, 64)
                assert (how.rows == 1) == (period == 1)
                assert how.rows < 2 * max(16, period)
                assert how.splits == 1 or how.splits * pairs <= multiprocessors
                assert how.splits == 1 or span > how.splits * how.slots


def test_grouping() -> None:
    one, two, three = (torch.zeros(g, 1, 4) for g in (1, 2, 3))
    step_at_2, back = torch.tensor([0, 0, 1, 1], dtype=torch.int32), torch.tensor([0, 1, 0, 1], dtype=torch.int32)
    assert Grouping.of_data(torch.zeros(4, dtype=torch.int32), one) == Grouping("one")
    assert Grouping.of_data(step_at_2, two) == Grouping("step", 2)
    assert Grouping.of_data(torch.ones(4, dtype=torch.int32), two) == Grouping("step", 0)
    assert Grouping.of_data(back, two) == Grouping.of_data(step_at_2, three) == Grouping("table")


# --- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "layer_norm", "l2", "rope"])
def test_decode_step_in_one_launch(kind: str) -> None:
    for head_dim, dtype, groups in ((64, torch.float16, 2), (88, torch.float32, 1), (100, torch.bfloat16, 3)):
        given = step(head_dim, 40, kind, dtype, groups=groups)
        same_step(given, fused(given))


@pytest.mark.parametrize("splits", [2, 4])
@pytest.mark.parametrize("end", [3, 33, 150])
def test_split_decode(monkeypatch: pytest.MonkeyPatch, splits: int, end: int) -> None:
    """Also where most of the blocks of a pair find nothing to read. Two launches: the counters are 0 again."""
    monkeypatch.setattr(attention, "schedule", lambda *shape: Schedule(1, 16, 2, splits))
    given = step(64, 160, end=end)
    for _ in range(2):
        same_step(given, fused(given))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 2])
def test_block_to_codes(monkeypatch: pytest.MonkeyPatch, splits: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(attention, "schedule", lambda *shape: Schedule(16, 64, 4, splits))
    given = step(48, 140, "rope", dtype, period=19, groups=3)
    q, want, *caches = given.reference()
    sums = torch.zeros(len(want), dtype=torch.int32)
    operands = (given.visible_end, given.case.slots, given.layer(), given.positions, given.out_table, sums)
    with device():
        codes = attention.attend_quantize(q, *caches, *operands)
    assert (codes != want).sum() <= 1e-4 * want.numel()
    assert torch.equal(sums, codes.sum(1, dtype=torch.int32))


def test_position_without_a_slot_appends_nothing() -> None:
    given = step(48, 20)
    for position in (-1, 20, 2**33):
        caches = given.caches()
        positions = torch.tensor([position])
        operands = (given.visible_end, 20, given.layer(), positions, given.out_table)
        with device(), kernels.use_backend("triton", strict=True):
            attention.append_attend_quantize(given.qkv, *caches, *operands)
            case = given.case
            tables = case.tables()
            kernels.qkv_append(given.qkv, *caches, positions, *tables, 2, "layer_norm", **case.options)
        assert torch.equal(caches[0], given.k_cache)
        assert torch.equal(caches[1], given.v_cache)


@pytest.mark.parametrize("period", [1, 3])
def test_wrong_indices_stay_inside(period: int) -> None:
    """The emulator stops at an access outside an operand; the results are those of the nearest index."""
    given = step(64, 20, period=period, groups=3)
    q, _, *caches = given.reference()
    k_table, v_table, kv_group = given.case.tables()
    wrong_group, right_group = kv_group.clone(), kv_group.clone()
    wrong_group[:2], right_group[:2] = torch.tensor([-1, 2**30]), torch.tensor([0, 2])
    wrong_end, right_end = given.visible_end.clone(), given.visible_end.clone()
    wrong_end[0], right_end[0] = 10**6, 20
    with device(), kernels.use_backend("triton", strict=True):
        wrong = kernels.attention(q, *caches, wrong_end, 20, k_table, v_table, wrong_group, 0.125)
        right = kernels.attention(q, *caches, right_end, 20, k_table, v_table, right_group, 0.125)
    assert torch.equal(wrong, right)


@compiled
@pytest.mark.parametrize("period", [1, 5])
def test_assembly_and_its_plain_twin(monkeypatch: pytest.MonkeyPatch, period: int) -> None:
    given = step(88, 40, dtype=torch.float32, period=period)
    q, _, *caches = given.reference()
    operands = (q, *caches, given.visible_end, 40, *given.case.tables(), 0.1)
    with device() as emulated:
        assembly = attention.attention(*operands)
        monkeypatch.setattr(support, "interpreted", lambda: True)
        if period > 1:  # the twin of the block kernel has other products, too: see dot_of_pieces
            products = edited(block_attention.dot_of_pieces, "if COMPILED:", "if True:")
            kernel = edited(block_attention.block_attention_kernel, "PIECES", "PIECES", dot_of_pieces=products)
            monkeypatch.setattr(attention, "block_attention_kernel", kernel)
        plain = attention.attention(*operands)
    assert emulated is not None
    first, second = (record.compiled.ptx for record in emulated.records)
    assert "begin inline asm" in first
    assert "xor.b32 t," not in second
    assert torch.equal(assembly, plain)


@compiled
def test_the_order_of_the_blocks_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "schedule", lambda *shape: Schedule(1, 16, 2, 4))
    given = step(64, 160, batch=1)
    want = fused(given)
    for schedule in ("warp_serial", "warp_reverse", "random"):
        for one, other in zip(fused(given, schedule=schedule), want, strict=True):
            assert torch.equal(one, other)


# --- counters and targets ---------------------------------------------------------------------------------------------


@compiled
@pytest.mark.parametrize("span", [128, 257])
def test_the_cache_is_read_once(span: int) -> None:
    """rar_l, many sequences: keys, values, q and the output move once, grids of slots are 2 % of it at most.
    A kernel that should wait for memory must stay below seven instructions per byte."""
    given = step(64, span, "none", batch=1, heads=16)
    q, _, *caches = given.reference()
    out = q.new_empty(1, 16 * 64)
    with gpu.assume(replace(gpu.A100, multiprocessors=1)), device() as emulated:
        layer, output = given.layer(), attention._Output(out)
        attention._start_decode(q, *caches, given.visible_end, span, layer, output)
    assert emulated is not None
    result = emulated.records[0].result
    least = 16 * (2 * 64 * span + 2 * 2 * 64)
    assert least <= distinct_bytes(result) <= 1.02 * least
    assert sector_efficiency(result) >= 0.95
    assert result.thread_insts < 7 * least


@compiled
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_compiles(capability: int) -> None:
    one, many = step(64, 20), step(80, 20, dtype=torch.bfloat16, period=3)
    q = torch.zeros(2, 2, 3, 80, dtype=torch.bfloat16)
    with recorded() as launches, pytest.MonkeyPatch.context() as patch, kernels.use_backend("triton"):
        patch.setattr(attention, "schedule", lambda pairs, period, *rest: Schedule(1 if period == 1 else 16, 16, 2, 2))
        for given in (one, many):
            case = given.case
            kind: Any = case.qk_kind
            tables = case.tables()
            kernels.qkv_append(given.qkv, *given.caches(), given.positions, *tables, 2, kind, **case.options)
        operands = (one.visible_end, 20, one.layer(), one.positions, one.out_table)
        attention.append_attend_quantize(one.qkv, *one.caches(), *operands)
        attention.attention(q, *many.caches(), many.visible_end, 20, *many.case.tables(), 0.1)
    assert len(launches) == 4
    for launched in launches:
        assert f".target sm_{capability}" in compiled_ptx(launched, capability)


# --- planted bugs -----------------------------------------------------------------------------------------------------


@compiled
def test_a_dropped_load_mask_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    given = step(64, 40)
    monkeypatch.setattr(
        attention,
        "decode_kernel",
        edited(decode.decode_kernel, "mask = visible[:, None] & (lanes < PADDED)", "mask = lanes < PADDED"),
    )
    with pytest.raises(MemFault, match="out-of-bounds"):
        fused(given)


@compiled
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("visible = slot_of < last", "visible = slot_of < span"),
        ("visible = visible & (slot_of != slot)", "visible = visible & True"),
        ("lanes < tl.where(mine & exists, PADDED, 0)", "lanes < HEAD_DIM"),
    ],
    ids=["hidden slots", "the slot that is being written", "padding lanes"],
)
def test_a_wrong_mask_is_found(monkeypatch: pytest.MonkeyPatch, right: str, wrong: str) -> None:
    given = step(88, 40, end=30)
    given.visible_end.fill_(33)  # the token's slot is not the last one that it sees
    given.k_cache[:, :, 29], given.v_cache[:, :, 29] = 127, -128
    same_step(given, fused(given))
    if right in decode.append_token.src:
        append = edited(decode.append_token, right, wrong)
        kernel = edited(decode.decode_kernel, "SPLITS", "SPLITS", append_token=append)
    else:
        kernel = edited(decode.decode_kernel, right, wrong)
    monkeypatch.setattr(attention, "decode_kernel", kernel)
    with pytest.raises(AssertionError):
        same_step(given, fused(given))


@compiled
def test_a_dropped_causal_mask_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    given = step(64, 40, period=4)
    q, _, *caches = given.reference()
    operands = (q, *caches, given.visible_end, 40, *given.case.tables(), 0.125)
    with device():
        want = attention.attention(*operands)
        right = "slot_of[None, :] < tl.minimum(ends, last)[:, None]"
        kernel = edited(block_attention.block_attention_kernel, right, "slot_of[None, :] < last + 0 * ends[:, None]")
        monkeypatch.setattr(attention, "block_attention_kernel", kernel)
        got = attention.attention(*operands).view(2, 4, -1)
    assert torch.equal(got[:, 3], want.view(2, 4, -1)[:, 3])  # the last query sees everything
    assert (got[:, :3] != want.view(2, 4, -1)[:, :3]).any(-1).all()


def _codes(given: Step, **options: Any) -> tuple[Tensor, Any]:
    """Codes of a step of one or more positions, and the record of the attention launch."""
    q, _, *caches = given.reference()
    operands = (given.visible_end, given.case.slots, given.layer(), given.positions, given.out_table)
    scratch._COUNTERS.clear()  # a broken kernel leaves counters that are not 0
    with device(**options) as emulated:
        if len(given.positions) == 1:
            codes = attention.append_attend_quantize(given.qkv, *given.caches(), *operands)
        else:
            codes = attention.attend_quantize(q, *caches, *operands)
    assert emulated is not None
    return codes, emulated.records[-1]


@compiled
@pytest.mark.parametrize("period", [1, 19])
def test_a_deleted_barrier_is_found(monkeypatch: pytest.MonkeyPatch, period: int) -> None:
    """All but the pair before the counter of splits, which orders global memory: the emulator does not watch that."""
    how = Schedule(1, 16, 2, 2) if period == 1 else Schedule(32, 64, 4, 2)
    monkeypatch.setattr(attention, "schedule", lambda *shape: how)
    given = step(64, 280, batch=1, heads=1, period=period)
    ptx = _codes(given)[1].compiled.ptx
    before = ptx[: ptx.index("atom.global")]
    unwatched = range(barriers(before[: before.rindex("st.global")]), barriers(before))
    assert len(unwatched) == 2
    for which in range(barriers(ptx)):
        if which not in unwatched:
            with pytest.raises(HazardError, match="race"):
                _codes(given, transform=without_barrier(which))


@compiled
@pytest.mark.parametrize("period", [1, 19])
def test_merging_before_all_have_arrived_is_found(monkeypatch: pytest.MonkeyPatch, period: int) -> None:
    how = Schedule(1, 16, 2, 2) if period == 1 else Schedule(32, 64, 4, 2)
    monkeypatch.setattr(attention, "schedule", lambda *shape: how)
    scratch_memory = attention._scratch

    def spoiled(*shape: Any) -> dict[str, Tensor | None]:
        """Memory in which the sums of an earlier launch do not pass for those of this one."""
        made = scratch_memory(*shape)
        assert made["workspace"] is not None
        made["workspace"].fill_(float("nan"))
        return made

    monkeypatch.setattr(attention, "_scratch", spoiled)
    given = step(64, 160, batch=1, heads=1, period=period)
    want, _ = _codes(given, batch=1)
    last = edited(handover.arrived_last, "last = arrived == parts - 1", "last = arrived == 0")
    last = edited(last, "tl.store(counter, 0)", "pass")  # or the last block would mend it
    merge = edited(softmax.merge_splits, "SPLITS", "SPLITS", arrived_last=last)
    module, name = (decode, "decode_kernel") if period == 1 else (block_attention, "block_attention_kernel")
    kernel = edited(getattr(module, name), "SPLITS", "SPLITS", merge_splits=merge)
    monkeypatch.setattr(attention, name, kernel)
    assert not torch.equal(_codes(given, batch=1)[0], want)


@compiled
def test_a_counter_that_is_left_behind_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "schedule", lambda *shape: Schedule(1, 16, 2, 2))
    given = step(64, 160)
    last = edited(handover.arrived_last, "tl.store(counter, 0)", "pass")
    merge = edited(softmax.merge_splits, "SPLITS", "SPLITS", arrived_last=last)
    monkeypatch.setattr(
        attention, "decode_kernel", edited(decode.decode_kernel, "SPLITS", "SPLITS", merge_splits=merge)
    )
    scratch._COUNTERS.clear()
    same_step(given, fused(given))
    with pytest.raises(AssertionError):
        same_step(given, fused(given))
    scratch._COUNTERS.clear()
