"""Speed of the emulator on an int8 GEMM: python -m tests.ptxsim.bench"""

from __future__ import annotations

from typing import Any

import torch

from tests.ptxsim.triton_cases import int8_gemm
from tests.ptxsim.triton_launcher import compile_kernel

ROWS, COLUMNS, INNER = 64, 512, 1024
WAYS: list[dict[str, Any]] = [
    {},
    {"hazards": "off"},
    {"batch": 1},
    {"batch": 4},
    {"workers": 2},
    {"schedule": "warp_serial", "batch": 1},
]


def main() -> None:
    """Best of three launches for each way to run."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-128, 128, (n, INNER), generator=generator).to(torch.int8) for n in (ROWS, COLUMNS))
    c = torch.zeros(ROWS, COLUMNS, dtype=torch.int32)
    arguments = {"a": a, "b": b, "c": c, "M": ROWS, "N": COLUMNS, "K": INNER, "BM": 64, "BN": 64, "BK": 64}
    compiled, _ = compile_kernel(int8_gemm, arguments, 4, 3)
    for options in WAYS:
        results = [compiled.launch((1, 8), [a, b, c, ROWS, COLUMNS, INNER], **options) for _ in range(3)]
        best = min(results, key=lambda result: result.seconds)
        rate = best.warp_insts / best.seconds
        print(f"{options!s:<45} {best.seconds:.3f} s  {rate:10.0f} warp instructions/s")


if __name__ == "__main__":
    main()
