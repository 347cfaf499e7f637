"""Attention of the CUDA backend, emulated: plans, splits, the fused decode step, codes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ptq4arvg_kernels as kernels
from ptq4arvg_kernels.backends import scratch
from ptq4arvg_kernels.backends.cuda import attention, native
from ptq4arvg_kernels.backends.cuda.attention import Schedule
from ptq4arvg_kernels.backends.heads import Grouping
from ptq4arvg_kernels.tables import make_kv_table
from tests.kernels import cuda_cases
from tests.kernels.attention_cases import Step, attention64, same_step, step
from tests.kernels.cuda_cases import device, planted
from tests.kernels.kernel_cases import assert_as_good_as, generator
from tests.kernels.ptx_cases import barriers, distinct_bytes, sector_efficiency, without_barrier
from tests.ptxsim import HazardError, MemFault
from tests.ptxsim.cuda_sources import kernel_names, only, source_ptx

pytestmark = pytest.mark.skipif(not cuda_cases.available(), reason=cuda_cases.NO_NVCC)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HEAD_DIMS = [48, 64, 80, 88, 96, 100, 128]
KINDS = ["none", "layer_norm", "l2", "rope"]
A100 = (80, 108, 163 * 1024)
RTX3090 = (86, 82, 99 * 1024)


def planned(monkeypatch: pytest.MonkeyPatch, warps: int, splits: int) -> None:
    """Every launch has so many warps per block, and blocks per tile of queries."""
    monkeypatch.setattr(attention, "schedule", lambda *shape: Schedule("", 0, warps, splits))


def fused(given: Step, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, their sums, and the caches afterwards."""
    caches, sums = given.caches(), torch.zeros(len(given.qkv), dtype=torch.int32)
    operands = (given.visible_end, given.case.slots, given.layer(), given.positions, given.out_table, sums)
    with device(**options):
        codes = attention.append_attend_quantize(given.qkv, *caches, *operands)
    return codes, sums, *caches


def floats(given: Step, ends: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """The operator's result, q and the caches."""
    q, _, *caches = given.reference()
    seen = given.visible_end if ends is None else ends
    with device(**options), kernels.use_backend("cuda", strict=True):
        out = kernels.attention(q, *caches, seen, given.case.slots, *given.case.tables(), given.scale)
    return out, q, (caches[0], caches[1])


def good(given: Step, ends: Tensor | None = None, **options: Any) -> None:
    """At most twice as far from float64 as torch's float32, plus one unit in the last place."""
    out, q, caches = floats(given, ends, **options)
    seen = (given.visible_end if ends is None else ends).tolist()
    exact, baseline = attention64(q, caches, given.case, seen, given.scale)
    assert_as_good_as(out, exact, baseline)


# --- plans ------------------------------------------------------------------------------------------------------------


def test_plans_fill_the_device() -> None:
    """rar_l: 16 heads of 64; one, eight and a hundred images with guidance."""
    assert attention.schedule(2 * 16, 1, 257, 64, A100) == Schedule("decode_d64", 4, 8, 1)
    assert attention.schedule(16 * 16, 1, 257, 64, A100) == Schedule("decode_d64", 4, 4, 1)
    assert attention.schedule(200 * 16, 1, 257, 64, A100) == Schedule("decode_d64", 4, 2, 1)
    assert attention.schedule(4, 1, 4096, 64, A100) == Schedule("decode_d64", 4, 8, 8)
    assert attention.schedule(2 * 16, 256, 680, 64, A100) == Schedule("block_attention_d64", 16, 4, 1)
    assert attention.schedule(4, 256, 680, 64, A100) == Schedule("block_attention_d64", 16, 4, 1)
    assert attention.schedule(4, 16, 680, 64, A100) == Schedule("block_attention_d64", 16, 4, 2)


@pytest.mark.parametrize("gpu", [A100, RTX3090, (120, 170, 99 * 1024)])
def test_plans_are_possible(gpu: tuple[int, int, int]) -> None:
    for pairs in (1, 32, 500, 3200):
        for period in (1, 2, 4, 5, 16, 17, 256):
            for span in (1, 31, 33, 257, 680, 4096):
                for lanes in (16, 48, 64, 80, 96, 112, 128, 144, 256):
                    how = attention.schedule(pairs, period, span, lanes, gpu)
                    blocks = pairs * -(-period // how.queries)
                    chunks = next(c for c in (3, 4, 5, 6, 7, 8, 16) if 16 * c >= lanes)
                    assert how.kernel == f"{'decode' if period <= 4 else 'block_attention'}_d{16 * chunks}"
                    assert how.splits == 1 or how.splits * blocks <= gpu[1]
                    assert how.warps * how.splits < 2 * -(-span // 16)
                    ring = (2 if chunks == 16 else 3) * 512 * chunks
                    assert how.warps == 1 or how.warps * ring < gpu[2]


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((1, 1, 0, 64), "span is 0"),
        ((1, 1, 8, 272), "272 bytes"),
        ((1, 1, 8, 72), "72 bytes"),
        ((2**31, 1, 8, 64), "split the batch"),
        ((1, 2**21, 8, 64), "split the batch"),
    ],
)
def test_sizes_that_are_not_possible(sizes: tuple[int, int, int, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        attention.schedule(*sizes, A100)


def test_caches_at_odd_addresses_are_refused() -> None:
    given = step(64, 20)
    k_cache = torch.zeros(given.k_cache.numel() + 8, dtype=torch.int8)[8:].view(given.k_cache.shape)
    operands = (given.visible_end, 20, given.layer(), given.positions, given.out_table)
    with device(), pytest.raises(ValueError, match="multiple of 16"):
        attention.append_attend_quantize(given.qkv, k_cache, given.v_cache.clone(), *operands)


def test_grouping() -> None:
    one, two, three = (torch.zeros(g, 1, 4) for g in (1, 2, 3))
    step_at_2, back = torch.tensor([0, 0, 1, 1], dtype=torch.int32), torch.tensor([0, 1, 0, 1], dtype=torch.int32)
    assert Grouping.of_data(torch.zeros(4, dtype=torch.int32), one) == Grouping("one")
    assert Grouping.of_data(step_at_2, two) == Grouping("step", 2)
    assert Grouping.of_data(torch.ones(4, dtype=torch.int32), two) == Grouping("step", 0)
    assert Grouping.of_data(back, two) == Grouping.of_data(step_at_2, three) == Grouping("table")


# --- the fused decode step --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_decode_step_in_one_launch(head_dim: int, kind: str) -> None:
    i = HEAD_DIMS.index(head_dim) + KINDS.index(kind)
    given = step(head_dim, 40, kind, DTYPES[i % 3], groups=1 + (i // 2) % 3)
    same_step(given, fused(given))


@pytest.mark.parametrize("head_dim", [2, 30, 130, 256])
def test_other_head_dims(head_dim: int) -> None:
    given = step(head_dim, 37, "rope", DTYPES[head_dim % 3], groups=2)
    same_step(given, fused(given))


def test_options_have_dtypes_of_their_own() -> None:
    for kind in KINDS[1:]:
        given = step(96, 24, kind)
        dtypes = iter([torch.bfloat16, torch.float16, torch.float32, torch.bfloat16])
        for name, value in given.case.options.items():
            if isinstance(value, Tensor):
                given.case.options[name] = value.to(next(dtypes))
        same_step(given, fused(given))


def test_a_norm_without_affine_vectors() -> None:
    given = step(64, 24)
    given.case.options.update(q_weight=None, k_bias=None)
    same_step(given, fused(given))


@pytest.mark.parametrize("splits", [2, 4])
@pytest.mark.parametrize("end", [1, 3, 33, 150])
def test_split_decode(monkeypatch: pytest.MonkeyPatch, splits: int, end: int) -> None:
    """Also where most of the blocks of a pair find nothing to read. Two launches: the counters are 0 again."""
    planned(monkeypatch, 2, splits)
    given = step(64, 160, end=end)
    for _ in range(2):
        same_step(given, fused(given))


@pytest.mark.parametrize("warps", [1, 2, 4, 8])
def test_every_number_of_warps(monkeypatch: pytest.MonkeyPatch, warps: int) -> None:
    planned(monkeypatch, warps, 1)
    for slots in (1, 16, 17, 203):
        given = step(80, slots, "rope", torch.bfloat16)
        same_step(given, fused(given))


@pytest.mark.parametrize(
    "schedule", ["warp_serial", *(pytest.param(name, marks=pytest.mark.slow) for name in ("warp_reverse", "random"))]
)
def test_one_warp_at_a_time(monkeypatch: pytest.MonkeyPatch, schedule: str) -> None:
    planned(monkeypatch, 4, 2)
    given = step(88, 170, groups=3)
    same_step(given, fused(given, schedule=schedule))
    given = step(48, 140, "none", period=9)
    good(given, schedule=schedule)


def test_the_order_of_the_blocks_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    planned(monkeypatch, 2, 4)
    given = step(64, 160, batch=1)
    want = fused(given)
    for schedule in ("warp_serial", "warp_reverse", "random"):
        for one, other in zip(fused(given, schedule=schedule), want, strict=True):
            assert torch.equal(one, other)


def test_a_step_and_a_table_that_says_the_same() -> None:
    given = step(64, 60)
    given.case.kv_group[:] = (torch.arange(60) >= 21).int()
    by_step = fused(given)
    same_step(given, by_step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Grouping, "of_data", staticmethod(lambda *data: Grouping("table")))
        by_table = fused(given)
    for one, other in zip(by_step, by_table, strict=True):
        assert torch.equal(one, other)


def test_a_cache_that_is_a_slice() -> None:
    """Batch and head strides are the caller's."""
    given = step(64, 20)
    _, want, *caches = given.reference()
    whole = [torch.full((4, 5, 20, 64), 99, dtype=torch.int8) for _ in range(2)]
    for part, cache in zip(whole, given.caches(), strict=True):
        part[1:3, 2:4] = cache
    operands = (given.visible_end, 20, given.layer(), given.positions, given.out_table)
    with device():
        codes = attention.append_attend_quantize(given.qkv, *(part[1:3, 2:4] for part in whole), *operands)
    assert torch.equal(codes, want)
    for part, cache in zip(whole, caches, strict=True):
        assert torch.equal(part[1:3, 2:4], cache)
        part[1:3, 2:4] = 99
        assert (part == 99).all()


def test_a_position_without_a_slot_appends_nothing() -> None:
    given = step(48, 20)
    for position in (-1, 20, 2**33):
        caches = given.caches()
        operands = (given.visible_end, 20, given.layer(), torch.tensor([position]), given.out_table)
        with device():
            attention.append_attend_quantize(given.qkv, *caches, *operands)
        assert torch.equal(caches[0], given.k_cache)
        assert torch.equal(caches[1], given.v_cache)


def test_a_token_that_its_query_does_not_see() -> None:
    """It is written all the same."""
    given = step(64, 40)
    given.visible_end[0] = 20
    same_step(given, fused(given))


# --- floats -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, 2, 30, 130, 256])
def test_floats(head_dim: int) -> None:
    """One query, a few, and more than one tile of them."""
    for i, (period, slots) in enumerate(((1, 150), (3, 33), (19, 140))):
        given = step(head_dim, slots, "none", DTYPES[(head_dim // 2 + i) % 3], period=period, groups=1 + i)
        good(given)


@pytest.mark.parametrize("period", [1, 6])
def test_float32(period: int) -> None:
    for head_dim in (64, 100):
        good(step(head_dim, 300, "layer_norm", torch.float32, period=period))


@pytest.mark.parametrize("period", [1, 5])
@pytest.mark.parametrize("factor", [1e-30, 1e-3, 30.0, 1e4])
def test_queries_of_any_size(period: int, factor: float) -> None:
    """Far beyond what a half can hold, too."""
    for dtype in (torch.float32, torch.bfloat16):
        given = step(64, 60, "none", dtype, period=period)
        given.qkv *= factor
        good(given)


@pytest.mark.parametrize("period", [1, 5])
def test_steps_of_any_size(period: int) -> None:
    """Sums are kept in units of the largest step so far: it grows, and shrinks, from tile to tile."""
    for exponents in ([-20.0, 0.0, -3.0, 9.0], [30.0, 20.0, 33.0, -60.0]):
        given = step(64, 64, "none", torch.float32, period=period, groups=4, heads=1)
        delta = torch.tensor(exponents).exp2()[:, None] * 1.3
        given.case.v_table = make_kv_table(delta, torch.tensor([[100], [200], [3], [128]]))
        given.case.kv_group[:] = torch.arange(64) // 16
        good(given)
        given.case.kv_group[:] = torch.arange(64) % 4
        good(given)


@pytest.mark.parametrize("period", [1, 5])
def test_a_top_that_grows_all_the_time(period: int) -> None:
    given = step(64, 256, "none", torch.float32, period=period, batch=1)
    given.k_cache[:] = (torch.arange(256) // 2 - 64).to(torch.int8)[None, None, :, None]
    given.qkv[:] = given.qkv.abs()
    good(given)


def test_every_query_sees_what_it_may() -> None:
    """Ends in any order, inside and between tiles."""
    given = step(80, 100, "none", torch.float32, period=23)
    ends = torch.randint(1, 101, (23,), generator=generator(1)).to(torch.int32)
    ends[:4] = torch.tensor([1, 16, 17, 100])
    good(given, ends)


@pytest.mark.parametrize("splits", [2, 8])
def test_split_blocks(monkeypatch: pytest.MonkeyPatch, splits: int) -> None:
    planned(monkeypatch, 2, splits)
    given = step(64, 140, "none", torch.float32, period=19, groups=3)
    for _ in range(2):
        good(given)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 2])
def test_block_to_codes(monkeypatch: pytest.MonkeyPatch, splits: int, dtype: torch.dtype) -> None:
    planned(monkeypatch, 4, splits)
    given = step(48, 140, "rope", dtype, period=19, groups=3)
    q, want, *caches = given.reference()
    sums = torch.zeros(len(want), dtype=torch.int32)
    operands = (given.visible_end, given.case.slots, given.layer(), given.positions, given.out_table, sums)
    with device():
        codes = attention.attend_quantize(q, *caches, *operands)
    assert (codes != want).sum() <= 1e-4 * want.numel()
    assert torch.equal(sums, codes.sum(1, dtype=torch.int32))


@pytest.mark.parametrize("period", [1, 3, 5])
def test_wrong_indices_stay_inside(period: int) -> None:
    """The emulator stops at an access outside an operand; the results are those of the nearest index."""
    given = step(64, 20, period=period, groups=3)
    q, _, *caches = given.reference()
    k_table, v_table, kv_group = given.case.tables()
    wrong_group, right_group = kv_group.clone(), kv_group.clone()
    wrong_group[:2], right_group[:2] = torch.tensor([-1, 2**30]), torch.tensor([0, 2])
    wrong_end, right_end = given.visible_end.clone(), given.visible_end.clone()
    wrong_end[0], right_end[0] = 10**6, 20
    wrong_end[-1], right_end[-1] = (-5, 1) if period > 1 else (wrong_end[-1], right_end[-1])
    with device(), kernels.use_backend("cuda", strict=True):
        wrong = kernels.attention(q, *caches, wrong_end, 20, k_table, v_table, wrong_group, 0.125)
        right = kernels.attention(q, *caches, right_end, 20, k_table, v_table, right_group, 0.125)
    assert torch.equal(wrong, right)


def test_nan_becomes_the_lowest_code() -> None:
    given = step(64, 20, "none", torch.float32)
    given.qkv[0, :64] = float("nan")
    codes, *_ = fused(given)
    low = -128 if given.out_table[int(given.positions[0]), 3] == 8 else -32
    assert codes[0, :64].unique().tolist() == [low]
    assert (codes[0, 64:] != low).any()


# --- counters and targets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("head_dim", "span"), [(64, 257), (80, 128), (88, 257)])
def test_operands_are_read_once(kind: str, head_dim: int, span: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block asks for its keys, values, query and vectors once. The plan is that of many sequences."""
    heads, lanes = 2, -(-head_dim // 16) * 16
    given = step(head_dim, span, kind, batch=1, heads=heads)
    how = attention.schedule(200 * 16, 1, span, lanes, A100)
    planned(monkeypatch, how.warps, how.splits)
    operands = (given.visible_end, span, given.layer(), given.positions, given.out_table)
    with device() as emulated:
        attention.append_attend_quantize(given.qkv, *given.caches(), *operands)
    (record,) = emulated.records
    assert record.name == how.kernel
    vectors = {"none": 0, "layer_norm": 4 * head_dim * 4, "l2": 4, "rope": head_dim * 4}[kind]
    cache = 2 * lanes * (span - 1) + 2 * lanes  # older slots are read, the new one is written
    least = heads * (cache + 3 * head_dim * 2 + head_dim + vectors)
    asked = distinct_bytes(record.result)
    assert least <= asked <= 1.01 * least
    copied = [count for (_, text), count in record.result.lines.items() if text.startswith("cp.async.cg")]
    assert sum(size for _, size, *_ in copied) == heads * 2 * lanes * (span - 1)
    if kind == "none":  # float32 vectors are read in two pieces of a sector
        assert sector_efficiency(record.result) >= 0.95
    assert record.result.metrics()["ldmatrix_bank_conflict_factor"] == 1.0
    assert record.result.metrics()["cpasync_bank_conflict_factor"] == 1.0


@pytest.mark.parametrize("head_dim", [48, 64, 80, 96, 112, 128, 256])
def test_shared_memory_without_bank_conflicts(head_dim: int) -> None:
    """ldmatrix and the copies that feed it, for every order of chunks."""
    given = step(head_dim, 64, "none", batch=1, heads=1)
    with device() as emulated:
        attention._start(
            *given.reference()[:1],
            *given.caches(),
            given.visible_end,
            64,
            given.layer(),
            given.qkv.new_empty(1, head_dim),
        )
    metrics = emulated.records[0].result.metrics()
    assert metrics["ldmatrix_bank_conflict_factor"] == 1.0
    assert metrics["cpasync_bank_conflict_factor"] == 1.0


def test_instructions_per_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that should wait for memory has few instructions: at most four per byte of the cache, from PTX."""
    counts = []
    for span in (256, 512):
        given = step(64, span, "none", batch=1, heads=1)
        planned(monkeypatch, 2, 1)
        operands = (given.visible_end, span, given.layer(), given.positions, given.out_table)
        with device() as emulated:
            attention.append_attend_quantize(given.qkv, *given.caches(), *operands)
        counts.append(emulated.records[0].result.thread_insts)
    assert (counts[1] - counts[0]) / (256 * 2 * 64) < 4


# --- planted bugs -----------------------------------------------------------------------------------------------------

# The addition to the counter of a tile of queries.
COUNTER = re.compile(r"atom\.global\.add\.u32\s+%r\d+, \[%rd\d+\], 1;")
# Only heads of 64 are compiled again.
ONE_CLASS = (
    "attention_tile.h",
    "DO(0, 48) DO(1, 64) DO(2, 80) DO(3, 96) DO(4, 112) DO(5, 128) DO(6, 256)",
    "DO(1, 64)",
)


def _counter(ptx: str) -> int:
    (found,) = COUNTER.finditer(ptx)
    return found.start()


def bug(folder: Path, source: str, file: str, old: str, new: str) -> Callable[[str], str]:
    return planted(folder, source, ONE_CLASS, (file, old, new))


def _planted(name: str, file: str, old: str, new: str, slow: bool = True) -> Any:
    return pytest.param(file, old, new, id=name, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        _planted("hidden slots", "attention.cuh", "start + g + 8 * h >= end[n]", "false", slow=False),
        _planted("no new token", "attention.cuh", "start == fresh_tile", "false", slow=False),
        _planted(
            "swapped fragments",
            "attention.cuh",
            "a[1] = even_codes(word[1], zero[1]);\n    a[2] = odd",
            "a[2] = even_codes(word[1], zero[1]);\n    a[1] = odd",
            slow=False,
        ),
        _planted("zero points of values", "attention.cuh", "v_zq, 2 * t + 1 + 8 * h)", "v_zq, 2 * t + 8 * h)"),
        _planted("sums not scaled to a new top", "attention.cuh", "scale_sums(n, fade);", ""),
        _planted("columns not written", "attention_merge.cuh", "store_code_octet(s", "if (octet) store_code_octet(s"),
        _planted("output not rounded", "attention_merge.cuh", "widen(narrow(p.dtype, y), p.dtype, y);", ""),
        _planted("query not rounded", "attention_queries.cuh", "widen(narrow(p.dtype, q), p.dtype, q);", ""),
        _planted("half a key", "attention_queries.cuh", "has_slot && OCTET * octet < p.lanes", "has_slot && octet"),
    ],
)
def test_a_wrong_kernel_is_found(tmp_path: Path, file: str, old: str, new: str) -> None:
    given = step(64, 300, "layer_norm", torch.bfloat16, end=295, heads=8)
    given.k_cache[:, :, 294:], given.v_cache[:, :, 294:] = 127, -128
    given.case.kv_group[:] = (torch.arange(300) >= 5).int()
    edit = bug(tmp_path, "decode.cu", file, old, new)
    with pytest.raises(AssertionError):
        same_step(given, fused(given, transform=edit))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("wait_copies<STAGES - 1>()", "wait_copies<STAGES>()"),
        pytest.param("wait_copies<STAGES - 1>()", "", marks=pytest.mark.slow),
    ],
    ids=["one group too few", "none"],
)
def test_a_wrong_wait_count_is_found(tmp_path: Path, old: str, new: str) -> None:
    given = step(64, 200)
    edit = bug(tmp_path, "decode.cu", "attention.cuh", old, new)
    with pytest.raises(HazardError, match=r"cp\.async"):
        fused(given, transform=edit)


def test_a_tail_that_is_not_masked_is_found(tmp_path: Path) -> None:
    """The emulator sees reads behind the cache."""
    given = step(64, 40)
    edit = bug(tmp_path, "decode.cu", "attention.cuh", "row < last && row != skip;", "row != skip;")
    with pytest.raises(MemFault, match="out-of-bounds"):
        fused(given, transform=edit)


def test_a_dropped_causal_mask_is_found(tmp_path: Path) -> None:
    given = step(64, 40, "none", torch.float32, period=5)
    want = floats(given)[0].view(2, 5, -1)
    old = "start + g + 8 * h >= end[n]"
    edit = bug(tmp_path, "block_attention.cu", "attention.cuh", old, "start + g + 8 * h >= last")
    got = floats(given, transform=edit)[0].view(2, 5, -1)
    assert torch.equal(got[:, 4], want[:, 4])  # the last query sees everything
    assert (got[:, :4] != want[:, :4]).any(-1).all()


def test_probabilities_of_one_half_are_found(tmp_path: Path) -> None:
    """Eleven bits would be within the tolerance for halves, but not the codes."""
    given = step(64, 200, "none", torch.float32, period=5)
    good(given)
    edit = bug(tmp_path, "block_attention.cu", "attention.cuh", "narrow_f16(high, y - high)", "narrow_f16(high, 0.0f)")
    with pytest.raises(AssertionError):
        good(given, transform=edit)


@pytest.mark.parametrize("source", ["decode", "block_attention"])
def test_a_deleted_barrier_is_found(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    """All but those around the counter of splits, which order global memory: the emulator does not watch that."""
    planned(monkeypatch, 2, 2)
    given = step(64, 280, batch=1, heads=1, period=1 if source == "decode" else 9)
    name = f"{source}_d64"
    ptx = only(source_ptx(name), name)
    before = barriers(ptx[: _counter(ptx)])
    assert barriers(ptx) == before + 1

    def run(**options: Any) -> None:
        scratch._COUNTERS.clear()  # a broken kernel leaves counters that are not 0
        if source == "decode":
            fused(given, **options)
        else:
            floats(given, **options)

    run()
    for which in range(before - 1):
        with pytest.raises(HazardError, match=r"race|uninit"):
            run(transform=_restricted(name, without_barrier(which)))
    with pytest.raises(HazardError, match=r"race|uninit"):
        run(transform=_restricted(name, without_barrier(before)))
    scratch._COUNTERS.clear()


def _restricted(name: str, edit: Callable[[str], str]) -> Callable[[str], str]:
    """An editor of a file's PTX that sees one kernel of it."""
    return lambda ptx: edit(only(ptx, name))


@pytest.mark.parametrize("period", [1, 9])
def test_merging_before_all_have_arrived_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, period: int) -> None:
    planned(monkeypatch, 2, 2)
    make = attention._scratch

    def spoiled(*shape: Any) -> tuple[Tensor | None, Tensor | None]:
        """Memory in which the sums of an earlier launch do not pass for those of this one."""
        workspace, counts = make(*shape)
        assert workspace is not None
        return workspace.fill_(float("nan")), counts

    monkeypatch.setattr(attention, "_scratch", spoiled)
    given = step(64, 160, "none", batch=1, heads=1, period=period)
    good(given, batch=1)
    source = "decode.cu" if period == 1 else "block_attention.cu"
    edit = planted(
        tmp_path,
        source,
        ONE_CLASS,
        ("handover.cuh", "const bool last = arrived == blocks - 1;", "const bool last = arrived == 0;"),
        ("handover.cuh", "if (last) *counter = 0;", ""),  # or the last block would mend it
    )
    scratch._COUNTERS.clear()
    with pytest.raises(AssertionError):
        good(given, batch=1, transform=edit)
    scratch._COUNTERS.clear()


def test_a_counter_that_is_left_behind_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    planned(monkeypatch, 2, 2)
    given = step(64, 160)
    edit = bug(tmp_path, "decode.cu", "handover.cuh", "if (last) *counter = 0;", "")
    scratch._COUNTERS.clear()
    same_step(given, fused(given, transform=edit))
    with pytest.raises(AssertionError):
        same_step(given, fused(given, transform=edit))
    scratch._COUNTERS.clear()


def test_handing_over_in_the_right_order() -> None:
    """Inspected, not executed: the emulator's memory is sequentially consistent. Partial results are stored, then come
    a fence, a barrier, the counter, a fence, a barrier, and the loads, which bypass the first-level cache."""
    for name in ("decode_d64", "block_attention_d64"):
        ptx = only(source_ptx(name), name)
        counter = _counter(ptx)
        order = [
            ptx.rindex("st.global", 0, counter),
            ptx.rindex("membar.gl", 0, counter),
            ptx.rindex("bar.sync", 0, counter),
            counter,
            ptx.index("membar.gl", counter),
            ptx.index("bar.sync", counter),
            ptx.index("ld.global.cg", counter),
        ]
        assert order == sorted(order)
        assert "ld.global.cg" not in ptx[:counter]
        loads = re.findall(r"ld\.global\S*", ptx[counter:])
        assert all(".cg." in load for load in loads), loads


def test_every_kernel_is_named() -> None:
    """What plans choose from is what the sources have."""
    module = native.module()
    chosen = {module.plan_attention(1, period, 1, 16 * chunks, A100)[0] for period in (1, 5) for chunks in range(1, 17)}
    assert chosen == {name for name in kernel_names() if name.startswith(("decode_", "block_attention_"))}
