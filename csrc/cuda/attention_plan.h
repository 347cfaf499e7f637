// How attention is cut into thread blocks: a pure function of the shape and the device.
#pragma once

#include "attention_tile.h"
#include "device.h"
#include "launch.h"

namespace ptq::cuda {

struct AttentionPlan {
    int head_class = 0;
    bool decode = true;     // the kernel for up to four queries
    unsigned tiles = 1;     // of queries, per pair
    unsigned splits = 1;    // blocks that share the slots of a tile of queries
    unsigned warps = 1;     // of a block
    unsigned shared = 0;    // dynamic shared memory, bytes
    int64_t workspace = 0;  // floats: AttentionParams::workspace
    int64_t counters = 0;   // AttentionParams::counters, 0 before the first launch

    AttentionShape shape() const { return (decode ? DECODE_SHAPES : BLOCK_SHAPES)[head_class]; }
};

// The plan for a device. pairs: sequences times heads; period: queries of each; span: slots at most; lanes: bytes of a
// cached vector. Throws std::invalid_argument with the size that is not possible.
AttentionPlan plan_attention(int64_t pairs, int64_t period, int64_t span, int64_t lanes, const DeviceInfo& device);

// The same with warps and splits that somebody chose before.
AttentionPlan attention_plan_with(int64_t pairs, int64_t period, int64_t lanes, int64_t warps, int64_t splits);

// The launch of a plan; p stays alive until it starts. Throws std::invalid_argument where the operands do not fit:
// caches that do not begin at multiples of 16 bytes, or append with several positions.
Launch launch_attention(const AttentionPlan& plan, const AttentionParams& p);

// decode.cu, block_attention.cu
Kernel decode_kernel(int head_class);
Kernel block_attention_kernel(int head_class);
inline Kernel attention_kernel(const AttentionPlan& plan) {
    return (plan.decode ? decode_kernel : block_attention_kernel)(plan.head_class);
}

}  // namespace ptq::cuda
