"""QuantBlock and QuantHead: decoding equals the full pass bit for bit, and both equal a fake-quantized simulation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from ptq4arvg.blocks import QuantBlock, QuantHead, prepare, restore
from ptq4arvg.kv_cache import Int8KVCache
from ptq4arvg.linear import QuantLinear
from ptq4arvg.nn import Condition, Norm, Window
from ptq4arvg.protocol import AttentionSpec, BlockSpec, HeadSpec, Modulation
from tests.simulated import simulated_block

LENGTH, HEADS, HEAD_DIM = 9, 2, 20  # head width 20 is padded to 32 in the cache
WIDTH, HIDDEN = HEADS * HEAD_DIM, 52  # neither is a multiple of what is packed


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def quant_linear(
    in_features: int, out_features: int, seed: int, w_bits: int = 8, act_bits: int = 8, activation: str = "none"
) -> QuantLinear:
    """Random weights of unit gain, for inputs of about unit size; two sink positions with scales of their own."""
    gen = generator(seed)
    limit = 2 ** (w_bits - 1) - 1
    codes = torch.randint(-limit, limit + 1, (out_features, in_features), generator=gen, dtype=torch.int8)
    groups = torch.arange(LENGTH).clamp(max=2)
    bits = torch.tensor([8, 8, act_bits])
    delta = 8.0 / 2.0**bits * (0.7 + 0.3 * torch.rand(3, generator=gen))
    zero_point = 2 ** (bits - 1) + torch.randint(-4, 5, (3,), generator=gen)
    scale = (0.5 + torch.rand(out_features, generator=gen)) * 1.7 / limit / in_features**0.5
    bias = 0.1 * torch.randn(out_features, generator=gen)
    return QuantLinear.from_codes(codes, scale, bias, w_bits, delta, zero_point, bits, groups, activation)


def norm(dim: int, seed: int, kind: str = "layer") -> Norm:
    made = Norm(dim, "rms" if kind == "rms" else "layer").requires_grad_(False)
    assert made.weight is not None
    made.weight.copy_(1 + 0.2 * torch.randn(dim, generator=generator(seed)))
    if made.bias is not None:
        made.bias.copy_(0.2 * torch.randn(dim, generator=generator(seed + 1)))
    return made


def make_block(modulated: bool = True, activation: str = "gelu_erf", w_bits: int = 8, act_bits: int = 8) -> QuantBlock:
    """A modulated block with LayerNorms and qk-norm, as in RAR, or a plain one with RMSNorms and neither, as in PAR."""
    spec = BlockSpec(
        path="b",
        norm1="b.n1",
        norm2="b.n2",
        modulation1=Modulation("b.ada", 6, 0, 1, 2) if modulated else None,
        modulation2=Modulation("b.ada", 6, 3, 4, 5) if modulated else None,
        qkv="b.qkv",
        proj="b.proj",
        fc1="b.fc1",
        fc2="b.fc2",
        activation=activation,
        attention=AttentionSpec("b", HEADS, HEAD_DIM, "layer_norm" if modulated else "none", HEAD_DIM**-0.5),
    )
    stacked = 2 * HIDDEN if activation == "swiglu" else HIDDEN
    layers = {
        "qkv": quant_linear(WIDTH, 3 * WIDTH, 1, w_bits, act_bits),
        "proj": quant_linear(WIDTH, WIDTH, 2, w_bits, act_bits),
        "fc1": quant_linear(WIDTH, stacked, 3, w_bits, act_bits),
        "fc2": quant_linear(HIDDEN, WIDTH, 4, w_bits, act_bits),
    }
    kind = "layer" if modulated else "rms"
    if modulated:
        layers["adaln"] = quant_linear(WIDTH, 6 * WIDTH, 5, w_bits, act_bits, "silu")
    delta = 0.02 + 0.02 * torch.rand(2, HEADS, generator=generator(6))
    zero_point = torch.randint(118, 139, (2, HEADS), generator=generator(7))
    return QuantBlock(
        spec,
        norm(WIDTH, 10, kind),
        norm(WIDTH, 12, kind),
        norm(HEAD_DIM, 14) if modulated else None,
        norm(HEAD_DIM, 16) if modulated else None,
        layers,
        (delta, zero_point),
        (delta.flip(0), zero_point.flip(1)),
        (torch.arange(LENGTH) > 1).long(),
    ).eval()


def window(start: int, length: int) -> Window:
    """Causal window."""
    positions = torch.arange(start, start + length)
    return Window(positions, (positions + 1).to(torch.int32), start + length)


def condition(batch: int, positions: Tensor, seed: int = 0) -> Condition:
    """Two distinct conditions per position, alternating over the batch."""
    values = torch.randn(2, LENGTH, WIDTH, generator=generator(seed))[:, positions].flatten(0, 1)
    row = torch.arange(batch)[:, None] % 2 * len(positions) + torch.arange(len(positions))
    return Condition(values, row.flatten().to(torch.int32), positions.repeat(2))


def stream(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, LENGTH, WIDTH, generator=generator(seed))


KINDS = pytest.mark.parametrize(
    ("modulated", "activation"), [(True, "gelu_erf"), (True, "gelu_tanh"), (False, "swiglu")]
)
BITS = pytest.mark.parametrize(("w_bits", "act_bits"), [(8, 8), (6, 8), (6, 6)])


@KINDS
@BITS
def test_block_is_its_fake_quantized_simulation(modulated: bool, activation: str, w_bits: int, act_bits: int) -> None:
    block, x, all_of_it = make_block(modulated, activation, w_bits, act_bits), stream(20), window(0, LENGTH)
    given = condition(20, all_of_it.positions) if modulated else None
    expected = simulated_block(block, x.double(), given, all_of_it)
    # A value within float32 noise of a rounding boundary may land on the other code and disturb its own sequence; the
    # simulation has some 10⁴ values per sequence, each with about 1e-6 of that. All others agree to float32.
    worst = (block(x, given, all_of_it) - expected).abs().amax((1, 2))
    assert (worst < 2e-5).float().mean() >= 0.85
    assert worst.max() < 0.05 * expected.abs().max()


@KINDS
@BITS
def test_decoding_is_the_full_pass_bit_for_bit(modulated: bool, activation: str, w_bits: int, act_bits: int) -> None:
    block, x = make_block(modulated, activation, w_bits, act_bits), stream(3)
    everything = window(0, LENGTH)
    full = block(x, condition(3, everything.positions) if modulated else None, everything)
    for first in (1, 2, 5):  # tokens of step 0
        cache = block.new_cache(3, LENGTH)
        for start, length in [(0, first), *((i, 1) for i in range(first, LENGTH))]:
            part = window(start, length)
            given = condition(3, part.positions) if modulated else None
            assert torch.equal(block(x[:, start : start + length], given, part, cache), full[:, start : start + length])


def test_several_tokens_at_once_that_see_each_other() -> None:
    """A window whose queries all see its end (VAR's scales, PAR's groups) decodes as the full pass with that mask."""
    block, x = make_block(False, "swiglu"), stream(2)
    ends = torch.tensor([1, 3, 3, 6, 6, 6, 9, 9, 9], dtype=torch.int32)
    full = block(x, None, Window(torch.arange(LENGTH), ends, LENGTH))
    cache = block.new_cache(2, LENGTH)
    for start, stop in ((0, 1), (1, 3), (3, 6), (6, 9)):
        part = Window(torch.arange(start, stop), ends[start:stop], stop)
        assert torch.equal(block(x[:, start:stop], None, part, cache), full[:, start:stop])
    assert not torch.equal(full, block(x, None, window(0, LENGTH)))


def test_rows_do_not_depend_on_their_batch() -> None:
    block, x, all_of_it = make_block(act_bits=6), stream(6), window(0, LENGTH)
    given = condition(6, all_of_it.positions)
    together = block(x, given, all_of_it)
    rows = given.rows.view(6, LENGTH)
    for i in range(6):
        alone = block(x[i : i + 1], Condition(given.values, rows[i], given.positions), all_of_it)
        assert torch.equal(alone[0], together[i])
    order = torch.tensor([4, 0, 5, 5, 1])
    shuffled = block(x[order], Condition(given.values, rows[order].flatten(), given.positions), all_of_it)
    assert torch.equal(shuffled, together[order])


def test_keys_and_values_are_cached_as_padded_bytes() -> None:
    block = make_block()
    cache = block.new_cache(2, LENGTH)
    assert isinstance(cache, Int8KVCache)
    for codes in (cache.k, cache.v):
        assert codes.shape == (2, HEADS, LENGTH, 32)
        assert codes.dtype == torch.int8
    block(stream(2)[:, :3], condition(2, torch.arange(3)), window(0, 3), cache)
    for codes in (cache.k, cache.v):
        assert bool(codes[:, :, :3, :HEAD_DIM].any(-1).all())
        assert not codes[..., HEAD_DIM:].any()
        assert not codes[:, :, 3:].any()


def test_forward_changes_nothing_but_the_cache() -> None:
    block, x, part = make_block(), stream(2), window(0, LENGTH)
    given = condition(2, part.positions)
    before = {name: value.clone() for name, value in (*block.named_buffers(), *block.named_parameters())}
    inputs, values = x.clone(), given.values.clone()
    first = block(x, given, part)
    assert torch.equal(block(x, given, part), first)
    assert torch.equal(x, inputs)
    assert torch.equal(given.values, values)
    for name, value in (*block.named_buffers(), *block.named_parameters()):
        assert torch.equal(value, before[name])


def test_position_beyond_the_tables_is_named() -> None:
    block = make_block(False, "swiglu")
    with pytest.raises(IndexError, match=f"{LENGTH}"):
        block(stream(1)[:, :1], None, window(LENGTH, 1), block.new_cache(1, LENGTH + 1))


def test_full_cache_is_named() -> None:
    block = make_block(False, "swiglu")
    with pytest.raises(IndexError, match="the cache has 4 slots"):
        block(stream(1)[:, :5], None, window(0, 5), block.new_cache(1, 4))


def test_window_in_the_middle_needs_its_cache() -> None:
    with pytest.raises(ValueError, match=r"2 positions.*5 slots.*cache"):
        make_block(False, "swiglu")(stream(1)[:, :2], None, window(3, 2))


@pytest.mark.parametrize("operand", ["k", "v"])
def test_lawless_cache_parameters_are_refused(operand: str) -> None:
    block = make_block()
    getattr(block, f"{operand}_delta")[1, 0] = -1.0
    with pytest.raises(ValueError, match=r"delta contains -1\.0"):
        block.refresh()


def test_state_survives_a_round_trip() -> None:
    block, other = make_block(act_bits=6), make_block(act_bits=8)
    x, part = stream(2), window(0, LENGTH)
    given = condition(2, part.positions)
    assert not torch.equal(block(x, given, part), other(x, given, part))
    other.load_state_dict(block.state_dict())
    for module in (*other.children(), other):
        if isinstance(module, QuantLinear | QuantBlock):
            module.refresh()
    assert torch.equal(block(x, given, part), other(x, given, part))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@KINDS
def test_decode_step_compiles_without_graph_breaks(backend: str, modulated: bool, activation: str) -> None:
    torch._dynamo.reset()
    block, x = make_block(modulated, activation, 6, 6), stream(2)
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    caches = block.new_cache(2, LENGTH), block.new_cache(2, LENGTH)
    with torch.no_grad():
        for start, length in ((0, 2), (2, 1), (3, 1), (4, 1)):
            part = window(start, length)
            given = condition(2, part.positions) if modulated else None
            expected, y = (
                run(x[:, start : start + length], given, part, cache)
                for run, cache in zip((block, compiled), caches, strict=True)
            )
            assert torch.equal(y, expected)
    assert torch.equal(caches[0].k, caches[1].k)
    assert torch.equal(caches[0].v, caches[1].v)


class DecodeStep(nn.Module):
    """A block's step on tensors alone, as an exported program takes them."""

    def __init__(self, block: QuantBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, values: Tensor, rows: Tensor, positions: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache = self.block.new_cache(0, 0)
        cache.k, cache.v = k, v
        part = Window(positions, (positions + 1).to(torch.int32), LENGTH)
        return self.block(x, Condition(values, rows, positions.repeat(2)), part, cache)


def test_decode_step_is_exported() -> None:
    """One program for every position: the operators are in it, and positions are data."""
    block, x = make_block(True, "gelu_erf", 6, 6), stream(2)
    step = DecodeStep(block)

    def arguments(position: int) -> tuple[Tensor, ...]:
        positions, cache = torch.tensor([position]), block.new_cache(2, LENGTH)
        given = condition(2, positions)
        return x[:, position : position + 1].contiguous(), given.values, given.rows, positions, cache.k, cache.v

    with torch.no_grad():
        program = torch.export.export(step, arguments(3))
        called = [str(node.target).split(".")[1] for node in program.graph.nodes if "ptq4arvg" in str(node.target)]
        modulation, attend = ["quantize", "linear"], ["qkv_append", "attention", "quantize", "linear_gate_residual"]
        mlp = ["adaln_quant", "linear_quant", "linear_gate_residual"]
        assert called == [*modulation, "adaln_quant", "linear", *attend, *mlp]
        for position in (0, 5):
            before, after = arguments(position), arguments(position)
            assert torch.equal(program.module()(*after), step(*before))
            assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_a_prepared_block_says_how_to_export_it() -> None:
    block = make_block(True, "gelu_erf", 6, 6)
    if not prepare(block):
        pytest.skip("no backend here prepares blocks")
    positions, cache, given = torch.tensor([2]), block.new_cache(2, LENGTH), condition(2, torch.tensor([2]))
    arguments = (stream(2)[:, 2:3].contiguous(), given.values, given.rows, positions, cache.k, cache.v)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match=r"blocks\.restore\(model\)"):
            torch.export.export(DecodeStep(block), arguments)
        restore(block)
        torch.export.export(DecodeStep(block), arguments)


@pytest.mark.parametrize("modulated", [True, False])
def test_head_gives_the_same_logits_whatever_the_window(modulated: bool) -> None:
    spec = HeadSpec("h", "h.norm", Modulation("h.ada", 2, shift=1, scale=0) if modulated else None, "h.linear")
    plain = Norm(WIDTH, affine=False)
    adaln = quant_linear(WIDTH, 2 * WIDTH, 8, activation="silu") if modulated else None
    head = QuantHead(spec, plain, adaln, quant_linear(WIDTH, 11, 9))
    x, everything = stream(2), torch.arange(LENGTH)
    full = head(x, condition(2, everything) if modulated else None, everything)
    assert full.shape == (2, LENGTH, 11)
    for i in range(LENGTH):
        given = condition(2, everything[i : i + 1]) if modulated else None
        assert torch.equal(head(x[:, i : i + 1], given, everything[i : i + 1]), full[:, i : i + 1])


def test_blocks_hold_no_floating_point_matrix() -> None:
    block = copy.deepcopy(make_block())
    for module in block.modules():
        assert not isinstance(module, nn.Linear)
    for name, value in block.state_dict().items():
        assert not (value.ndim == 2 and value.is_floating_point() and not name.endswith("_delta")), name
