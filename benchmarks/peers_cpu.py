"""Other libraries' linear layers on a CPU, float32 rows in and float32 rows out, for ``benchmarks.linear_cpu``.

Every peer runs in the form it was found fastest in: the alternatives that lost are named where the choice is made.
Integer peers hold symmetric weights with one scale per output channel, and 8-bit activations.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .contenders import ACT_RANGE, Call, Contender, Layer, channel_codes
from .limits import available_cores

# Rows up to which ONNX Runtime's block-quantized matrix product is faster than its channel-quantized one.
ORT_BLOCKWISE_ROWS = 2
ORT_BLOCK = 128


class TorchFloat(Contender):
    """``F.linear`` in float32, or in bfloat16 between two conversions."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]

    def weight_bytes(self, n: int, k: int) -> int:
        return n * k * self.dtype.itemsize

    def layers(self, weight: Tensor, bias: Tensor, copies: int) -> list[Layer]:
        weight, bias = weight.to(self.dtype), bias.to(self.dtype)
        return [self._layer(weight.roll(i, 0), bias.roll(i)) for i in range(copies)]

    def _layer(self, weight: Tensor, bias: Tensor) -> Layer:
        dtype = self.dtype

        def bind(x: Tensor, y: Tensor) -> Call:
            if dtype is torch.float32:
                return lambda: functional.linear(x, weight, bias)
            return lambda: functional.linear(x.to(dtype), weight, bias).float()

        return bind


class TorchQuantized(Contender):
    """``torch.ao.nn.quantized.dynamic.Linear`` on one of torch's quantized engines."""

    def __init__(self, name: str, engine: str) -> None:
        self.name, self.engine = name, engine

    def missing(self) -> str | None:
        if self.engine in torch.backends.quantized.supported_engines:
            return None
        return f"this torch has no quantized engine {self.engine!r}"

    def layers(self, weight: Tensor, bias: Tensor, copies: int) -> list[Layer]:
        codes, scale = channel_codes(weight)
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = self.engine  # decides the packing only; the packed weight knows its kernel
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # quantized tensors are deprecated
                return [self._layer(codes.roll(i, 0), scale.roll(i), bias.roll(i)) for i in range(copies)]
        finally:
            torch.backends.quantized.engine = before

    def _layer(self, codes: Tensor, scale: Tensor, bias: Tensor) -> Layer:
        zeros = torch.zeros(len(scale), dtype=torch.int64)
        quantized = torch._make_per_channel_quantized_tensor(codes, scale.double(), zeros, 0)
        packed = torch.ops.quantized.linear_prepack(quantized, bias)
        run = torch.ops.quantized.linear_dynamic
        return lambda x, y: lambda: run(x, packed, False)


class OnnxRuntime(Contender):
    """ONNX Runtime: ``DynamicQuantizeMatMul``, and for very few rows ``MatMulNBits`` with 8-bit blocks and integer
    arithmetic (accuracy level 4). ``QGemm`` and ``MatMulIntegerToFloat`` behind a static ``QuantizeLinear`` are slower.

    All sessions share one pool of threads. It spins while it runs, as is ONNX Runtime's default and its fastest form;
    pools of their own would spin against each other from copy to copy.
    """

    name = "onnxruntime"

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def missing(self) -> str | None:
        return _not_installed("onnxruntime", "onnx")

    def layers(self, weight: Tensor, bias: Tensor, copies: int) -> list[Layer]:
        codes, scale = channel_codes(weight)
        return [self._layer(codes.roll(i, 0), scale.roll(i), bias.roll(i)) for i in range(copies)]

    def _layer(self, codes: Tensor, scale: Tensor, bias: Tensor) -> Layer:
        session: dict[bool, Any] = {}

        def bind(x: Tensor, y: Tensor) -> Call:
            blockwise = len(x) <= ORT_BLOCKWISE_ROWS and codes.shape[1] % ORT_BLOCK == 0
            if blockwise not in session:
                session.clear()
                session[blockwise] = _ort_session(codes, scale, bias, blockwise, self.threads)
            binding = session[blockwise].io_binding()
            binding.bind_input("x", "cpu", 0, np.float32, tuple(x.shape), x.data_ptr())
            binding.bind_output("y", "cpu", 0, np.float32, tuple(y.shape), y.data_ptr())
            run = session[blockwise].run_with_iobinding

            def call(keep: Tensor = x) -> Tensor:
                run(binding)
                return y

            return call

        return bind


def _ort_session(codes: Tensor, scale: Tensor, bias: Tensor, blockwise: bool, threads: int) -> Any:
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    _ort_threads(threads)
    n, k = codes.shape
    constants = {"b": bias.numpy()}
    if blockwise:
        constants["w"] = (codes.view(torch.uint8) ^ 128).reshape(n, k // ORT_BLOCK, ORT_BLOCK).numpy()
        constants["s"] = scale[:, None].expand(n, k // ORT_BLOCK).reshape(-1).numpy()
        node = helper.make_node(
            "MatMulNBits",
            ["x", "w", "s", "", "", "b"],
            ["y"],
            domain="com.microsoft",
            K=k,
            N=n,
            bits=8,
            block_size=ORT_BLOCK,
            accuracy_level=4,
        )
    else:
        constants |= {"w": codes.t().contiguous().numpy(), "s": scale.numpy(), "z": np.zeros(n, np.int8)}
        node = helper.make_node("DynamicQuantizeMatMul", ["x", "w", "s", "z", "b"], ["y"], domain="com.microsoft")
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", n])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@lru_cache(maxsize=1)
def _ort_threads(threads: int) -> None:
    import onnxruntime

    onnxruntime.set_global_thread_pool_sizes(threads, 1)


class OpenVino(Contender):
    """OpenVINO's CPU plugin: ``FakeQuantize`` with 256 levels and a constant range before an int8 ``MatMul``.

    Compiled for every number of rows: models with a dynamic batch are up to 20 % slower, and dynamic quantization of
    activations (``DYNAMIC_QUANTIZATION_GROUP_SIZE``) slower still.
    """

    name = "openvino"

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def missing(self) -> str | None:
        return _not_installed("openvino") or _openvino_not_integer(self.threads)

    def layers(self, weight: Tensor, bias: Tensor, copies: int) -> list[Layer]:
        codes, scale = channel_codes(weight)
        return [self._layer(codes.roll(i, 0), scale.roll(i), bias.roll(i)) for i in range(copies)]

    def _layer(self, codes: Tensor, scale: Tensor, bias: Tensor) -> Layer:
        return lambda x, y: _openvino_call(codes, scale, bias, x, y, self.threads)


def _openvino_call(codes: Tensor, scale: Tensor, bias: Tensor, x: Tensor, y: Tensor, threads: int) -> Call:
    import openvino

    compiled = openvino_model(codes, scale, bias, len(x), threads)
    request = compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))
    request.set_output_tensor(openvino.Tensor(y.numpy(), shared_memory=True))
    run = request.infer

    def call(keep: tuple[Any, ...] = (x, compiled)) -> Tensor:
        run()
        return y

    return call


def openvino_model(codes: Tensor, scale: Tensor, bias: Tensor, rows: int, threads: int) -> Any:
    """The compiled OpenVINO model of one layer for ``rows`` rows."""
    import openvino
    from openvino import opset13

    x = opset13.parameter([rows, codes.shape[1]], np.float32, name="x")
    step = 2 * ACT_RANGE / 255
    low, high = np.float32(-128 * step), np.float32(127 * step)
    quantized = opset13.fake_quantize(x, low, high, low, high, 256)
    weight = opset13.convert(opset13.constant(codes.numpy()), np.float32)
    weight = opset13.multiply(weight, opset13.constant(scale[:, None].numpy()))
    y = opset13.add(opset13.matmul(quantized, weight, False, True), opset13.constant(bias[None].numpy()))
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,  # pinned threads of the copies would all sit on the same cores
        # One executor for all compiled models: otherwise every copy wakes threads of its own, up to 40 % slower. It
        # uses every core whatever INFERENCE_NUM_THREADS says, so that it serves only when that is meant.
        "EXCLUSIVE_ASYNC_REQUESTS": threads == available_cores(),
    }
    return openvino_core().compile_model(openvino.Model([y], [x], "linear"), "CPU", settings)


def executed_precisions(compiled: Any) -> list[str]:
    """Precisions of the matrix products in a compiled OpenVINO model, as its plugin executes them."""
    found = []
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        if info["layerType"].astype(str) == "FullyConnected":
            found.append(info["runtimePrecision"].astype(str))
    return found


@lru_cache(maxsize=1)
def _openvino_not_integer(threads: int) -> str | None:
    """Reason for leaving OpenVINO out where its matrix products would not be integer, or None."""
    generator = torch.Generator().manual_seed(0)
    codes, scale = channel_codes(torch.randn(256, 256, generator=generator))
    found = executed_precisions(openvino_model(codes, scale, torch.zeros(256), 16, threads))
    if found and all(precision in ("i8", "u8") for precision in found):
        return None
    return f"its plugin runs this layer in {', '.join(found) or 'an unknown precision'} on this machine, not in int8"


@lru_cache(maxsize=1)
def openvino_core() -> Any:
    import openvino

    return openvino.Core()


def _not_installed(*modules: str) -> str | None:
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} not installed" if absent else None


PEERS: dict[str, Callable[[int], Contender]] = {
    "fp32": lambda threads: TorchFloat(torch.float32),
    "bf16": lambda threads: TorchFloat(torch.bfloat16),
    "fbgemm": lambda threads: TorchQuantized("fbgemm", "fbgemm"),
    "onednn": lambda threads: TorchQuantized("onednn", "onednn"),
    "onnxruntime": OnnxRuntime,
    "openvino": OpenVino,
}
