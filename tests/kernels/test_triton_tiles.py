"""The Triton backend's choice of tiles, its order of weights and the cache of it: no kernel runs here."""

from __future__ import annotations

import gc
import json
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.shapes import layer_shapes
from ptq4arvg_kernels.backends import gpu
from ptq4arvg_kernels.backends.gpu import Device
from ptq4arvg_kernels.backends.gpu_weights import padded
from ptq4arvg_kernels.backends.triton import tiles, weights
from ptq4arvg_kernels.backends.triton.tiles import Plan, Tile, plan
from ptq4arvg_kernels.packing import pack
from tests.kernels.kernel_cases import generator

A100 = gpu.A100
DEVICES = [
    A100,
    Device(86, 82, gpu.SHARED_BYTES[86], "RTX 3090"),
    Device(89, 58, gpu.SHARED_BYTES[89], "L4"),
    Device(90, 132, gpu.SHARED_BYTES[90], "H100"),
    Device(100, 148, gpu.SHARED_BYTES[100], "B200"),
    Device(120, 170, gpu.SHARED_BYTES[120], "RTX 5090"),
    Device(110, 20, 101376, "unknown to the table"),
]


def _codes(out_features: int, in_features: int, bits: int, seed: int = 0) -> torch.Tensor:
    top = 2 ** (bits - 1) - 1
    return torch.randint(-top, top + 1, (out_features, in_features), generator=generator(seed)).to(torch.int8)


@given(
    st.integers(1, 100_000),
    st.integers(1, 20_000),
    st.integers(1, 8704),
    st.sampled_from([6, 8]),
    st.sampled_from(DEVICES),
)
def test_plans_cover_the_product(rows: int, out_features: int, in_features: int, bits: int, device: Device) -> None:
    how = plan(rows, out_features, in_features, bits, device)
    tile = how.tile
    assert how.tiles_m == -(-rows // tile.bm)
    assert how.tiles_n == -(-out_features // tile.bn)
    tiles_k = -(-in_features // tile.bk)
    assert (how.split - 1) * how.steps < tiles_k <= how.split * how.steps, "a part is empty, or K is not covered"
    assert how.tiles_n * tile.bn <= padded(out_features, weights.N_ALIGN), "reads behind the packed weights"
    assert tile.shared_bytes(bits, device.capability) <= device.shared_bytes
    assert how.grid == (how.tiles_m * how.tiles_n, how.split)
    assert (how.group_m == 0) == (how.tiles_m == 1)
    assert how == plan.__wrapped__(rows, out_features, in_features, bits, device), "not a pure function"


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
@pytest.mark.parametrize("bits", [6, 8])
def test_buckets(device: Device, bits: int) -> None:
    """A row tile is as high as the bucket, so that up to 64 rows read the weights once."""
    for shape in layer_shapes():
        for rows in range(1, 65):
            how = plan(rows, shape.n, shape.k, bits, device)
            assert how.tile.bm == tiles.bucket(rows)
            assert how.tiles_m == 1
        assert plan(65, shape.n, shape.k, bits, device).tile.bm >= 64


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_split_fills_the_device_and_no_more(device: Device) -> None:
    for shape in layer_shapes():
        for bits in (6, 8):
            for rows in (1, 16, 17, 64, 65, 200, 2000):
                how = plan(rows, shape.n, shape.k, bits, device)
                assert how.grid[0] * how.split <= max(device.multiprocessors, how.grid[0])
                if how.grid[0] >= tiles.BUSY * device.multiprocessors:
                    assert how.split == 1
                if how.split > 1:
                    assert how.steps >= tiles.MIN_STEPS
    assert plan(2, 1024, 4096, 6, A100).split > 1
    assert plan(2, 4096, 1024, 6, A100).split == 1


def test_wide_tiles_on_sm_8x() -> None:
    """BN > BM where the device is busy: warps along M would all unpack the same weights."""
    for rows in (16, 32, 64, 200, 5000):
        for bits in (6, 8):
            tile = plan(rows, 16384, 1024, bits, A100).tile
            assert tile.bn > tile.bm or bits == 8


def test_table_is_complete() -> None:
    table = json.loads(Path(tiles.__file__).with_name("tiles.json").read_text())
    for name, entry in table["tiles"].items():
        rows = table["tiles"][entry] if isinstance(entry, str) else entry
        assert set(rows) == {"w6", "w8"}
        for buckets in rows.values():
            assert set(buckets) == {"16", "32", "64", "128"}
            for bucket, choices in buckets.items():
                widths = [Tile(*sizes).bn for sizes in choices]
                assert widths == sorted(widths, reverse=True), f"{name} {bucket}: from wide to narrow"
                assert all(Tile(*sizes).bk == weights.K_TILE for sizes in choices)
                assert widths[-1] <= weights.N_ALIGN


def test_small_shared_memory() -> None:
    tile = Tile(64, 128, 128, 4, 4)
    fitted = tiles.fitted(tile, 8, Device(86, 82, 60_000))
    assert fitted.num_stages == 3
    assert fitted.bn == 128
    assert tiles.fitted(tile, 8, Device(86, 82, 30_000)).bn == 64
    with pytest.raises(ValueError, match=r"a tile of 64 rows needs 10240 bytes.*tiny has 5000.*another backend"):
        tiles.fitted(tile, 8, Device(86, 82, 5000, "tiny"))


def test_requested_bytes() -> None:
    how = Plan(Tile(16, 64, 128, 4, 4), split=2, tiles_m=2, tiles_n=3, steps=4)
    weight, x, partial = 2 * 192 * 1024 * 6 // 8, 3 * 20 * 1000, 3 * 4 * 20 * 192
    assert how.requested_bytes(20, 190, 1000, 6, written=77) == weight + x + partial + 77


def test_an_assumed_device() -> None:
    """What looks at launches without a GPU chooses the device; nested and in other threads it is independent."""
    cpu = torch.device("cpu")
    assert gpu.describe(cpu) == A100
    with gpu.assume(DEVICES[1]):
        assert gpu.describe(cpu) == DEVICES[1]
        assert gpu.describe(cpu).multiprocessors == 82
        with gpu.assume(DEVICES[3]):
            assert gpu.describe(cpu).multiprocessors == 132
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(gpu.describe, cpu).result() == A100
    assert gpu.describe(cpu).multiprocessors == A100.multiprocessors


@pytest.fixture
def no_measurements():
    before = dict(tiles._MEASURED)
    yield
    tiles._MEASURED.clear()
    tiles._MEASURED.update(before)
    plan.cache_clear()


@pytest.mark.usefixtures("no_measurements")
def test_tuning_keeps_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(80, 108, gpu.SHARED_BYTES[80], "some GPU")
    default = plan(10, 1024, 4096, 6, device)
    wanted = next(option for option in tiles.options(10, 1024, 4096, 6, device) if option.split == 4)
    assert wanted != default
    timed = []
    best = tiles.tune(10, 1024, 4096, 6, device, lambda how: timed.append(how) or (1.0 if how == wanted else 2.0))
    assert best == wanted
    assert len(timed) == len(set(timed)) > 4
    assert plan(10, 1024, 4096, 6, device) == wanted
    assert plan(16, 1024, 4096, 6, device).split == 4, "the choice holds for the bucket"
    assert plan(17, 1024, 4096, 6, device).tile.bm == 32
    assert plan(10, 1024, 4096, 6, A100) == default, "other devices keep theirs"
    entry = json.loads(json.dumps(tiles.measurements()))
    # The same entries as `measured` in the file give the same plan.
    tiles._MEASURED.clear()
    monkeypatch.setattr(tiles, "_file", lambda: {"tiles": {}, "measured": entry})
    plan.cache_clear()
    assert plan(10, 1024, 4096, 6, device) == wanted


def test_tuning_refuses_while_capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="measure before capturing"):
        tiles.tune(1, 64, 64, 8, A100, lambda how: 0.0)


@pytest.mark.parametrize("bits", [6, 8])
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize(("out_features", "in_features"), [(2, 1), (30, 31), (128, 128), (130, 515)])
def test_tiles_round_trip(bits: int, paired: bool, out_features: int, in_features: int) -> None:
    qweight = pack(_codes(out_features, in_features, bits), bits)
    packed = weights.pack_tiles(qweight, bits, in_features, paired)
    assert packed.is_contiguous()
    assert packed.numel() == weights.packed_bytes(out_features, in_features, bits)
    assert torch.equal(weights.unpack_tiles(packed, out_features, bits, in_features, paired), qweight)


@pytest.mark.parametrize("paired", [False, True])
def test_order_of_the_weights(paired: bool) -> None:
    """Every code where the drawing in weights.py has it."""
    out_features, in_features = 6, 300
    row_of = [0, 3, 1, 4, 2, 5] if paired else range(6)
    for bits in (8, 6):
        codes = _codes(out_features, in_features, bits).numpy().astype(np.int64)
        packed = weights.pack_tiles(pack(torch.from_numpy(codes).to(torch.int8), bits), bits, in_features, paired)
        assert packed.shape == ((3, 128, 128) if bits == 8 else (3, 3, 128, 32))
        tiled = packed.numpy().astype(np.int64)
        for channel, row in enumerate(row_of):
            for k in range(384):
                tile, inside = divmod(k, 128)
                plane, i = divmod(inside, 32)
                if bits == 8:
                    found = tiled[tile, channel, inside]
                elif plane < 3:
                    found = ((tiled[tile, plane, channel, i] >> 2) ^ 32) - 32
                else:
                    spare = [tiled[tile, which, channel, i] & 3 for which in range(3)]
                    found = ((spare[0] << 4 | spare[1] << 2 | spare[2]) ^ 32) - 32
                assert found == (codes[row, k] if k < in_features else 0), (bits, row, k)
        assert not tiled[..., 6:, :].any(), "channels behind N"


def test_cache_follows_writes_and_dies_with_the_weight() -> None:
    qweight = pack(_codes(20, 40, 6), 6)
    first = weights.tiles_of(qweight, 6, 40)
    assert weights.tiles_of(qweight, 6, 40) is first
    assert weights.tiles_of(qweight, 6, 40, paired=True) is not first
    qweight.copy_(pack(_codes(20, 40, 6, seed=1), 6))
    second = weights.tiles_of(qweight, 6, 40)
    assert not torch.equal(second, first)
    alive = weakref.ref(second)
    gc.collect()
    entries = len(weights.tiles_of.cache)
    del second, qweight
    gc.collect()
    assert alive() is None
    assert len(weights.tiles_of.cache) == entries - 1


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        qweight = pack(_codes(20, 40, 6), 6)
        assert weights.tiles_of(qweight, 6, 40) is weights.tiles_of(qweight, 6, 40)


@pytest.mark.parametrize("bits", [6, 8])
def test_corrupt_weights_are_refused(bits: int) -> None:
    qweight = pack(_codes(18, 33, bits), bits)
    qweight[17, 5] = {6: 0, 8: 0x80}[bits]
    with pytest.raises(ValueError, match=r"row 17.*corrupt"):
        weights.tiles_of(qweight, bits, 33)
