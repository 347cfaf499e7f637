// Choice of tiles: of all that fit, the one whose busiest multiprocessor is predicted to be ready first. The prediction
// is coarse and knows no measurement: whichever is slower of the tensor core and what has to come out of the
// second-level cache, for as many blocks as the busiest multiprocessor gets, and never less than memory needs for the
// weights. Rates per cycle are those of the GPUs' published figures.
#include "gemm_plan.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

namespace ptq::cuda {
namespace {

constexpr double CACHE_BYTES = 47;   // per cycle and multiprocessor, out of the second-level cache
constexpr double MEMORY_BYTES = 10;  // per cycle and multiprocessor, out of memory
constexpr double START = 1500;       // cycles until the first bytes arrive, and of the epilogue
constexpr double HANDOVER = 1000;    // more if partial sums go through memory
// Partial sums may add this much to what a product asks memory for: they cost bandwidth that weights need.
constexpr double PARTIAL_SHARE = 0.02;
constexpr unsigned RESERVED = 1024;  // bytes of shared memory that the driver keeps for itself
constexpr int MAX_SPLIT = 8;
// Predictions this close are equal, and the plan that keeps the whole device busy for less is taken.
constexpr double EQUAL = 1.1;

double products_per_cycle(int capability) {
    return capability == 80 || capability / 10 == 9 || capability / 10 == 10 ? 2048 : 1024;
}

int bricks_of(int width) {
    return static_cast<int>(ceil_div(width, K_ALIGN)) * (K_ALIGN / BRICK_K);
}

double weight_bytes(const GemmPlan& plan) {
    const double strips = static_cast<double>(plan.grid[1]) * plan.tile_shape().warps_n;
    return strips * bricks_of(plan.shape.width) * TileShape::brick_bytes(plan.shape.bits);
}

double row_bytes(const GemmPlan& plan) {
    return static_cast<double>(plan.shape.rows) * plan.shape.width;
}

double partial_bytes(const GemmPlan& plan) {
    const double channels = static_cast<double>(plan.grid[1]) * plan.tile_shape().channels();
    return plan.grid[2] > 1 ? 4.0 * (2.0 * plan.grid[2] - 1) * plan.shape.rows * channels : 0.0;
}

double predict(const GemmPlan& plan, const DeviceInfo& device) {
    const TileShape& tile = plan.tile_shape();
    const double k = static_cast<double>(plan.part_bricks) * BRICK_K;  // whole steps
    const double exists = static_cast<double>(std::min(plan.part_bricks, bricks_of(plan.shape.width))) * BRICK_K;
    const double blocks = static_cast<double>(plan.grid[0]) * plan.grid[1] * plan.grid[2];
    const double rows = std::min<double>(tile.rows(), static_cast<double>(plan.shape.rows));
    const double products = tile.rows() * tile.channels() * k / products_per_cycle(device.capability);
    const double bytes = (tile.channels() * plan.shape.bits / 8.0 + rows) * exists + partial_bytes(plan) / blocks;
    const double block = std::max(products, bytes / CACHE_BYTES);
    const double turns = static_cast<double>(ceil_div(static_cast<int64_t>(blocks), device.multiprocessors));
    const double memory = (weight_bytes(plan) + row_bytes(plan)) / (MEMORY_BYTES * device.multiprocessors);
    return START + (plan.grid[2] > 1 ? HANDOVER : 0) + std::max(turns * block, memory);
}

// Cycles that all multiprocessors together spend on products, those of rows and channels that do not exist among them,
// and on waiting for bytes: what a prediction of the busiest one does not see.
double work(const GemmPlan& plan, const DeviceInfo& device) {
    const double rows = static_cast<double>(plan.grid[0]) * plan.tile_shape().rows();
    const double channels = static_cast<double>(plan.grid[1]) * plan.tile_shape().channels();
    const double products = rows * channels * bricks_of(plan.shape.width) * BRICK_K;
    return products / products_per_cycle(device.capability) + plan.asked() / CACHE_BYTES;
}

void check(const GemmShape& s) {
    const auto fail = [](const std::string& what) { throw std::invalid_argument(what); };
    if (s.rows < 0 || s.rows > (int64_t{1} << 31) - 128) {
        fail("a product has " + std::to_string(s.rows) + " rows, possible are 0 to 2^31 - 128; split it");
    }
    if (s.channels < 1 || s.channels > 65535 * STRIP) {
        fail("a layer has " + std::to_string(s.channels) + " channels, possible are 1 to " +
             std::to_string(65535 * STRIP));
    }
    // 4 w q of K products stays below 2^31.
    if (s.width < 1 || s.width > 65536) {
        fail("a layer has " + std::to_string(s.width) + " inputs, possible are 1 to 65536");
    }
    if (s.bits != 6 && s.bits != 8) fail("weights have " + std::to_string(s.bits) + " bits, possible are 6 and 8");
}

// False if the tile does not fit.
bool cut(const GemmShape& shape, int tile, bool norm, int split, const DeviceInfo& device, GemmPlan* plan) {
    const TileShape& t = norm ? NORM_TILES[tile] : TILES[tile];
    const int bricks = bricks_of(shape.width), turn = t.depth * t.warps_k;
    const int steps = static_cast<int>(ceil_div(bricks, turn)), per_part = static_cast<int>(ceil_div(steps, split));
    plan->shape = shape;
    plan->tile = tile;
    plan->norm = norm;
    plan->part_bricks = per_part * turn;
    plan->grid[0] = static_cast<unsigned>(ceil_div(shape.rows, t.rows()));
    plan->grid[1] = static_cast<unsigned>(ceil_div(shape.channels, t.channels()));
    plan->grid[2] = static_cast<unsigned>(ceil_div(steps, per_part));
    plan->shared = static_cast<unsigned>(t.shared_bytes(shape.bits, norm ? plan->part_bricks * BRICK_K : 0));
    const int64_t tiles = static_cast<int64_t>(plan->grid[0]) * plan->grid[1];
    plan->counters = plan->grid[2] > 1 ? tiles : 0;
    plan->partial = plan->grid[2] > 1 ? tiles * plan->grid[2] * t.rows() * t.channels() : 0;
    plan->cycles = predict(*plan, device);
    return plan->shared + RESERVED <= static_cast<unsigned>(device.shared_bytes);
}

}  // namespace

double GemmPlan::asked() const {
    return grid[0] * weight_bytes(*this) + grid[1] * row_bytes(*this) + partial_bytes(*this);
}

std::vector<GemmPlan> gemm_plans(const GemmShape& shape, const DeviceInfo& device) {
    check(shape);
    std::vector<GemmPlan> found;
    for (int tile = 0; tile < TILE_COUNT; ++tile) {
        const int most = TILES[tile].warps_k > 1 ? MAX_SPLIT : 1;
        for (int split = 1; split <= most; ++split) {
            GemmPlan plan;
            if (!cut(shape, tile, false, split, device, &plan)) break;
            if (split > 1 && plan.grid[2] != static_cast<unsigned>(split)) continue;  // as another split
            if (split > 1 && partial_bytes(plan) > PARTIAL_SHARE * (plan.asked() - partial_bytes(plan))) break;
            found.push_back(plan);
        }
    }
    std::stable_sort(found.begin(), found.end(), [](const GemmPlan& a, const GemmPlan& b) {
        return a.cycles != b.cycles ? a.cycles < b.cycles : a.asked() < b.asked();
    });
    return found;
}

GemmPlan plan_gemm(const GemmShape& shape, const DeviceInfo& device) {
    const std::vector<GemmPlan> found = gemm_plans(shape, device);
    if (found.empty()) {
        throw std::invalid_argument("no tile fits into the " + std::to_string(device.shared_bytes) +
                                    " bytes of shared memory that a thread block of this device may have");
    }
    const auto thrifty = [&](const GemmPlan& best, const GemmPlan& plan) {
        if (plan.cycles > EQUAL * found.front().cycles) return best;
        return work(plan, device) < work(best, device) ? plan : best;
    };
    return std::accumulate(found.begin(), found.end(), found.front(), thrifty);
}

bool plan_gemm_norm(const GemmShape& shape, const DeviceInfo& device, GemmPlan* plan) {
    check(shape);
    if (shape.rows > NORM_ROWS || shape.width % 8 != 0 || shape.width > NORM_MAX_WIDTH) return false;
    bool found = false;
    for (int tile = 0; tile < NORM_TILE_COUNT; ++tile) {
        GemmPlan next;
        if (!cut(shape, tile, true, 1, device, &next)) continue;
        if (!found || next.cycles < plan->cycles) *plan = next;
        found = true;
    }
    return found;
}

bool norm_readable(const NormPointers& in, const NormSettings& norm) {
    const auto readable = [](const void* p, DType dtype, int64_t stride) {
        return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride * dtype_size(dtype) % 16 == 0;
    };
    return norm.width % 8 == 0 && readable(in.x, norm.x_dtype, norm.x_stride) &&
           readable(in.weight, norm.weight_dtype, 0) && readable(in.bias, norm.bias_dtype, 0) &&
           readable(in.scale, norm.mod_dtype, norm.scale_stride) &&
           readable(in.shift, norm.mod_dtype, norm.shift_stride);
}

Launch launch_gemm(const GemmPlan& plan, GemmParams& p) {
    const auto aligned = [](const char* name, const void* pointer) {
        if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) {
            throw std::invalid_argument(std::string(name) + " do not begin at a multiple of 16 bytes");
        }
    };
    aligned("packed weights", p.weights);
    aligned("partial sums", p.partial);
    if (!plan.norm) {
        aligned("codes", p.codes);
        if (p.codes_stride % 16 != 0 || plan.shape.width % 16 != 0) {
            throw std::invalid_argument("rows of codes are " + std::to_string(plan.shape.width) + " bytes, " +
                                        std::to_string(p.codes_stride) +
                                        " apart; both have to be multiples of 16: pad the rows with zeros");
        }
    } else if (!norm_readable(p.norm_in, p.norm)) {
        throw std::invalid_argument("rows, modulation or norm vectors are not vectors of eight aligned numbers");
    }
    p.rows = plan.shape.rows;
    p.channels = plan.shape.channels;
    p.width = plan.shape.width;
    p.bricks = bricks_of(plan.shape.width);
    p.part_bricks = plan.part_bricks;
    const Kernel kernel = gemm_kernel(plan.shape.bits, plan.shape.output, plan.tile, plan.norm);
    return launch_of(kernel, plan.grid[0], plan.grid[1], plan.grid[2],
                     static_cast<unsigned>(plan.tile_shape().threads()), plan.shared, p);
}

Kernel gemm_kernel(int bits, Output output, int tile, bool norm) {
    if (norm) {
        if (output == Output::gate_residual) throw std::invalid_argument("no kernel normalises and adds a residual");
        if (bits == 6) return output == Output::store ? gemm_norm_w6_store(tile) : gemm_norm_w6_quant(tile);
        return output == Output::store ? gemm_norm_w8_store(tile) : gemm_norm_w8_quant(tile);
    }
    switch (output) {
        case Output::store:
            return bits == 6 ? gemm_w6_store(tile) : gemm_w8_store(tile);
        case Output::quant:
            return bits == 6 ? gemm_w6_quant(tile) : gemm_w8_quant(tile);
        default:
            return bits == 6 ? gemm_w6_gate_residual(tile) : gemm_w8_gate_residual(tile);
    }
}

}  // namespace ptq::cuda
