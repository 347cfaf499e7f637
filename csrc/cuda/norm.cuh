// Rows normalised, modulated and quantized: what adaln_quant (a row per thread block) shares with a GEMM that prepares
// its own activations (norm_tile.cuh). The codes are the same bits, since no result depends on how the work is spread:
// a segment of 256 columns belongs to one warp, eight columns to a lane, always summed in the same order, and the
// segments of a row are joined in a tree.
//
//     layer: c = x - mean(x), c / sqrt(mean(c^2) + eps);   rms: x / sqrt(mean(x^2) + eps)
//
// Statistics take one pass over the registers. A segment is centred on its own mean m_s, and the squares are moved to
// the mean of the row afterwards (Chan, Golub, LeVeque 1979; n_s columns in segment s):
//
//     sum_i (x_i - mean)^2 = sum_s [ sum_{i in s} (x_i - m_s)^2 + n_s (m_s - mean)^2 ]
//
// which cancels nothing, unlike mean(x^2) - mean(x)^2.
#pragma once

#include "octets.cuh"
#include "rows_params.h"

namespace ptq::cuda {

static_assert(ROW_SEGMENT == SEGMENT, "plans and kernels agree");

// Of one segment: its sum (layer only), and the squares of its distances from its own mean, or from 0 (rms).
struct alignas(8) Moments {
    float sum, squares;
};

__device__ __forceinline__ int row_segments(int width) {
    return (width + SEGMENT - 1) / SEGMENT;
}
__device__ __forceinline__ int segment_columns(int width, int segment) {
    return min(width - segment * SEGMENT, SEGMENT);
}
// A row ends with an incomplete segment or none; the others are divided by a power of two.
__device__ __forceinline__ float segment_mean(float sum, int columns) {
    return columns == SEGMENT ? sum * (1.0f / SEGMENT) : __fdiv_rn(sum, static_cast<float>(columns));
}

// Moments of N segments at once, so that their shuffles overlap. `count`: how many of this lane's columns exist, and
// x is 0 in the others; `columns`: of the segment, at least 1 (of one that does not exist, anything). Every lane gets
// them.
template <int N>
__device__ __forceinline__ void segment_moments(const float (&x)[N][OCTET], const int (&count)[N],
                                                const int (&columns)[N], NormKind kind, Moments (&m)[N]) {
    if (kind == NormKind::rms) {
#pragma unroll
        for (int n = 0; n < N; ++n) m[n] = {0.0f, octet_square_sum(x[n])};
    } else {
#pragma unroll
        for (int n = 0; n < N; ++n) m[n].sum = octet_sum(x[n]);
#pragma unroll
        for (int offset = 16; offset > 0; offset >>= 1) {
#pragma unroll
            for (int n = 0; n < N; ++n) m[n].sum += __shfl_xor_sync(FULL_WARP, m[n].sum, offset);
        }
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const float mean = segment_mean(m[n].sum, columns[n]);
            float c[OCTET];
#pragma unroll
            for (int i = 0; i < OCTET; ++i) c[i] = x[n][i] - mean;
            if (columns[n] < SEGMENT) {
#pragma unroll
                for (int i = 0; i < OCTET; ++i) c[i] = i < count[n] ? c[i] : 0.0f;
            }
            m[n].squares = octet_square_sum(c);
        }
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) {
#pragma unroll
        for (int n = 0; n < N; ++n) m[n].squares += __shfl_xor_sync(FULL_WARP, m[n].squares, offset);
    }
}

// n_s (m_s - mean)^2; 0 for a segment that does not exist
__device__ __forceinline__ float moved_squares(float sum, int columns, float mean) {
    if (columns <= 0) return 0.0f;
    const float distance = segment_mean(sum, columns) - mean;
    return static_cast<float>(columns) * (distance * distance);
}

struct alignas(8) RowNorm {
    float mean, rstd;
};

// Lanes that join the moments of a row: one per segment, two segments from the 33rd on.
__device__ __forceinline__ int row_group(int segments) {
    int group = 1;
    while (group < segments && group < 32) group *= 2;
    return group;
}

// By all lanes of a warp, whose groups of lanes (row_group) may look at different rows.
__device__ __forceinline__ RowNorm join_moments(const Moments* moments, int width, NormKind kind, float eps) {
    const int segments = row_segments(width), group = row_group(segments);
    const int first = static_cast<int>(threadIdx.x) & (group - 1), second = first + 32;
    const Moments a = first < segments ? moments[first] : Moments{0.0f, 0.0f};
    const Moments b = second < segments ? moments[second] : Moments{0.0f, 0.0f};
    float mean = 0.0f, squares = a.squares + b.squares;
    if (kind == NormKind::layer) {
        mean = __fdiv_rn(group_sum(a.sum + b.sum, group), static_cast<float>(width));
        squares += moved_squares(a.sum, segment_columns(width, first), mean);
        squares += moved_squares(b.sum, segment_columns(width, second), mean);
    }
    const float variance = __fdiv_rn(group_sum(squares, group), static_cast<float>(width));
    return {mean, __frcp_rn(__fsqrt_rn(variance + eps))};
}

// Eight columns of what is applied to a normalised row.
struct Affine {
    Raw<OCTET> weight, bias, scale, shift;
};

template <Aligned ALIGNED>
__device__ __forceinline__ Affine fetch_affine(const NormPointers& in, const NormSettings& norm, int64_t mod_row,
                                               int column, int count) {
    Affine a = {};
    const auto octet_of = [&](const void* p, DType dtype, int64_t i) {
        return fetch_octet<ALIGNED>(at(p, dtype, i), dtype, count);
    };
    if (in.scale) {
        a.scale = octet_of(in.scale, norm.mod_dtype, mod_row * norm.scale_stride + column);
        a.shift = octet_of(in.shift, norm.mod_dtype, mod_row * norm.shift_stride + column);
    }
    if (in.weight) a.weight = octet_of(in.weight, norm.weight_dtype, column);
    if (in.bias) a.bias = octet_of(in.bias, norm.bias_dtype, column);
    return a;
}

// Every operation rounds once, in the order of the formula.
__device__ __forceinline__ void normalise(float (&x)[OCTET], const RowNorm& row, const Affine& affine,
                                          const NormPointers& in, const NormSettings& norm) {
#pragma unroll
    for (int i = 0; i < OCTET; ++i) x[i] = (x[i] - row.mean) * row.rstd;
    float v[OCTET];
    if (in.weight) {
        widen(affine.weight, norm.weight_dtype, v);
#pragma unroll
        for (int i = 0; i < OCTET; ++i) x[i] = x[i] * v[i];
    }
    if (in.bias) {
        widen(affine.bias, norm.bias_dtype, v);
#pragma unroll
        for (int i = 0; i < OCTET; ++i) x[i] = x[i] + v[i];
    }
    if (in.scale) {
        widen(affine.scale, norm.mod_dtype, v);
#pragma unroll
        for (int i = 0; i < OCTET; ++i) x[i] = x[i] * (norm.offset + v[i]);
        widen(affine.shift, norm.mod_dtype, v);
#pragma unroll
        for (int i = 0; i < OCTET; ++i) x[i] = x[i] + v[i];
    }
}

}  // namespace ptq::cuda
