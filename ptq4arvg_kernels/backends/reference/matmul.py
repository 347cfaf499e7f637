"""Exact integer matrix products, and the precision wide enough to make floating sums independent of their order."""

import torch
from torch import Tensor

# 1024 products of at most 128 * 128 sum to at most 2^24, so every partial sum is an integer float32 holds exactly.
FLOAT32_CHUNK = 1024


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device has it, else float32."""
    return torch.float32 if device.type == "mps" else torch.float64


def _by_float64(codes: Tensor, weight: Tensor) -> Tensor:
    return (codes.to(torch.float64) @ weight.to(torch.float64).t()).to(torch.int32)


def _by_float32_chunks(codes: Tensor, weight: Tensor) -> Tensor:
    acc = torch.zeros(codes.shape[0], weight.shape[0], dtype=torch.int32, device=codes.device)
    for start in range(0, codes.shape[1], FLOAT32_CHUNK):
        part = slice(start, start + FLOAT32_CHUNK)
        acc += (codes[:, part].to(torch.float32) @ weight[:, part].to(torch.float32).t()).to(torch.int32)
    return acc


def int_matmul(codes: Tensor, weight: Tensor) -> Tensor:
    """``acc[i, j] = sum_k codes[i, k] * weight[j, k]``, exact int32 ``[M, N]`` of int8 ``[M, K]`` and ``[N, K]``.

    Any int8 values, including -128 on both sides. The CPU multiplies int32 matrices; other devices lack that, so there
    the products are summed in float64 (exact below 2^53), or in float32 in chunks where float64 is missing.
    ``torch._int_mm`` is avoided: its shape restrictions and availability differ between devices and versions.
    """
    if codes.device.type == "cpu":
        return codes.to(torch.int32) @ weight.to(torch.int32).t()
    if wide_dtype(codes.device) == torch.float64:
        return _by_float64(codes, weight)
    return _by_float32_chunks(codes, weight)
