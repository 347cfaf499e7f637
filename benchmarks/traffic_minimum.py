"""What a launch has to read and write: the least bytes, by formula, from its operands.

GEMM::

    ceil(M / BM) * packed W  +  ceil(N / BN) * M * K  +  outputs      [+ residual + gate]

Every row tile reads the packed weights, every column tile the activations. Packed weights are those of the channels
there are, padded along K, scales and positions are left out, and so are the partial sums of a split along K.

Other kernels: what each of their rows (or sequences and heads) needs of the inputs, once, plus the outputs. A vector
that all rows share, such as the weights of a norm, counts for every row: a row is a thread block, and nothing is kept
from one block to the next. ``distinct`` counts every element of an operand once: what comes from memory when the
second-level cache does the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ptq4arvg_kernels.backends.gpu_weights import padded
from ptq4arvg_kernels.backends.triton.launch import Launch
from ptq4arvg_kernels.backends.triton.weights import K_TILE

from .triton_launches import is_gemm

TABLE_ROW = 16  # bytes of a row of a position table: delta, r, zq, bits


@dataclass(frozen=True)
class Minimum:
    """Bytes.

    Attributes:
        requested: the least that blocks can ask for; see the module.
        distinct: the least that comes from and goes to memory.
        epilogue: of the GEMM's residual and gate, which ``requested`` includes.
    """

    requested: int
    distinct: int
    epilogue: int = 0


def _bytes(started: Launch, name: str) -> int:
    """Of one element of an operand; 0 if it is absent."""
    tensor = started.arguments[name]
    return 0 if tensor is None else tensor.element_size()


def gemm(started: Launch) -> Minimum:
    a, c = started.arguments, started.constants
    m, n, k = a["M"], a["N"], a["K"]
    weights = n * padded(k, K_TILE) * c["BITS"] // 8
    width = n // 2 if c["EPILOGUE"] == "swiglu_quant" else n
    outputs = m * width * _bytes(started, "out") + m * _bytes(started, "sums")
    epilogue = m * n * (_bytes(started, "residual") + _bytes(started, "gate"))
    conditions = 0 if a["gate"] is None else len(a["gate"])
    gates = min(conditions, m) * n * _bytes(started, "gate")
    return Minimum(
        a["tiles_m"] * weights + a["tiles_n"] * m * k + outputs + epilogue,
        weights + m * k + outputs + m * n * _bytes(started, "residual") + gates,
        epilogue,
    )


def _row(started: Launch) -> int:
    """What every row of a quantizing kernel reads and writes beside vectors: position, table row, its sum of codes."""
    return _bytes(started, "positions") + TABLE_ROW + _bytes(started, "sums")


def quantize(started: Launch) -> Minimum:
    rows, width = started.arguments["x"].shape
    total = rows * (width * (_bytes(started, "x") + 1) + _row(started))
    return Minimum(total, total)


def adaln_quant(started: Launch) -> Minimum:
    a = started.arguments
    rows, width = a["x"].shape
    own = width * (_bytes(started, "x") + 1) + _row(started) + _bytes(started, "mod_rows")
    vectors = width * (_bytes(started, "weight") + _bytes(started, "bias"))
    modulation = width * (_bytes(started, "mod_scale") + _bytes(started, "mod_shift"))
    conditions = 0 if a["mod_scale"] is None else min(rows, len(a["mod_scale"]))
    return Minimum(rows * (own + vectors + modulation), rows * own + vectors + conditions * modulation)


def _head_vectors(started: Launch) -> int:
    """Weights and biases of the norms of q and k, and the rotation of a position."""
    names = ("q_weight", "q_bias", "k_weight", "k_bias", "rope")
    return sum(started.constants["HEAD_DIM"] * _bytes(started, name) for name in names)


def qkv_append(started: Launch) -> Minimum:
    a, c = started.arguments, started.constants
    rows, heads, width = len(a["qkv"]), a["heads"], c["HEAD_DIM"]
    blocks = started.grid[1]
    own = heads * (4 * width * _bytes(started, "qkv") + 2 * c["PADDED"] + 2 * 8 + _bytes(started, "q_scale"))
    own += blocks * (_bytes(started, "positions") + _bytes(started, "kv_group"))
    vectors = _head_vectors(started)
    return Minimum(rows * (own + blocks * vectors), rows * own + vectors)


def decode(started: Launch) -> Minimum:
    """One query per sequence and head: all visible slots of K and V, once."""
    a, c = started.arguments, started.constants
    pairs, width, item = started.grid[0], c["HEAD_DIM"], _bytes(started, "q")
    slots = int(a["visible_end"].max())
    appended = 2 * c["PADDED"] if c["APPEND"] else 0
    cache = 2 * c["PADDED"] * slots - appended  # the new slot never comes from memory
    query = width * item * (3 if c["APPEND"] else 1)
    output = width if c["QUANTIZE"] else width * item
    tables = 2 * 8 * len(a["k_table"])  # (delta, zq) of keys and values per group
    vectors = _head_vectors(started) if c["APPEND"] else 0
    own = cache + query + output + appended + tables
    return Minimum(pairs * (own + vectors), pairs * own + vectors)


FORMULAS: dict[str, Callable[[Launch], Minimum]] = {
    "quantize_kernel": quantize,
    "adaln_quant_kernel": adaln_quant,
    "qkv_append_kernel": qkv_append,
    "decode_kernel": decode,
}


def minimum(started: Launch) -> Minimum:
    """The least bytes of a launch.

    Raises:
        ValueError: there is no formula for its kernel.
    """
    if is_gemm(started):
        return gemm(started)
    name = started.kernel.__name__
    if name not in FORMULAS:
        raise ValueError(f"no formula for the least bytes of {name}; add it to FORMULAS in {__name__}")
    return FORMULAS[name](started)
