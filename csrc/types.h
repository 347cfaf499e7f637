// Plain descriptions of operands: what crosses from the bindings to the kernels of the CPU and of CUDA. No torch, no
// templates of the standard library: this header is compiled once per instruction set, and inline functions of the
// library would be merged across those compilations by the linker.
#pragma once

#include <cstddef>
#include <cstdint>

// Also at -O0: a function shared between the instruction sets must not exist outside its callers.
#ifdef __CUDACC__
#define PTQ_INLINE __host__ __device__ __forceinline__
#else
#define PTQ_INLINE inline __attribute__((always_inline))
#endif

namespace ptq {

PTQ_INLINE int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}
PTQ_INLINE int64_t larger(int64_t a, int64_t b) {
    return a > b ? a : b;
}
PTQ_INLINE int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2 };
enum class Activation : int { none = 0, silu = 1, gelu_erf = 2, gelu_tanh = 3 };
enum class NormKind : int { layer = 0, rms = 1 };
enum class QkKind : int { none = 0, layer_norm = 1, l2 = 2, rope = 3 };

PTQ_INLINE int64_t dtype_size(DType dtype) {
    return dtype == DType::f32 ? 4 : 2;
}

// Rows of floating-point numbers [rows, width], unit stride inside a row. data == nullptr: absent.
struct Rows {
    const void* data = nullptr;
    DType dtype = DType::f32;
    int64_t stride = 0;  // elements from one row to the next

    PTQ_INLINE const void* row(int64_t i) const {
        return static_cast<const char*>(data) + i * stride * dtype_size(dtype);
    }
};

struct MutableRows {
    void* data = nullptr;
    DType dtype = DType::f32;
    int64_t stride = 0;

    PTQ_INLINE void* row(int64_t i) const { return static_cast<char*>(data) + i * stride * dtype_size(dtype); }
};

// A vector [width] of floating-point numbers. data == nullptr: absent.
struct Vector {
    const void* data = nullptr;
    DType dtype = DType::f32;
};

// Sequence positions of the rows of a batch-major operand: row i sits at at(i % count).
struct Positions {
    const void* data = nullptr;
    bool wide = true;  // int64, else int32
    int64_t count = 0;

    PTQ_INLINE int64_t at(int64_t i) const {
        return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
    }
    PTQ_INLINE int64_t of_row(int64_t row) const { return at(row % count); }
};

// Which row of a conditioning tensor belongs to a row of the activations; index == nullptr: row i to row i.
struct RowMap {
    const int32_t* index = nullptr;

    PTQ_INLINE int64_t at(int64_t row) const { return index ? index[row] : row; }
};

// One row of a position table (ptq4arvg_kernels.tables): q = clamp(rne(x * recip) + zq, low, high).
struct Grid {
    float delta, recip, zq, bits;

    PTQ_INLINE float half() const { return bits == 8.0f ? 128.0f : 32.0f; }
};
static_assert(sizeof(Grid) == 16, "a table row is four floats");

// A position table [length, 4].
struct Table {
    const Grid* rows = nullptr;
    int64_t length = 0;
};

// A key or value cache, int8 [B, H, S, dp].
struct Cache {
    int8_t* data = nullptr;
    int64_t batch_stride = 0, head_stride = 0;
    int64_t slots = 0, lanes = 0;  // S, dp

    PTQ_INLINE int8_t* slot(int64_t batch, int64_t head, int64_t slot) const {
        return data + batch * batch_stride + head * head_stride + slot * lanes;
    }
};

// Tables [groups, heads, 4] of keys and values, and the group of every slot.
struct CacheTables {
    const Grid *k = nullptr, *v = nullptr;
    const int32_t* group = nullptr;  // [slots]
};

// A norm of a block, and the chunks of the modulation [R, chunks * width] that it reads.
struct BlockNorm {
    NormKind kind = NormKind::layer;
    float eps = 0;
    Vector weight, bias;
    float offset = 1;            // added to the modulation's scale
    int scale = -1, shift = -1;  // chunks of the modulation, or -1: not modulated
    int gate = -1;               // chunk that gates the sub-block's result, or -1

    PTQ_INLINE int chunks() const { return static_cast<int>(larger(larger(scale, shift), gate)) + 1; }
};

PTQ_INLINE Rows chunk_of(const Rows& modulation, int chunk, int64_t width) {
    if (chunk < 0 || !modulation.data) return {};
    const char* first = static_cast<const char*>(modulation.data) + chunk * width * dtype_size(modulation.dtype);
    return {first, modulation.dtype, modulation.stride};
}

}  // namespace ptq
