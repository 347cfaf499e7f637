"""The CPU backend: integer kernels in C++ (csrc/cpu), chosen at run time by what the processor can do.

Bit for bit the integers of the reference; float results within the tolerance of the laws, and independent of the number
of threads, which follows ``torch.get_num_threads()``.
"""

from ...registry import Backend, OpSpec
from . import native, operators, plans


class CpuBackend(Backend):
    """Serves every operator on CPU tensors, if the compiled module is installed."""

    def __init__(self) -> None:
        names = (
            "quantize",
            "adaln_quant",
            "linear",
            "linear_quant",
            "linear_swiglu_quant",
            "linear_gate_residual",
            "qkv_append",
            "attention",
        )
        super().__init__(
            "cpu",
            {name: getattr(operators, name) for name in names}
            | {"layer": plans.LayerPlan, "block": plans.BlockPlan, "weights": plans.PackedLayer},
        )

    def unavailable(self) -> str | None:
        return native.WHY_NOT

    def declines(self, op: str, spec: OpSpec) -> str | None:
        if spec.device.type != "cpu":
            return f"serves tensors on the CPU, not on {spec.device.type}"
        return None


__all__ = ["CpuBackend"]
