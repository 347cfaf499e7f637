// The activation tile of a GEMM from the rows of a residual stream: normalised, modulated and quantized by all warps of
// the thread block, with the codes that adaln_quant gives, to the last bit (norm.cuh).
//
// Every thread block of the GEMM does that for itself, which for few rows costs less than a launch of its own.
#pragma once

#include "norm.cuh"

namespace ptq::cuda {

// Shared memory: of ROWS rows of at most SEGMENTS segments.
template <int ROWS, int SEGMENTS>
struct NormScratch {
    Moments moments[ROWS * SEGMENTS];
    RowNorm norms[ROWS];
    Grid grids[ROWS];
};

// The work in pieces, a segment of a row each, row by row; a warp takes every WARPS-th.
struct Pieces {
    int segments, count, reciprocal;

    __device__ __forceinline__ Pieces(int width, int rows)
        : segments(row_segments(width)), count(rows * segments), reciprocal((1 << 20) / segments + 1) {}
    // piece / segments, for fewer than 1024 pieces of at most 64 segments
    __device__ __forceinline__ int row(int piece) const { return piece * reciprocal >> 20; }
    __device__ __forceinline__ int segment(int piece) const { return piece - row(piece) * segments; }
};

// An octet per lane of a segment, of rows `stride` elements apart.
struct SegmentReader {
    const char* lane0;
    DType dtype;
    int segment_bytes;
    int64_t row_bytes;

    __device__ __forceinline__ SegmentReader(const void* rows, DType dtype, int64_t stride)
        : dtype(dtype),
          segment_bytes(SEGMENT * static_cast<int>(dtype_size(dtype))),
          row_bytes(stride * dtype_size(dtype)) {
        lane0 = static_cast<const char*>(rows) + (threadIdx.x & 31) * (OCTET * dtype_size(dtype));
    }
    __device__ __forceinline__ Raw<OCTET> operator()(int row, int segment) const {
        return fetch<OCTET>(lane0 + row * row_bytes + static_cast<int64_t>(segment) * segment_bytes, dtype);
    }
};

struct Nothing {
    __device__ __forceinline__ void operator()() const {}
};

// Rows [first_row, first_row + rows) into a tile of `tile_rows` rows and `padded` columns; what does not exist becomes
// 0. The width is a multiple of 8 and every octet of every operand begins at a multiple of 16 bytes; rows <= ROWS
// <= 32.
//
//     place(row, column): where eight codes go, row counted from first_row, column a multiple of 8
//     meanwhile(): other work of the thread block, done while the first loads are on their way
//
// Two barriers, both after meanwhile(); the tile may be read after one more. grids of the scratch are those of the
// rows.
template <int WARPS, int ROWS, int SEGMENTS, typename Place, typename Meanwhile = Nothing>
__device__ __forceinline__ void norm_quantize_tile(const NormPointers& in, const NormSettings& norm, const Grid* table,
                                                   const void* positions, const GridSettings& settings,
                                                   int64_t first_row, int rows, int tile_rows, int padded,
                                                   NormScratch<ROWS, SEGMENTS>& scratch, const Place& place,
                                                   const Meanwhile& meanwhile = {}) {
    static_assert(ROWS <= 32 && ROWS * SEGMENTS < 1024, "a lane per row; see Pieces");
    constexpr int AHEAD = 4;  // loads of a warp on their way at once
    const int thread = static_cast<int>(threadIdx.x), warp = thread >> 5, lane = thread & 31;
    const Pieces pieces(norm.width, rows);
    const SegmentReader x_rows(at(in.x, norm.x_dtype, first_row * norm.x_stride), norm.x_dtype, norm.x_stride);
    const SegmentReader scales(in.scale, norm.mod_dtype, norm.scale_stride);
    const SegmentReader shifts(in.shift, norm.mod_dtype, norm.shift_stride);
    const SegmentReader weight(in.weight, norm.weight_dtype, 0), bias(in.bias, norm.bias_dtype, 0);

    // Loads first, those that others wait for before all: as in adaln_quant.
    const bool has_row = thread < rows;
    const uint32_t turn = has_row ? (static_cast<uint32_t>(first_row) + thread) % settings.period : 0;
    const PositionLoad position(positions, settings.wide, turn, has_row);
    int32_t mod_row = static_cast<int32_t>(first_row) + lane;  // of row `lane`
    if (in.mod_rows && lane < rows) mod_row = in.mod_rows[first_row + lane];

    const auto column_of = [&](int piece) { return pieces.segment(piece) * SEGMENT + lane * OCTET; };
    // Zeros behind the end of a row, and behind the last piece.
    const auto fetch_x = [&](int piece) {
        Raw<OCTET> raw = {};
        if (piece < pieces.count && column_of(piece) < norm.width) {
            raw = x_rows(pieces.row(piece), pieces.segment(piece));
        }
        return raw;
    };
    const Raw<OCTET> first_x = fetch_x(warp);
    Grid grid;
    if (has_row) grid = load_grid(table + clamp_index(position.value(), settings.length));
    if (in.mod_rows) mod_row = static_cast<int32_t>(clamp_index(mod_row, norm.mod_count));
    const auto fetch_affine_of = [&](int piece) {
        const int segment = pieces.segment(piece), picked = __shfl_sync(FULL_WARP, mod_row, pieces.row(piece));
        Affine affine = {};
        if (piece >= pieces.count || column_of(piece) >= norm.width) return affine;
        if (in.scale) {
            affine.scale = scales(picked, segment);
            affine.shift = shifts(picked, segment);
        }
        if (in.weight) affine.weight = weight(0, segment);
        if (in.bias) affine.bias = bias(0, segment);
        return affine;
    };
    const Affine first_affine = fetch_affine_of(warp);
    if (has_row) scratch.grids[thread] = grid;
    meanwhile();

    const auto moments_of = [&](const auto& raw, int begin) {
        constexpr int N = sizeof(raw) / sizeof(Raw<OCTET>);
        float x[N][OCTET];
        int count[N], columns[N];
        Moments m[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            widen(raw[i], norm.x_dtype, x[i]);
            count[i] = norm.width - column_of(begin + i * WARPS);
            columns[i] = segment_columns(norm.width, pieces.segment(begin + i * WARPS));
        }
        segment_moments(x, count, columns, norm.kind, m);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const int piece = begin + i * WARPS;
            if (lane == 0 && piece < pieces.count) scratch.moments[piece] = m[i];
        }
    };
    if (pieces.count <= 2 * WARPS) {
        const Raw<OCTET> raw[2] = {first_x, fetch_x(warp + WARPS)};
        moments_of(raw, warp);
    } else {
        for (int begin = warp; begin < pieces.count; begin += AHEAD * WARPS) {
            Raw<OCTET> raw[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) raw[i] = i == 0 && begin == warp ? first_x : fetch_x(begin + i * WARPS);
            moments_of(raw, begin);
        }
    }
    __syncthreads();

    const int group = row_group(pieces.segments), groups = 32 / group;
    for (int some = warp * groups; some < rows; some += WARPS * groups) {
        const int row = some + lane / group;
        const RowNorm joined =
            join_moments(scratch.moments + min(row, rows - 1) * pieces.segments, norm.width, norm.kind, norm.eps);
        if (lane % group == 0 && row < rows) scratch.norms[row] = joined;
    }
    __syncthreads();

    Raw<OCTET> next_x = first_x;
    Affine next_affine = first_affine;
    for (int piece = warp; piece < pieces.count; piece += WARPS) {
        float x[OCTET];
        widen(next_x, norm.x_dtype, x);
        const Affine affine = next_affine;
        next_x = fetch_x(piece + WARPS);
        next_affine = fetch_affine_of(piece + WARPS);
        const int row = pieces.row(piece), column = column_of(piece);
        normalise(x, scratch.norms[row], affine, in, norm);
        uint32_t codes[2];
        to_codes(Quantizer(scratch.grids[row]), x, codes);
        if (column < norm.width) store_words<2>(place(row, column), codes);
    }

    const uint32_t zero[2] = {0, 0};
    const int missing = (padded - norm.width) / OCTET, octets = padded / OCTET;
    for (int i = thread; i < rows * missing; i += 32 * WARPS) {
        store_words<2>(place(i / missing, norm.width + i % missing * OCTET), zero);
    }
    for (int i = thread; i < (tile_rows - rows) * octets; i += 32 * WARPS) {
        store_words<2>(place(rows + i / octets, i % octets * OCTET), zero);
    }
}

}  // namespace ptq::cuda
