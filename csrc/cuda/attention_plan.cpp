#include "attention_plan.h"

#include <stdexcept>
#include <string>

namespace ptq::cuda {
namespace {

constexpr int64_t MAX_SPLITS = 8, MAX_BLOCKS = 0x7FFFFFFF, MAX_TILES = 65535;

// Static shared memory of a block: queries, their grids, a new key and value (attention_queries.cuh).
constexpr int64_t static_bytes(const AttentionShape& shape) {
    return shape.fours * shape.chunks * 384 + 20 * shape.queries() + 32 * shape.chunks + 80;
}

int64_t most_warps(bool decode) {
    return decode ? MAX_ATTENTION_WARPS : MAX_BLOCK_WARPS;
}

[[noreturn]] void fail(const std::string& what) {
    throw std::invalid_argument("attention: " + what);
}

}  // namespace

AttentionPlan attention_plan_with(int64_t pairs, int64_t period, int64_t lanes, int64_t warps, int64_t splits) {
    AttentionPlan plan;
    plan.decode = period <= DECODE_SHAPES[0].queries();
    while (plan.head_class < HEAD_CLASSES - 1 && plan.shape().columns() < lanes) ++plan.head_class;
    const AttentionShape shape = plan.shape();
    if (lanes < 16 || lanes % 16 != 0 || lanes > shape.columns()) {
        fail("a cached vector has " + std::to_string(lanes) + " bytes; these kernels take multiples of 16 up to " +
             std::to_string(DECODE_SHAPES[HEAD_CLASSES - 1].columns()));
    }
    const int64_t tiles = ceil_div(period, shape.queries());
    if (pairs > MAX_BLOCKS || tiles > MAX_TILES) {
        fail(std::to_string(pairs) + " sequences times heads of " + std::to_string(period) +
             " positions are more than a launch can have; split the batch");
    }
    if (warps < 1 || warps > most_warps(plan.decode) || splits < 1 || splits > MAX_SPLITS) {
        fail(std::to_string(warps) + " warps and " + std::to_string(splits) + " splits are not possible");
    }
    plan.tiles = static_cast<unsigned>(tiles);
    plan.splits = static_cast<unsigned>(splits);
    plan.warps = static_cast<unsigned>(warps);
    plan.shared = static_cast<unsigned>(warps * shape.ring_bytes());
    if (splits > 1) {
        plan.workspace = pairs * tiles * splits * shape.part_floats();
        plan.counters = pairs * tiles;
    }
    return plan;
}

// Few blocks: as many warps each as there are tiles of slots for, since the blocks would not fill the device. Many:
// fewer, whose beginnings and ends overlap with other blocks' loops; one query needs the least. Splitting over blocks
// costs a trip through memory, about as long as two tiles, so every warp must save more than that.
AttentionPlan plan_attention(int64_t pairs, int64_t period, int64_t span, int64_t lanes, const DeviceInfo& device) {
    if (span < 1 || span > MAX_BLOCKS - SLOT_TILE) fail("the span is " + std::to_string(span) + " slots");
    const AttentionPlan least = attention_plan_with(pairs, period, lanes, 1, 1);
    const int64_t blocks = pairs * least.tiles, slot_tiles = ceil_div(span, SLOT_TILE);
    int64_t warps = most_warps(least.decode);
    if (least.decode) {
        if (blocks > device.multiprocessors) warps = 4;
        if (blocks > 4 * static_cast<int64_t>(device.multiprocessors)) warps = 2;
    }
    const auto fits = [&](int64_t count) {
        return count * least.shape().ring_bytes() + static_bytes(least.shape()) <= device.shared_bytes;
    };
    while (warps > 1 && (warps / 2 >= slot_tiles || !fits(warps))) warps /= 2;
    int64_t splits = 1;
    while (splits < MAX_SPLITS && 2 * splits * blocks <= device.multiprocessors && slot_tiles >= 8 * splits * warps) {
        splits *= 2;
    }
    return attention_plan_with(pairs, period, lanes, warps, splits);
}

Launch launch_attention(const AttentionPlan& plan, const AttentionParams& p) {
    const auto aligned = [](const int8_t* data, const CacheStrides& strides) {
        return reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides.batch % 16 == 0 && strides.head % 16 == 0;
    };
    if (!aligned(p.k_cache, p.k) || !aligned(p.v_cache, p.v)) {
        fail("a cached vector does not begin at a multiple of 16 bytes; allocate the caches as whole tensors");
    }
    if (p.append && (p.period != 1 || !plan.decode)) {
        fail("one new position per sequence can be appended on the way, not " + std::to_string(p.period));
    }
    if (plan.splits > 1 && (!p.workspace || !p.counters)) fail("splits need a workspace and counters");
    return launch_of(attention_kernel(plan), static_cast<unsigned>(p.pairs), plan.tiles, plan.splits, 32 * plan.warps,
                     plan.shared, p);
}

}  // namespace ptq::cuda
