"""GPUs by published figures: what predictions and the choice of tiles depend on. Nothing here was measured."""

from __future__ import annotations

from dataclasses import dataclass

from ptq4arvg_kernels.backends.gpu import SHARED_BYTES, Device


@dataclass(frozen=True)
class Gpu:
    """A GPU as its maker describes it.

    Attributes:
        name: short name.
        capability: compute capability, major * 10 + minor.
        multiprocessors: streaming multiprocessors.
        clock_ghz: boost clock; all rates below are at this clock.
        memory_gb_s: bandwidth of device memory, 10^9 bytes per second.
        l2_mb: second-level cache, MiB.
        int8_tops, fp16_tflops: dense tensor-core rates, two operations per multiply-add; fp16 with fp32 accumulation.
        source: where the figures are from.
    """

    name: str
    capability: int
    multiprocessors: int
    clock_ghz: float
    memory_gb_s: float
    l2_mb: float
    int8_tops: float
    fp16_tflops: float
    source: str

    def device(self) -> Device:
        """What the dispatcher of the Triton backend sees."""
        return Device(self.capability, self.multiprocessors, SHARED_BYTES[self.capability], self.name)


# Warp instructions that a multiprocessor issues per clock: four schedulers, one each (CUDA C++ programming guide,
# section "Compute capabilities", for 8.x and 9.0).
ISSUE_PER_CLOCK = 4

# The GPUs that predictions are made for.
GPUS: tuple[Gpu, ...] = (
    # NVIDIA Ampere GA102 GPU architecture whitepaper, table "GeForce RTX 3090": 82 SMs, 1695 MHz, 19.5 Gbit/s on 384
    # bits, 6144 KB L2, 284 INT8 TOPS and 71 FP16 TFLOPS with FP32 accumulation without sparsity.
    Gpu("RTX 3090", 86, 82, 1.695, 936.0, 6, 284.0, 71.0, "NVIDIA Ampere GA102 whitepaper"),
    # NVIDIA Ada GPU architecture whitepaper, table "GeForce RTX 4090": 128 SMs, 2520 MHz, 21 Gbit/s on 384 bits,
    # 73728 KB L2, 660.6 INT8 TOPS and 165.2 FP16 TFLOPS with FP32 accumulation without sparsity.
    Gpu("RTX 4090", 89, 128, 2.52, 1008.0, 72, 660.6, 165.2, "NVIDIA Ada whitepaper"),
    # NVIDIA A100 Tensor Core GPU architecture whitepaper, 40 GB SXM4: 108 SMs, 1410 MHz, 1555 GB/s, 40 MB L2,
    # 624 INT8 TOPS and 312 FP16 TFLOPS without sparsity.
    Gpu("A100", 80, 108, 1.41, 1555.0, 40, 624.0, 312.0, "NVIDIA A100 whitepaper (40 GB SXM4)"),
    # NVIDIA H100 Tensor Core GPU architecture whitepaper, SXM5: 132 SMs, 1830 MHz (which its 1978.9 INT8 TOPS imply),
    # 3352 GB/s of HBM3, 50 MB L2, 989.4 FP16 TFLOPS without sparsity.
    Gpu("H100", 90, 132, 1.83, 3352.0, 50, 1978.9, 989.4, "NVIDIA H100 whitepaper (SXM5)"),
    # NVIDIA L4 datasheet (242 INT8 TOPS and 121 FP16 TFLOPS without sparsity, 300 GB/s) and the Ada whitepaper's AD104
    # with 58 of its SMs at 2040 MHz and 48 MB L2.
    Gpu("L4", 89, 58, 2.04, 300.0, 48, 242.0, 121.0, "NVIDIA L4 datasheet, NVIDIA Ada whitepaper"),
)

# Multiprocessors of a GPU of each compute capability that the resource table is made for; the choice of tiles looks at
# nothing else. 100: B200, 148; 120: GeForce RTX 5090, 170 (NVIDIA Blackwell and RTX Blackwell whitepapers).
ARCHITECTURES: dict[int, Device] = {
    80: Device(80, 108, SHARED_BYTES[80], "A100"),
    86: Device(86, 82, SHARED_BYTES[86], "RTX 3090"),
    89: Device(89, 128, SHARED_BYTES[89], "RTX 4090"),
    90: Device(90, 132, SHARED_BYTES[90], "H100"),
    100: Device(100, 148, SHARED_BYTES[100], "B200"),
    120: Device(120, 170, SHARED_BYTES[120], "RTX 5090"),
}


def gpu(name: str) -> Gpu:
    """The GPU called ``name``.

    Raises:
        ValueError: unknown name.
    """
    for known in GPUS:
        if known.name.lower() == name.lower():
            return known
    raise ValueError(f"unknown GPU {name!r}; known are {', '.join(known.name for known in GPUS)}")


def matching(name: str) -> Gpu | None:
    """The GPU whose name is part of what torch calls a device; None if its limits are not known here."""
    return next((known for known in GPUS if known.name.lower() in name.lower()), None)
