// Attention of many queries per sequence and head: prefixes, VAR's scales, PAR's groups. The output may become codes.
#include "attention.cuh"
#include "attention_plan.h"

namespace ptq::cuda {

#define BLOCK_ATTENTION(INDEX, NAME)                                         \
    extern "C" __global__ void __launch_bounds__(32 * MAX_BLOCK_WARPS, 1)    \
        block_attention_d##NAME(const __grid_constant__ AttentionParams p) { \
        constexpr AttentionShape SHAPE = BLOCK_SHAPES[INDEX];                \
        attend<SHAPE.chunks, SHAPE.fours, SHAPE.stages, false>(p);           \
    }
PTQ_HEAD_CLASSES(BLOCK_ATTENTION)
#undef BLOCK_ATTENTION

Kernel block_attention_kernel(int head_class) {
#define NAMED(INDEX, NAME)                                                                          \
    if (head_class == INDEX) {                                                                      \
        return {"block_attention_d" #NAME, reinterpret_cast<const void*>(block_attention_d##NAME)}; \
    }
    PTQ_HEAD_CLASSES(NAMED)
#undef NAMED
    return {};
}

}  // namespace ptq::cuda
