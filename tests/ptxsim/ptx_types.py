"""PTX types, their numpy dtypes, and the layout of the address spaces.

PTX ISA, "Fundamental Types" and "Generic Addressing": a generic address inside the window of a space means that space,
anything else is global.
"""

from __future__ import annotations

import numpy as np

# Bits of a register or memory element of each type.
WIDTH = {
    "pred": 1,
    **dict.fromkeys(("b8", "u8", "s8"), 8),
    **dict.fromkeys(("b16", "u16", "s16", "f16", "bf16"), 16),
    **dict.fromkeys(("b32", "u32", "s32", "f32", "f16x2", "bf16x2", "tf32", "u16x2", "s16x2"), 32),
    **dict.fromkeys(("b64", "u64", "s64", "f64", "f32x2"), 64),
    "b128": 128,
}
UINT = {1: np.uint8, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
# Types without a numpy dtype of their own (bf16, packed pairs, tf32) are seen as their bits.
DTYPE = {
    **{name: UINT[bits] for name, bits in WIDTH.items() if bits in UINT and name != "pred"},
    "s8": np.int8,
    "s16": np.int16,
    "s32": np.int32,
    "s64": np.int64,
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,
    "pred": np.bool_,
}
FLOATS = {"f32", "f64", "f16", "bf16", "f16x2", "bf16x2", "f32x2"}

GLOBAL_BASE = 0x7F4000000000  # above 2^32: a pointer truncated to 32 bits faults
SHARED_WINDOW = 0x7F0100000000
LOCAL_WINDOW = 0x7F0200000000
PARAM_WINDOW = 0x7F0300000000  # kernel parameters, read only
WINDOW_BYTES = 1 << 28
SHARED_BASE = 1024  # first byte of a block's own shared memory: the first KiB is the system's
RED_ZONE = 512  # bytes between global allocations

# Shared memory a block can have, in bytes (CUDA programming guide, "Technical Specifications per Compute Capability").
SHARED_LIMIT = {
    "sm_75": 65536,
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_87": 166912,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
}
MAX_SHARED = 232448


def int_range(ty: str) -> tuple[int, int]:
    """Least and greatest value of an integer type."""
    bits = int(ty[1:])
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if ty[0] == "s" else (0, (1 << bits) - 1)
