"""Instructions per multiply-accumulate of the CPU's integer layers: ``python -m benchmarks.instructions_cpu``.

Counted by valgrind, so the figures do not depend on the machine's speed or on what else it does. Valgrind knows no
AVX-512: what is counted is the AVX2 kernel, its products, corrections and epilogue, on one thread. Packing the weights
is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WIDTHS = {"W8A8": (8, 8), "W6A8": (6, 8), "W6A6": (6, 6)}
LAYERS = [(widths, rows) for widths in WIDTHS for rows in (2, 64)]
OUT, IN = 256, 1024
KERNEL = "ptq::avx2::linear(ptq::LinearArgs const&, int)"


def run_layer(widths: str, rows: int) -> None:
    """One layer, once: what the process under valgrind does."""
    import torch

    import ptq4arvg_kernels as kernels
    from ptq4arvg_kernels.backends.cpu import native
    from ptq4arvg_kernels.packing import column_sums, pack
    from ptq4arvg_kernels.tables import make_table

    torch.set_num_threads(1)
    w_bits, act_bits = WIDTHS[widths]
    weight = torch.zeros(OUT, IN, dtype=torch.int8)
    codes = torch.zeros(rows, IN, dtype=torch.int8)
    table = make_table(0.02, 2 ** (act_bits - 1), act_bits, [0])
    layer = (pack(weight, w_bits), w_bits, IN, torch.ones(OUT), column_sums(weight), torch.zeros(OUT))
    if not native.module().select("avx2"):
        raise SystemExit("this machine has no AVX2")
    with kernels.use_backend("cpu", strict=True):
        sums = codes.sum(1, dtype=torch.int32)
        kernels.linear(codes, sums, *layer, table, torch.tensor([0]), "none", torch.float32)


def count() -> dict[tuple[str, int], int]:
    """Instructions of one call of the kernel per layer and number of rows, from one process: one dump per call.

    Raises:
        RuntimeError: valgrind failed or counted nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=callgrind", f"--toggle-collect={KERNEL}", f"--dump-after={KERNEL}"]
        command += [
            f"--callgrind-out-file={folder}/out",
            sys.executable,
            "-m",
            "benchmarks.instructions_cpu",
            "--layers",
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PTQ4ARVG_CPU_ISA": "avx2"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        dumps = sorted(Path(folder).glob("out.*"), key=lambda path: int(path.suffix[1:]))
        totals = [re.search(r"^(?:totals|summary): (\d+)", dump.read_text(), re.MULTILINE) for dump in dumps]
    counts = [int(total[1]) for total in totals if total is not None and int(total[1]) > 0]
    if done.returncode != 0 or len(counts) != len(LAYERS):
        raise RuntimeError(f"callgrind counted {counts}; its last words:\n{done.stderr[-2000:]}")
    return dict(zip(LAYERS, counts, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--layers", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.layers:
        for widths, rows in LAYERS:
            run_layer(widths, rows)
        return 0
    if shutil.which("valgrind") is None:
        print("valgrind is not installed; nothing was counted", file=sys.stderr)
        return 1
    figures = []
    print(f"AVX2, {OUT} x {IN}, instructions per multiply-accumulate")
    for (widths, rows), instructions in count().items():
        per_mac = instructions / (rows * OUT * IN)
        figures.append({"layer": widths, "rows": rows, "instructions": instructions, "per_mac": per_mac})
        print(f"  {widths}  M = {rows:<3}  {per_mac:.4f}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"out_features": OUT, "in_features": IN, "figures": figures}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
