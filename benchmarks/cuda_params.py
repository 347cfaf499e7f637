"""Parameters of the CUDA backend's launches, read from their bytes: the structs of csrc/cuda/*_params.h."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import Structure, c_float, c_int, c_int64, c_uint32, c_void_p

import torch
from torch import Tensor

from ptq4arvg_kernels.backends.cuda.native import Launch

DTYPE_BYTES = (4, 2, 2)  # by the number of csrc/types.h
NORM_POINTERS = ("x", "weight", "bias", "scale", "shift", "mod_rows")


class NormSettings(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("x_stride", "scale_stride", "shift_stride", "mod_count")),
        ("width", c_int),
        ("kind", c_int),
        ("eps", c_float),
        ("offset", c_float),
        *((name, c_int) for name in ("x_dtype", "weight_dtype", "bias_dtype", "mod_dtype")),
    )


class GridSettings(Structure):
    _fields_ = (("length", c_int64), ("period", c_uint32), ("wide", c_int))


class CacheStrides(Structure):
    _fields_ = (("batch", c_int64), ("head", c_int64))


def _pointers(*names: str) -> tuple[tuple[str, type], ...]:
    return tuple((name, c_void_p) for name in names)


class GemmParams(Structure):
    _fields_ = (
        *_pointers("codes", "weights", "out", "sums", "scale", "col_sums", "bias", "table", "positions", "out_table"),
        *_pointers("gate", "gate_rows", "residual", "partial", "counters"),
        *_pointers(*(f"norm_{name}" for name in NORM_POINTERS)),
        *((name, c_int64) for name in ("rows", "codes_stride", "gate_count", "gate_stride", "out_length")),
        *((name, c_int) for name in ("channels", "width", "bricks", "part_bricks", "paired")),
        ("grids", GridSettings),
        *((name, c_int) for name in ("activation", "out_dtype", "gate_dtype")),
        ("norm", NormSettings),
    )


class AdalnParams(Structure):
    _fields_ = (
        *_pointers(*(f"norm_{name}" for name in NORM_POINTERS), "table", "positions", "codes", "sums"),
        ("norm", NormSettings),
        ("grids", GridSettings),
    )


class QuantizeParams(Structure):
    _fields_ = (
        *_pointers("x", "table", "positions", "codes", "sums"),
        ("x_stride", c_int64),
        *((name, c_int) for name in ("width", "x_dtype", "activation")),
        ("grids", GridSettings),
    )


_HEAD_POINTERS = ("q_weight", "q_bias", "k_weight", "k_bias", "q_scale", "rope")
_HEAD_DTYPES = tuple(f"{name}_dtype" for name in _HEAD_POINTERS)


class AppendParams(Structure):
    _fields_ = (
        *_pointers("qkv", "q", "k_cache", "v_cache", "positions", "k_table", "v_table", "kv_group", *_HEAD_POINTERS),
        ("k", CacheStrides),
        ("v", CacheStrides),
        ("slots", c_int64),
        ("items", c_int64),
        ("groups", c_int),
        ("heads", c_uint32),
        ("period", c_uint32),
        ("head_dim", c_int),
        ("lanes", c_int),
        ("kind", c_int),
        ("eps", c_float),
        ("wide", c_int),
        *((name, c_int) for name in ("dtype", *_HEAD_DTYPES)),
    )


class AttentionParams(Structure):
    _fields_ = (
        *_pointers("q", "k_cache", "v_cache", "out", "sums", "visible_end", "positions", "k_table", "v_table"),
        *_pointers("kv_group", *_HEAD_POINTERS, "out_table", "workspace", "counters"),
        ("k", CacheStrides),
        ("v", CacheStrides),
        *((name, c_int64) for name in ("slots", "out_length", "pairs")),
        *((name, c_int) for name in ("span", "edge", "groups")),
        ("heads", c_uint32),
        ("period", c_uint32),
        ("head_dim", c_int),
        ("lanes", c_int),
        *((name, c_float) for name in ("scale_high", "scale_low", "eps")),
        *((name, c_int) for name in ("grouping", "kind", "append", "wide", "dtype", *_HEAD_DTYPES)),
    )


Params = GemmParams | AdalnParams | QuantizeParams | AppendParams | AttentionParams
# By the beginning of the kernel's name.
_STRUCTS: dict[str, type[Params]] = {
    "gemm_": GemmParams,
    "adaln_quant_": AdalnParams,
    "quantize": QuantizeParams,
    "qkv_append": AppendParams,
    "decode_d": AttentionParams,
    "block_attention_d": AttentionParams,
}


def params(launch: Launch) -> Params:
    """The parameters of a launch.

    Raises:
        ValueError: an unknown kernel, or its parameters have another size than here: csrc/cuda/*_params.h changed.
    """
    for beginning, struct in _STRUCTS.items():
        if launch.name.startswith(beginning):
            pointers = sum(kind is c_void_p for _, kind in struct._fields_)  # type: ignore[misc]
            if (ctypes.sizeof(struct), pointers) != (len(launch.params), launch.pointers):
                raise ValueError(
                    f"{launch.name}: its parameters have {len(launch.params)} bytes and {launch.pointers} pointers, "
                    f"{struct.__name__} in {__name__} {ctypes.sizeof(struct)} and {pointers}"
                )
            return struct.from_buffer_copy(launch.params)
    raise ValueError(f"the parameters of {launch.name} are not known in {__name__}")


def operand(address: int | None, operands: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The operand of this dtype that begins at an address.

    Raises:
        ValueError: there is none.
    """
    for tensor in operands:
        if tensor.data_ptr() == address and tensor.dtype == dtype:
            return tensor
    raise ValueError(f"no operand of {dtype} begins at {address}")
