"""``quantize``, ``adaln_quant`` and ``qkv_append`` of the CUDA backend: compiled to PTX for sm_80 and emulated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ptq4arvg_kernels as kernels
from ptq4arvg_kernels.tables import make_table
from tests.kernels.cuda_cases import device, planted
from tests.kernels.kernel_cases import CacheCase, assert_as_good_as, cache_case, exact_heads, generator, random_table
from tests.kernels.ptx_cases import barriers, distinct_bytes, sector_efficiency, without_barrier
from tests.kernels.row_cases import MODEL_WIDTHS, adaln_case, adaln_reference, same_codes
from tests.ptxsim import HazardError, MemFault

HEAD_DIMS = [48, 64, 80, 88, 96, 100, 128]
KINDS = ["none", "layer_norm", "l2", "rope"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def _changed(args: tuple[Any, ...], **changes: Any) -> tuple[Any, ...]:
    """Arguments of adaln_quant with others in their place."""
    names = ("x", "kind", "eps", "weight", "bias", "scale", "shift", "index", "offset", "table", "positions")
    assert changes.keys() <= set(names)
    return tuple(changes.get(name, value) for name, value in zip(names, args, strict=True))


def _run(args: tuple[Any, ...], **options: Any) -> tuple[Tensor, Tensor]:
    with device(**options), kernels.use_backend("cuda", strict=True):
        return kernels.adaln_quant(*args)


def _quantize(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    with device(**options), kernels.use_backend("cuda", strict=True):
        return kernels.quantize(*args)


# --- adaln_quant ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("width", [*MODEL_WIDTHS, 1, 100, 127, 128, 513, 2049, 4097, 8704])
def test_widths(width: int, kind: str) -> None:
    for dtype in DTYPES if width in (1024, 513) else [DTYPES[(width + len(kind)) % 3]]:
        args = _changed(adaln_case(width, dtype), kind=kind)
        same_codes(_run(args), adaln_reference(args))


@pytest.mark.parametrize("affine", ["weight", "bias", "both"])
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_what_is_applied(affine: str, modulated: bool, offset: float) -> None:
    """Every operand has a dtype of its own."""
    gen = generator(1)
    args = _changed(adaln_case(331, torch.float16), offset=offset)
    if affine != "bias":
        args = _changed(args, weight=torch.randn(331, generator=gen).bfloat16())
    if affine != "weight":
        args = _changed(args, bias=torch.randn(331, generator=gen))
    if not modulated:
        args = _changed(args, scale=None, shift=None, index=None)
    same_codes(_run(args), adaln_reference(args))


@pytest.mark.parametrize("shift", [0, 1, 4])
def test_addresses_that_vectors_cannot_be_read_from(shift: int) -> None:
    """Rows that begin anywhere: x behind the beginning of its memory, modulation as columns of a wider matrix."""
    gen = generator(2)
    x = torch.randn(4 * 1024 + shift, generator=gen).half()[shift:].view(4, 1024)
    columns = torch.randn(3, 2048 + 2 * shift, generator=gen)
    args = _changed(
        adaln_case(1024, torch.float16), x=x, scale=columns[:, shift : 1024 + shift], shift=columns[:, -1024:]
    )
    same_codes(_run(args), adaln_reference(args))


def test_modulation_by_row() -> None:
    """No row map: row i for row i."""
    args = adaln_case(768, torch.bfloat16, count=3)
    args = _changed(args, index=None, positions=torch.tensor([4, 0, 7], dtype=torch.int32))
    same_codes(_run(args), adaln_reference(args))


def test_codes_do_not_depend_on_the_batch() -> None:
    args = adaln_case(1408, torch.float16)
    whole = _run(args)[0]
    for i in range(4):
        one = _changed(args, x=args[0][i : i + 1], index=args[7][i : i + 1], positions=args[10][i % 2 : i % 2 + 1])
        assert torch.equal(_run(one)[0][0], whole[i])


def test_a_mean_far_from_zero() -> None:
    """A hundred standard deviations: mean(x^2) - mean(x)^2 would lose the variance's last four digits."""
    args = adaln_case(1920, torch.float32)
    args = _changed(args, x=args[0] + 300)
    same_codes(_run(args), adaln_reference(args))


@pytest.mark.parametrize("schedule", ["warp_serial", "warp_reverse", "random"])
def test_one_warp_at_a_time(schedule: str) -> None:
    for width in (1280, 8704):
        args = adaln_case(width, torch.float16)
        same_codes(_run(args, schedule=schedule), adaln_reference(args))


@pytest.mark.parametrize("width", MODEL_WIDTHS)
def test_one_pass_over_memory(width: int) -> None:
    """x, scale, shift and the codes move once; what a row needs besides is less than 1 % of it."""
    args = adaln_case(width, torch.float16, count=2)
    with device() as emulated, kernels.use_backend("cuda", strict=True):
        kernels.adaln_quant(*args)
    (record,) = emulated.records
    least = 2 * (width * (2 + 2 + 2 + 1) + 4)
    assert least <= record.result.stat["gld_bytes"] + record.result.stat["gst_bytes"] <= 1.01 * least
    assert least <= distinct_bytes(record.result) <= 1.01 * least
    assert sector_efficiency(record.result) >= 0.95
    assert record.result.metrics()["bank_conflict_factor"] == 1.0


# --- quantize ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["none", "silu", "gelu_erf", "gelu_tanh"])
def test_quantize(activation: str) -> None:
    gen = generator(3)
    table = random_table(9, [8, 6], 4, step=0.05)
    for dtype, rows, width, positions in (
        (torch.float16, 4, 1024, [6, 1]),
        (torch.bfloat16, 3, 331, [2]),
        (torch.float32, 2, 4104, [3, 8]),
    ):
        x = (4 * torch.randn(rows, width, generator=gen)).to(dtype)
        args = (x, table, torch.tensor(positions, dtype=torch.int32 if rows == 3 else torch.int64), activation)
        with kernels.use_backend("reference", strict=True):
            want = kernels.quantize(*args)
        same_codes(_quantize(*args), want)


def test_extreme_codes_and_sums() -> None:
    table = random_table(3, [8, 6], 0)
    x = torch.tensor([[3e38], [-3e38]]).repeat(1, 8704)
    for position, (low, high) in enumerate([(-128, 127), (-32, 31)]):
        codes, sums = _quantize(x, table, torch.tensor([position]))
        assert codes[0].unique().tolist() == [high]
        assert codes[1].unique().tolist() == [low]
        assert sums.tolist() == [8704 * high, 8704 * low]


def _check_ties(**options: Any) -> None:
    """Every half from -150 to 150, on grids of even and odd zero points."""
    x = (torch.arange(-150, 150) + 0.5).repeat(2, 1)
    table = make_table(torch.ones(2), torch.tensor([128, 131]), torch.tensor([8, 8]), torch.arange(2))
    codes, _ = _quantize(x, table, torch.arange(2), **options)
    wanted = [torch.clamp(torch.round(x[0]) + zq, -128, 127).to(torch.int8) for zq in (0, 3)]
    assert torch.equal(codes, torch.stack(wanted))


def test_ties_go_to_even_before_the_zero_point() -> None:
    _check_ties()


def test_nan_becomes_the_lowest_code() -> None:
    table = random_table(2, [6], 0)
    for width in (40, 331):
        codes, _ = _quantize(torch.full((1, width), float("nan")), table, torch.tensor([1]))
        assert codes.unique().tolist() == [-32]
    args = adaln_case(64, torch.float32)
    args[0][1, 5] = float("nan")
    assert _run(args)[0][1].unique().tolist() == [-32]


def test_wrong_indices_stay_inside() -> None:
    """The emulator stops at an access outside an operand; the results are those of the nearest index."""
    args = adaln_case(331, torch.float32)
    for position, nearest in ((9, 8), (-1, 0), (2**40, 8), (-(2**63), 0)):
        wrong, right = (_changed(args, positions=torch.tensor([p])) for p in (position, nearest))
        assert torch.equal(_run(wrong)[0], _run(right)[0])
    wrong = _changed(args, index=torch.tensor([3, -1, 1, 2**30], dtype=torch.int32))
    right = _changed(args, index=torch.tensor([2, 0, 1, 2], dtype=torch.int32))
    assert torch.equal(_run(wrong)[0], _run(right)[0])


def test_an_empty_table_is_refused() -> None:
    """There is no row that an index could be clamped to."""
    args = adaln_case(40, torch.float32)
    with pytest.raises(ValueError, match="table has no rows"):
        _quantize(args[0], torch.empty(0, 4), args[10])
    with pytest.raises(ValueError, match="mod_scale has no rows"):
        _run(_changed(args, scale=torch.empty(0, 40), shift=torch.empty(0, 40)))


def test_rows_that_registers_cannot_hold_are_declined() -> None:
    args = adaln_case(12288, torch.float16, count=2)
    same_codes(_run(args), adaln_reference(args))
    with pytest.raises(kernels.BackendError, match="12288 columns"):
        _run(adaln_case(12289, torch.float16, count=2))


# --- qkv_append -------------------------------------------------------------------------------------------------------


def _append(case: CacheCase, qkv: Tensor, positions: Tensor, backend: str, **options: Any) -> tuple[Tensor, ...]:
    caches = case.caches()
    with device(**options), kernels.use_backend(backend, strict=True):
        q = kernels.qkv_append(qkv, *caches, positions, *case.tables(), case.heads, case.qk_kind, **case.options)
    return q, *caches


def _same_cache(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    _, k, v = got
    wrong = k.int() - want[1].int()
    assert (wrong != 0).sum() <= 1e-4 * wrong.numel()
    assert wrong.abs().max() <= 1
    assert torch.equal(v, want[2])  # never transformed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, 2, 6, 130, 250, 256])
def test_heads(head_dim: int, kind: str) -> None:
    case = cache_case(2, 3, head_dim, 7, kind, seed=head_dim)
    positions = torch.tensor([5, 0, 2], dtype=torch.int64 if head_dim % 3 else torch.int32)
    for dtype in DTYPES if head_dim in (64, 100) else [DTYPES[(head_dim // 2 + len(kind)) % 3]]:
        qkv = (1.5 * torch.randn(2 * 3, 3 * 3 * head_dim, generator=generator(head_dim))).to(dtype)
        got, want = (_append(case, qkv, positions, backend) for backend in ("cuda", "reference"))
        _same_cache(got, want)
        assert_as_good_as(got[0], exact_heads(case, qkv, positions.tolist())[0], want[0])


def test_options_have_dtypes_of_their_own() -> None:
    qkv = torch.randn(2, 3 * 2 * 96, generator=generator(9)).half()
    for kind in KINDS:
        case = cache_case(1, 2, 96, 4, kind)
        dtypes = iter([torch.bfloat16, torch.float16, torch.float32, torch.bfloat16])
        for name, value in case.options.items():
            if isinstance(value, Tensor):
                case.options[name] = value.to(next(dtypes))
        got, want = (_append(case, qkv, torch.tensor([2, 1]), backend) for backend in ("cuda", "reference"))
        _same_cache(got, want)
        assert_as_good_as(got[0], exact_heads(case, qkv, [2, 1])[0], want[0])


def test_a_cache_that_is_a_slice() -> None:
    """Batch and head strides are the caller's."""
    case = cache_case(2, 3, 64, 5)
    qkv = torch.randn(2, 3 * 3 * 64, generator=generator(5)).half()
    whole = [torch.full((4, 6, 5, 64), 99, dtype=torch.int8) for _ in range(2)]
    with device(), kernels.use_backend("cuda", strict=True):
        kernels.qkv_append(qkv, *(c[1:3, 2:5] for c in whole), torch.tensor([4]), *case.tables(), 3, "none")
    want = _append(case, qkv, torch.tensor([4]), "reference")
    for got, wanted in zip(whole, want[1:], strict=True):
        assert torch.equal(got[1:3, 2:5], wanted)
        got[1:3, 2:5] = 99
        assert (got == 99).all()


def test_a_position_without_a_slot_writes_nothing() -> None:
    case = cache_case(1, 2, 48, 4, "rope")
    qkv = torch.randn(3, 3 * 2 * 48, generator=generator(6))
    for position in (4, -1, 2**33):
        got = _append(case, qkv, torch.tensor([0, position, 3]), "cuda")
        want = _append(case, qkv[[0, 2]], torch.tensor([0, 3]), "reference")
        assert torch.equal(got[1], want[1])
        assert torch.equal(got[2], want[2])


def test_wrong_groups_stay_inside() -> None:
    case = cache_case(1, 2, 64, 4)
    qkv = torch.randn(1, 3 * 2 * 64, generator=generator(7))
    results = []
    for group in (2**30, 1, -5, 0):
        case.kv_group[2] = group
        results.append(_append(case, qkv, torch.tensor([2]), "cuda"))
    for wrong, right in ((0, 1), (2, 3)):
        assert torch.equal(results[wrong][1], results[right][1])
        assert torch.equal(results[wrong][2], results[right][2])


# --- planted bugs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("numbers.cuh", "i < count ? static_cast<const uint32_t*>(p)[i] : 0", "static_cast<const uint32_t*>(p)[i]"),
        ("octets.cuh", "if (i < count) p[i] =", "p[i] ="),
    ],
)
def test_a_dropped_mask_is_found(tmp_path: Path, file: str, old: str, new: str) -> None:
    args = adaln_case(331, torch.float32)
    with pytest.raises(MemFault, match="out-of-bounds"):
        _run(args, transform=planted(tmp_path, "rows.cu", (file, old, new)))


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("norm.cuh", "c[i] = i < count[n] ? c[i] : 0.0f", "c[i] = c[i]"),  # squares of columns that do not exist
        ("norm.cuh", "static_cast<float>(columns) * (distance * distance)", "0.0f"),  # segments not moved to the mean
        ("octets.cuh", "mask = count > 0 ? (uint64_t{1} << 8 * count) - 1 : 0", "mask = ~uint64_t{0}"),  # row sums
        ("norm.cuh", "norm.offset + v[i]", "v[i]"),
        ("rows.cu", "p.table + clamp_index(position.value(), p.grids.length)", "p.table"),
    ],
)
def test_a_wrong_formula_is_found(tmp_path: Path, file: str, old: str, new: str) -> None:
    args = adaln_case(331, torch.float16)
    with pytest.raises(AssertionError):
        same_codes(_run(args, transform=planted(tmp_path, "rows.cu", (file, old, new))), adaln_reference(args))


def test_a_zero_point_added_before_rounding_is_found(tmp_path: Path) -> None:
    old = "__fadd_rn(__fadd_rn(__fmul_rn(x, recip), SHIFT), zq)"
    edit = planted(tmp_path, "rows.cu", ("numbers.cuh", old, "__fadd_rn(__fmul_rn(x, recip), SHIFT + zq)"))
    with pytest.raises(AssertionError):
        _check_ties(transform=edit)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("qkv_append.cu", "if (position != slot) return;", ""),
        ("heads.cuh", "head_rotate(k, turn);", "head_rotate(k, turn), head_rotate(k, turn);"),
        ("qkv_append.cu", "k_grid, k, first", "v_grid, k, first"),
        ("qkv_append.cu", "store_code_octet(cached + first, lanes - first", "store_code_octet(cached + first, count"),
    ],
)
def test_a_wrong_append_is_found(tmp_path: Path, file: str, old: str, new: str) -> None:
    case = cache_case(1, 2, 88, 4, "rope")
    qkv = torch.randn(3, 3 * 2 * 88, generator=generator(8))
    edit = planted(tmp_path, "qkv_append.cu", (file, old, new))
    got = _append(case, qkv, torch.tensor([1, 9, 2]), "cuda", transform=edit)
    want = _append(case, qkv[[0, 2]], torch.tensor([1, 2]), "reference")
    with pytest.raises(AssertionError):
        _same_cache((got[0][:, :, [0, 2]], *got[1:]), want)


def test_a_deleted_barrier_is_found() -> None:
    """Every one of them."""
    args = adaln_case(1280, torch.float16)
    for which in range(2):
        with pytest.raises(HazardError, match="race"):
            _run(args, transform=_only("adaln_quant_1", without_barrier(which)))


def _only(kernel: str, edit: Callable[[str], str]) -> Callable[[str], str]:
    """An editor of PTX restricted to one kernel."""

    def restricted(ptx: str) -> str:
        begin = ptx.index(f".entry {kernel}(")
        end = ptx.find(".entry ", begin + 1)
        end = len(ptx) if end < 0 else end
        assert barriers(ptx[begin:end]) == 2
        return ptx[:begin] + edit(ptx[begin:end]) + ptx[end:]

    return restricted
