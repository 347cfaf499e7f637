"""QuantLinear: a drop-in for nn.Linear that computes the laws of the arithmetic on packed weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ptq4arvg.calibration.quantizers import symmetric_rows, uniform_params
from ptq4arvg.linear import QuantLinear
from ptq4arvg_kernels.packing import unpack


def make(
    in_features: int = 20,
    out_features: int = 6,
    w_bits: int = 6,
    act_bits: tuple[int, ...] = (8, 6, 6),
    length: int = 7,
    bias: bool = True,
    activation: str = "none",
    seed: int = 0,
) -> QuantLinear:
    """Random codes; position p belongs to group min(p, G − 1), as sinks come first."""
    gen = torch.Generator().manual_seed(seed)
    limit, groups = 2 ** (w_bits - 1) - 1, len(act_bits)
    codes = torch.randint(-limit, limit + 1, (out_features, in_features), generator=gen, dtype=torch.int8)
    return QuantLinear.from_codes(
        codes,
        torch.rand(out_features, generator=gen) * 0.02 + 0.001,
        torch.randn(out_features, generator=gen) if bias else None,
        w_bits,
        torch.rand(groups, generator=gen) * 0.05 + 0.01,
        torch.tensor([int(torch.randint(0, 2**b, (1,), generator=gen)) for b in act_bits]),
        torch.tensor(act_bits),
        torch.arange(length).clamp(max=groups - 1),
        activation,
    )


def dequantized_product(layer: QuantLinear, x: Tensor, positions: list[int]) -> np.ndarray:
    """``x̂ Ŵᵀ + b`` in float64, from the layer's saved state alone; x ``[M, K]`` float32 with activation applied."""
    groups = [int(layer.group_of_position[positions[i % len(positions)]]) for i in range(len(x))]
    delta = layer.delta.numpy()[groups][:, None]
    zero = layer.zero_point.numpy().astype(np.int64)[groups][:, None]
    top = 2 ** layer.act_bits.numpy().astype(np.int64)[groups][:, None] - 1
    codes = np.clip(np.rint(x.numpy() * (np.float32(1) / delta)) + zero, 0, top)
    rounded = (codes - zero) * delta.astype(np.float64)
    weight = unpack(layer.qweight, layer.w_bits, layer.in_features).numpy() * layer.w_scale.double().numpy()[:, None]
    y = rounded @ weight.T
    return y if layer.bias is None else y + layer.bias.double().numpy()


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Everything a module holds, derived buffers included."""
    return {name: value.clone() for name, value in (*module.named_parameters(), *module.named_buffers())}


@given(
    in_features=st.integers(1, 70),
    out_features=st.integers(1, 19),
    w_bits=st.sampled_from([6, 8]),
    act_bits=st.sampled_from([(8,), (6,), (8, 8, 6), (6, 8, 6)]),
    batch=st.integers(1, 3),
    positions=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_result_is_the_dequantized_product(
    in_features: int,
    out_features: int,
    w_bits: int,
    act_bits: tuple[int, ...],
    batch: int,
    positions: list[int],
    bias: bool,
    seed: int,
) -> None:
    """Of any size, K and N not multiples of what is packed included."""
    layer = make(in_features, out_features, w_bits, act_bits, bias=bias, seed=seed)
    x = torch.randn(batch, len(positions), in_features, generator=torch.Generator().manual_seed(seed)) * 2
    y = layer(x, torch.tensor(positions))
    assert y.shape == (batch, len(positions), out_features)
    assert y.dtype == torch.float32
    expected = dequantized_product(layer, x.flatten(0, 1), positions)
    # The integers are exact; what rounds is the scale, its product and the bias: three operations on |y − b| and |y|.
    # 1e-12 is for the float64 sum, which is not exactly 0 where the integer sum is.
    size = np.abs(expected) if layer.bias is None else np.abs(expected) + np.abs(layer.bias.numpy())
    assert np.all(np.abs(y.flatten(0, 1).double().numpy() - expected) <= 4 * 2.0**-24 * size + 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_of_the_input_comes_back(dtype: torch.dtype) -> None:
    layer = make()
    x, positions = torch.randn(3, 20).to(dtype), torch.tensor([2])
    if dtype == torch.float64:
        with pytest.raises(TypeError, match="float64"):
            layer(x, positions)
        return
    y = layer(x, positions)
    assert y.dtype == dtype
    torch.testing.assert_close(y, layer(x.float(), positions).to(dtype), rtol=0, atol=0)


def test_silu_is_applied_before_quantization() -> None:
    layer, plain = make(activation="silu"), make()
    x, positions = torch.randn(4, 20), torch.tensor([1])
    silu = nn.functional.silu(x.double()).float()
    assert torch.equal(layer(x, positions), plain(silu, positions))
    assert not torch.equal(layer(x, positions), plain(x, positions))


def test_unknown_activation_is_named() -> None:
    with pytest.raises(ValueError, match=r"'relu'.*silu"):
        QuantLinear(4, 4, 8, 1, 1, activation="relu")


def test_rows_use_the_scale_of_their_position() -> None:
    """Row i sits at positions[i % P]; the positions of one group are interchangeable, others are not."""
    layer = make(act_bits=(8, 6, 6), length=7)
    x = torch.randn(1, 20).expand(6, -1).reshape(2, 3, 20)
    y = layer(x, torch.tensor([0, 1, 5]))
    for i, position in enumerate([0, 1, 5]):
        alone = layer(x[:1, i], torch.tensor([position]))
        assert torch.equal(y[0, i], alone[0])
        assert torch.equal(y[1, i], alone[0])
    assert torch.equal(layer(x, torch.tensor([2, 3, 6])), layer(x, torch.tensor([5, 4, 2])))
    assert len({tuple(row.tolist()) for row in y[0]}) == 3


def test_positions_may_be_int32() -> None:
    layer, x = make(), torch.randn(2, 3, 20)
    assert torch.equal(layer(x, torch.tensor([0, 1, 5], dtype=torch.int32)), layer(x, torch.tensor([0, 1, 5])))


def test_positions_are_required_where_scales_differ() -> None:
    with pytest.raises(ValueError, match=r"3 groups.*pass positions"):
        make()(torch.randn(2, 20))


def test_position_outside_the_tables_is_named() -> None:
    with pytest.raises(IndexError, match=r"7.*0 to 6"):
        make()(torch.randn(1, 20), torch.tensor([7]))


def test_positions_must_divide_the_rows() -> None:
    with pytest.raises(ValueError, match="5"):
        make()(torch.randn(5, 20), torch.tensor([0, 1]))


def test_wrong_width_is_named() -> None:
    with pytest.raises(ValueError, match=r"19 features.*takes 20"):
        make()(torch.randn(2, 19), torch.tensor([0]))


def test_nan_is_not_quantized() -> None:
    x = torch.randn(2, 20)
    x[1, 3] = torch.nan
    with pytest.raises(ValueError, match="nan"):
        make()(x, torch.tensor([0]))


def test_no_rows_give_no_rows() -> None:
    assert make()(torch.zeros(0, 3, 20), torch.tensor([0, 1, 2])).shape == (0, 3, 6)


def test_state_survives_a_round_trip() -> None:
    layer = make(seed=3, activation="silu")
    other = QuantLinear(20, 6, 6, 3, 7, activation="silu")
    state = layer.state_dict()
    assert set(state) == {"qweight", "w_scale", "bias", "delta", "zero_point", "act_bits", "group_of_position"}
    other.load_state_dict(state)
    other.refresh()
    x, positions = torch.randn(4, 20), torch.tensor([0, 4])
    assert torch.equal(other(x, positions), layer(x, positions))
    for name, value in state_of(layer).items():
        assert torch.equal(state_of(other)[name], value)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("qweight", torch.zeros(6, 24, dtype=torch.uint8), "corrupt"),
        ("delta", torch.tensor([0.1, 0.0, 0.1]), r"delta contains 0\.0"),
        ("delta", torch.tensor([0.1, torch.nan, 0.1]), "delta contains nan"),
        ("zero_point", torch.tensor([3, 64, 3], dtype=torch.int16), r"zero_point contains 64.*63"),
        ("zero_point", torch.tensor([-1, 3, 3], dtype=torch.int16), "zero_point contains -1"),
        ("act_bits", torch.tensor([8, 6, 5], dtype=torch.uint8), "bits contains 5"),
        ("w_scale", torch.tensor([0.1, 0.1, -0.5, 0.1, 0.1, 0.1]), r"w_scale holds -0\.5"),
        ("w_scale", torch.full((6,), torch.inf), "w_scale holds inf"),
        ("bias", torch.full((6,), torch.nan), "bias holds nan"),
    ],
)
def test_refresh_refuses_lawless_state(name: str, value: Tensor, words: str) -> None:
    layer = make()
    setattr(layer, name, value)
    with pytest.raises(ValueError, match=words):
        layer.refresh()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"codes": torch.full((6, 20), 32, dtype=torch.int8)}, ValueError, "code 32"),
        ({"codes": torch.zeros(20, dtype=torch.int8)}, ValueError, r"\(20,\)"),
        ({"codes": torch.zeros(6, 20)}, TypeError, "float32"),
        ({"w_scale": torch.ones(5)}, ValueError, "5 numbers.*6"),
        ({"w_scale": torch.zeros(6)}, ValueError, r"0\.0"),
        ({"bias": torch.zeros(7)}, ValueError, r"\(7,\)"),
        ({"w_bits": 4}, ValueError, "4"),
        ({"zero_point": torch.tensor([3.5])}, ValueError, r"3\.5"),
        ({"zero_point": torch.tensor([65_536 + 3])}, ValueError, "65539"),
        ({"act_bits": torch.tensor([6.5])}, ValueError, r"6\.5"),
        ({"group_of_position": torch.tensor([0, 1])}, IndexError, "contains 1"),
    ],
)
def test_from_codes_refuses_what_integers_cannot_hold(
    change: dict[str, Any], error: type[Exception], words: str
) -> None:
    arguments: dict[str, Any] = {
        "codes": torch.zeros(6, 20, dtype=torch.int8),
        "w_scale": torch.ones(6),
        "bias": None,
        "w_bits": 6,
        "delta": torch.tensor([0.1]),
        "zero_point": torch.tensor([3]),
        "act_bits": torch.tensor([8]),
        "group_of_position": torch.tensor([0, 0]),
    }
    with pytest.raises(error, match=words):
        QuantLinear.from_codes(**{**arguments, **change})


@pytest.mark.parametrize("activation", ["none", "silu"])
def test_forward_changes_nothing(activation: str) -> None:
    layer = make(activation=activation)
    x, positions = torch.randn(2, 3, 20), torch.tensor([0, 1, 5])
    before, inputs, attributes = state_of(layer), x.clone(), set(vars(layer))
    pointers = {name: value.data_ptr() for name, value in layer.named_buffers()}
    first = layer(x, positions)
    layer(torch.randn(1, 20), torch.tensor([6]))
    assert torch.equal(layer(x, positions), first)
    assert set(vars(layer)) == attributes
    assert torch.equal(x, inputs)
    assert {name: value.data_ptr() for name, value in layer.named_buffers()} == pointers
    for name, value in state_of(layer).items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(("w_bits", "bytes_per_weight"), [(6, 0.75), (8, 1.0)])
def test_only_packed_weights_are_held(w_bits: int, bytes_per_weight: float) -> None:
    layer = make(256, 96, w_bits)
    assert not list(layer.parameters())
    assert layer.qweight.nbytes == bytes_per_weight * 256 * 96
    # Nothing else is as large as a matrix: vectors of N and tables of T rows only.
    for name, value in layer.named_buffers():
        if name != "qweight":
            assert value.numel() <= max(layer.out_features, 4 * len(layer.table))
    layer(torch.randn(2, 256), torch.tensor([0]))
    tensors = [value for value in vars(layer).values() if isinstance(value, Tensor)]
    assert not tensors


def test_padding_is_the_only_overhead_of_odd_sizes() -> None:
    assert make(33, 5, 6).qweight.shape == (5, 64 * 3 // 4)


def test_drop_in_for_linear_in_any_module() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 33), nn.ReLU(), nn.Sequential(nn.Linear(33, 10, bias=False)))
    x = torch.randn(64, 50)
    with torch.no_grad():
        expected = model(x)
        inputs = {"0": x, "2.0": torch.relu(model[0](x))}
        for name, seen in inputs.items():
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            codes, scale = symmetric_rows(linear.weight, 8)
            grid = uniform_params(seen.min(), seen.max(), 8)
            layer = QuantLinear.from_codes(
                codes,
                scale,
                linear.bias,
                8,
                grid.delta.reshape(1),
                grid.zero_point.reshape(1),
                torch.tensor([8]),
                torch.zeros(1, dtype=torch.int64),
            )
            model.set_submodule(name, layer)
        y = model(x)
    assert y.shape == expected.shape
    noise = (y - expected).square().mean() / expected.square().mean()
    # Uniform noise of a step of 1/255 of the range in two layers; random data leave 38 dB or more.
    assert 10 * torch.log10(1 / noise) > 35
    # Rows of any leading shape.
    assert torch.equal(model(x.view(4, 4, 4, 50)), y.view(4, 4, 4, 10))


def test_dequantized_weight_is_codes_times_scales() -> None:
    layer = make(w_bits=8)
    codes = unpack(layer.qweight, 8, 20)
    assert torch.equal(layer.dequantized_weight(), codes.float() * layer.w_scale[:, None])


def test_description_says_the_bits() -> None:
    assert "20 → 6, W6A6/8, 3 groups" in repr(make())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("w_bits", [6, 8])
def test_compiles_without_graph_breaks(backend: str, w_bits: int) -> None:
    torch._dynamo.reset()
    layer = make(w_bits=w_bits, activation="silu")
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    with torch.no_grad():
        for positions in ([0, 1, 5], [3, 2, 6]):
            x = torch.randn(2, 3, 20)
            assert torch.equal(compiled(x, torch.tensor(positions)), layer(x, torch.tensor(positions)))


def test_one_group_compiles_without_positions() -> None:
    torch._dynamo.reset()
    layer = make(act_bits=(8,))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        x = torch.randn(5, 20)
        assert torch.equal(compiled(x), layer(x))
        assert torch.equal(layer(x), layer(x, torch.tensor([6])))
