// Attention of up to four queries per sequence and head, in a decode step with what surrounds it:
//
//     q, k, v = split(qkv); q, k = kind(q, k); cache[position] = Q(k), Q(v); out = attention(q), or its codes
//
// The new key and value never travel through memory: the block in whose run their slot lies writes them to the cache
// and puts them into its own copy of that slot's tile; nobody reads the slot.
#include "attention.cuh"
#include "attention_plan.h"

namespace ptq::cuda {

#define DECODE(INDEX, NAME)                                                   \
    extern "C" __global__ void __launch_bounds__(32 * MAX_ATTENTION_WARPS, 1) \
        decode_d##NAME(const __grid_constant__ AttentionParams p) {           \
        constexpr AttentionShape SHAPE = DECODE_SHAPES[INDEX];                \
        attend<SHAPE.chunks, SHAPE.fours, SHAPE.stages, true>(p);             \
    }
PTQ_HEAD_CLASSES(DECODE)
#undef DECODE

Kernel decode_kernel(int head_class) {
#define NAMED(INDEX, NAME) \
    if (head_class == INDEX) return {"decode_d" #NAME, reinterpret_cast<const void*>(decode_d##NAME)};
    PTQ_HEAD_CLASSES(NAMED)
#undef NAMED
    return {};
}

}  // namespace ptq::cuda
