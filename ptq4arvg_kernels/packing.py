"""Storage formats of weights and of the key/value cache: the single source of truth for every layout.

Weights, ``FORMAT_VERSION`` 1. Row-major ``uint8 [N, bytes]``, one row per output channel; K is padded with code 0 to a
multiple of ``K_ALIGN``, N is not padded.

* 8 bits: one two's-complement byte per code, codes -127 to 127. The byte 0x80 (-128) never occurs: the weight grid is
  symmetric, and kernels that move the sign of an activation onto the weight rely on it.
* 6 bits: four consecutive codes k..k+3 in three bytes. With ``u = w + 32``, codes -31 to 31, so 1 <= u <= 63:
  ``byte i = u_i | ((u_3 >> 2 i) & 3) << 6`` for i = 0, 1, 2. u = 0 never occurs, so a run of zero bytes (a truncated or
  blanked file) is detected.

Key/value cache: int8 ``[B, H, S, dp]`` with dp = :func:`padded_head_dim` of the head dimension, padding lanes 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

FORMAT_VERSION = 1
K_ALIGN = 32
WEIGHT_BITS: tuple[int, ...] = (6, 8)
HEAD_ALIGN = 16
# |acc| <= 8704 * 128 * 127 < 2^28 leaves the factor 4 of left-justified 6-bit weights and the zero-point term in int32.
MAX_IN_FEATURES = 8704


def _check_bits(what: str, bits: int) -> None:
    if bits not in WEIGHT_BITS:
        raise ValueError(f"{what}: weight bits is {bits}, supported are 6 and 8")


def _check_in_features(what: str, in_features: int) -> None:
    if not 1 <= in_features <= MAX_IN_FEATURES:
        raise ValueError(
            f"{what}: in_features is {in_features}, supported are 1 to {MAX_IN_FEATURES}; split a longer layer along K"
        )


def padded_in_features(in_features: int) -> int:
    """K rounded up to a multiple of ``K_ALIGN``."""
    return -(-in_features // K_ALIGN) * K_ALIGN


def padded_head_dim(head_dim: int) -> int:
    """Head dimension rounded up to the 16 bytes of a cache row (88 -> 96, 100 -> 112)."""
    return -(-head_dim // HEAD_ALIGN) * HEAD_ALIGN


def packed_row_bytes(in_features: int, bits: int) -> int:
    """Bytes of one packed row of ``in_features`` codes.

    Raises:
        ValueError: ``bits`` is not 6 or 8, or ``in_features`` is outside 1 to ``MAX_IN_FEATURES``.
    """
    _check_bits("packed_row_bytes", bits)
    _check_in_features("packed_row_bytes", in_features)
    return padded_in_features(in_features) * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack symmetric weight codes.

    Args:
        codes: int8 ``[N, K]``, each in ``[-(2^(bits-1) - 1), 2^(bits-1) - 1]``.
        bits: 6 or 8.

    Returns:
        uint8 ``[N, packed_row_bytes(K, bits)]``.

    Raises:
        TypeError: codes are not int8.
        ValueError: wrong number of dimensions, unsupported ``bits`` or K, or a code outside the symmetric grid.
    """
    _check_bits("pack", bits)
    if codes.dtype != torch.int8:
        raise TypeError(f"pack: codes have dtype {codes.dtype}, expected int8; quantize the weight first")
    if codes.dim() != 2:
        raise ValueError(f"pack: codes have shape {tuple(codes.shape)}, expected [N, K]")
    _check_in_features("pack", codes.shape[1])
    limit = 2 ** (bits - 1) - 1
    outside = (codes < -limit) | (codes > limit)
    if bool(outside.any()):
        row, column = outside.nonzero()[0].tolist()
        raise ValueError(
            f"pack: code {int(codes[row, column])} at row {row}, column {column} is outside the symmetric {bits}-bit "
            f"grid -{limit} to {limit}; asymmetric weights cannot be packed"
        )
    padded = torch.nn.functional.pad(codes, (0, padded_in_features(codes.shape[1]) - codes.shape[1]))
    if bits == 8:
        return padded.contiguous().view(torch.uint8)
    u = (padded.to(torch.int16) + 32).to(torch.uint8).reshape(codes.shape[0], padded.shape[1] // 4, 4)
    last = u[..., 3]
    columns = [u[..., i] | (((last >> (2 * i)) & 3) << 6) for i in range(3)]
    return torch.stack(columns, dim=-1).reshape(codes.shape[0], padded.shape[1] // 4 * 3)


def unpack(qweight: Tensor, bits: int, in_features: int) -> Tensor:
    """Undo :func:`pack`; returns int8 ``[N, in_features]``.

    Raises:
        TypeError: ``qweight`` is not uint8.
        ValueError: the row length does not fit ``in_features`` and ``bits``, or the bytes cannot have come from
            :func:`pack` (a forbidden code, or padding that is not 0): the file is corrupt or of another format.
    """
    expected = packed_row_bytes(in_features, bits)
    if qweight.dtype != torch.uint8:
        raise TypeError(f"unpack: qweight has dtype {qweight.dtype}, expected uint8")
    if qweight.dim() != 2 or qweight.shape[1] != expected:
        raise ValueError(
            f"unpack: qweight has shape {tuple(qweight.shape)}, expected [N, {expected}] for in_features {in_features} "
            f"at {bits} bits; check in_features and bits against the checkpoint"
        )
    padded = padded_in_features(in_features)
    if bits == 8:
        codes = qweight.contiguous().view(torch.int8)
        forbidden = codes == -128
    else:
        groups = qweight.reshape(qweight.shape[0], padded // 4, 3)
        spare = groups >> 6
        last = spare[..., 0] | (spare[..., 1] << 2) | (spare[..., 2] << 4)
        u = torch.cat([groups & 63, last.unsqueeze(-1)], dim=-1).reshape(qweight.shape[0], padded)
        codes = u.to(torch.int8) - 32
        forbidden = u == 0
    if bool(forbidden.any()):
        row, column = forbidden.nonzero()[0].tolist()
        raise ValueError(
            f"unpack: row {row}, column {column} holds {int(codes[row, column])}, which a symmetric {bits}-bit weight "
            "never contains; the packed data is corrupt (truncated file?) or of another format"
        )
    if padded > in_features and bool(codes[:, in_features:].any()):
        row = int(codes[:, in_features:].any(1).nonzero()[0, 0])
        raise ValueError(
            f"unpack: row {row} has non-zero codes in the padding behind column {in_features - 1}; the packed data is "
            "corrupt or in_features is wrong"
        )
    return codes[:, :in_features].contiguous()


def column_sums(codes: Tensor) -> Tensor:
    """``C_j = sum_k w_jk`` of weight codes int8 ``[N, K]``, int32 ``[N]``: the zero-point correction of every layer.

    Raises:
        TypeError: codes are not int8.
        ValueError: codes are not two-dimensional.
    """
    if codes.dtype != torch.int8:
        raise TypeError(f"column_sums: codes have dtype {codes.dtype}, expected int8")
    if codes.dim() != 2:
        raise ValueError(f"column_sums: codes have shape {tuple(codes.shape)}, expected [N, K]")
    return codes.sum(1, dtype=torch.int32)
