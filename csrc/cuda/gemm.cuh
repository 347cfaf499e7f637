// The integer GEMM of all linear layers: codes [M, K] times packed weights [N, K], both int8 in the tensor core, sums
// exact in 32 bits.
//
// Weights are the first operand of the matrix instruction, 16 channels by 32 k, activations the second, 32 k by 8 rows:
// rows come in steps of 8, and a step of decoding wastes little. A warp owns a strip of 32 channels, whose bricks (64
// k) lie one behind the other in memory in the order of its registers: a lane copies 16 bytes to shared memory and
// later reads the same 16 bytes back, so the ring of weights needs no barrier and has no bank conflicts. Activations
// are shared by all warps: rows of codes, read by ldmatrix.
//
//   step s:  wait for the copies of step s; barrier          (a kernel that normalised its rows needs no barrier)
//            start the copies of step s + STAGES - 1
//            unpack the weights of step s in registers, multiply them with all rows of the tile
//
// Afterwards the warps that share a strip add up their sums in shared memory. If K is split over thread blocks, they
// store their sums, and the last one adds them up (handover.cuh). Integers: no order of additions changes the result.
#pragma once

#include <type_traits>

#include "copy.cuh"
#include "epilogue.cuh"
#include "handover.cuh"
#include "int6.cuh"
#include "mma.cuh"
#include "norm_tile.cuh"

namespace ptq::cuda {

template <int BITS, int GROUPS, int WARPS_N, int WARPS_K, int DEPTH, int STAGES>
struct Tile {
    static constexpr TileShape SHAPE{GROUPS, WARPS_N, WARPS_K, DEPTH, STAGES};
    static constexpr int ROWS = SHAPE.rows(), THREADS = SHAPE.threads(), STEP_K = SHAPE.step_k();
    static constexpr int BRICK = TileShape::brick_bytes(BITS), CHUNKS = BRICK / 512;
    static constexpr int PITCH = TileShape::pitch(STEP_K), ACTIVATIONS = ROWS * PITCH;
    static constexpr int WEIGHTS = SHAPE.weight_bytes(BITS), UNITS = SHAPE.units();
    // Sums fill the registers: what differs from copy to copy or from step to step is computed when it is needed.
    static constexpr bool LARGE = GROUPS > 8;
};

// One warp's place in its block.
struct Warp {
    uint32_t lane, index, n, k;

    __device__ __forceinline__ explicit Warp(uint32_t warps_n)
        : lane(threadIdx.x & 31), index(threadIdx.x >> 5), n(index % warps_n), k(index / warps_n) {}
};

// A block's part of K, in steps of the pipeline: all are full but the last, of which `last` columns exist.
struct Steps {
    int count, last;

    __device__ __forceinline__ Steps(int columns, int step_k)
        : count((columns + step_k - 1) / step_k), last(columns - (count - 1) * step_k) {}
};

// The weights of one warp: a ring of STAGES steps in shared memory, filled by the lanes that read it.
template <class T, int DEPTH, int WARPS_K>
struct WeightRing {
    static constexpr int TURN = WARPS_K * DEPTH;  // bricks from one step of a warp to the next
    // A copy instruction reaches 2 KB to either side of its address: that is the middle of a step.
    static constexpr int MIDDLE = DEPTH * T::BRICK / 2 / 512 * 512;

    uint32_t slots;       // this lane's bytes in the first slot
    const uint8_t* next;  // this lane's bytes of the step that is copied next
    uint32_t last;        // bytes of a copy in the last step
    uint64_t policy;

    // The block's bricks begin at `begin`; this warp takes DEPTH of every TURN of them.
    __device__ __forceinline__ WeightRing(const GemmParams& p, const Warp& warp, int strip, int begin,
                                          const Steps& steps, uint32_t shared)
        : slots(kept(shared + (warp.index * (DEPTH * T::BRICK) + warp.lane * 16))),
          next(kept(p.weights + static_cast<uint64_t>(strip * p.bricks + begin + warp.k * DEPTH) * T::BRICK +
                    (warp.lane * 16 + MIDDLE))),
          last(WARPS_K == 1 || steps.last > static_cast<int>(warp.k * DEPTH * BRICK_K) ? 16 : 0),
          policy(gridDim.x == 1 ? evict_first() : evict_normal()) {}

    // AHEAD steps from here. DEPTH bricks exist or none: it is 1, or 2 and K is padded to pairs. Those that do not
    // exist become 0, so that a warp without work in the last step multiplies along instead of leaving the others.
    template <int SLOT, int AHEAD, bool SIZED>
    __device__ __forceinline__ void copy(bool is_last, uint32_t slot) {
        copy_chunks<SLOT * T::WEIGHTS, AHEAD * TURN * T::BRICK - MIDDLE, SIZED>(is_last, slots + slot * T::WEIGHTS);
    }
    template <int TO, int FROM, bool SIZED, int CHUNK = 0>
    __device__ __forceinline__ void copy_chunks(bool is_last, uint32_t to) {
        if constexpr (CHUNK < DEPTH * T::CHUNKS) {
            if constexpr (!SIZED) {
                copy16<TO + CHUNK * 512, FROM + CHUNK * 512>(to, next, policy);
            } else {
                copy16_or_zero<TO + CHUNK * 512, FROM + CHUNK * 512>(to, next, is_last ? last : 16, policy);
            }
            copy_chunks<TO, FROM, SIZED, CHUNK + 1>(is_last, to);
        }
    }
    template <int STEPS>
    __device__ __forceinline__ void advance() {
        next += STEPS * TURN * T::BRICK;
    }
};

// Four operands of the matrix instruction, one per channel tile and step of 32 k: [2 * step + tile].
template <class T, int BITS, int OFFSET>
__device__ __forceinline__ void load_weights(uint32_t (&w)[4][4], uint32_t address) {
    if constexpr (BITS == 8) {
        load_shared<OFFSET>(w[0], address);
        load_shared<OFFSET + 512>(w[1], address);
        load_shared<OFFSET + 1024>(w[2], address);
        load_shared<OFFSET + 1536>(w[3], address);
    } else {
        uint32_t a[4], b[4], c[4];
        load_shared<OFFSET>(a, address);
        load_shared<OFFSET + 512>(b, address);
        load_shared<OFFSET + 1024>(c, address);
#pragma unroll
        for (int i = 0; i < 4; ++i) unpack6(a[i], b[i], c[i], w[i]);
    }
}

// acc[tile][rows of 8] += one brick times all rows; `rows`: this lane's row of the first eight. The groups of eight
// rows are GROUP bytes apart, or, if that is 0, `group`.
template <int GROUPS, int GROUP, int COLUMN, int G = 0>
__device__ __forceinline__ void multiply(int32_t (&acc)[2][GROUPS][4], const uint32_t (&w)[4][4], uint32_t rows,
                                         uint32_t group) {
    if constexpr (G < GROUPS) {
        uint32_t b[4];
        load_matrices<G * GROUP + COLUMN>(b, GROUP ? rows : rows + G * group);
        mma_s8(acc[0][G], w[0], b[0], b[1]);
        mma_s8(acc[1][G], w[1], b[0], b[1]);
        mma_s8(acc[0][G], w[2], b[2], b[3]);
        mma_s8(acc[1][G], w[3], b[2], b[3]);
        multiply<GROUPS, GROUP, COLUMN, G + 1>(acc, w, rows, group);
    }
}

// The bricks of a step: weights and rows from those offsets on.
template <class T, int BITS, int GROUPS, int GROUP, int DEPTH, int WEIGHTS, int ROWS, int BRICK = 0>
__device__ __forceinline__ void multiply_bricks(int32_t (&acc)[2][GROUPS][4], uint32_t weights, uint32_t rows,
                                                uint32_t group) {
    if constexpr (BRICK < DEPTH) {
        uint32_t w[4][4];
        load_weights<T, BITS, WEIGHTS + BRICK * T::BRICK>(w, weights);
        multiply<GROUPS, GROUP, ROWS + BRICK * BRICK_K>(acc, w, rows, group);
        multiply_bricks<T, BITS, GROUPS, GROUP, DEPTH, WEIGHTS, ROWS, BRICK + 1>(acc, weights, rows, group);
    }
}

// The rows of codes of a step, copied by all threads, 16 bytes each; what does not exist becomes 0.
template <class T>
struct RowCopies {
    static constexpr int PER_ROW = T::STEP_K / 16, ALL = T::ROWS * PER_ROW;
    static constexpr int EACH = (ALL + T::THREADS - 1) / T::THREADS;

    static constexpr int ROW_STEP = T::THREADS / PER_ROW, TARGET_STEP = ROW_STEP * T::PITCH;
    static_assert(T::THREADS % PER_ROW == 0, "a thread stays in its column");
    static_assert(PER_ROW >= 8 || PER_ROW == 4, "eight lanes stay within a row, or a warp covers eight rows");

    const int8_t* source[EACH];           // this thread's bytes; not read where there is no row
    uint32_t sizes[T::LARGE ? 1 : EACH];  // 16, or 0 where there is no row; LARGE: not kept
    int rows;                             // from the first copy's row on
    uint32_t target;                      // of the first copy, in the first slot
    bool last;                            // whether the last step has this thread's columns

    __device__ __forceinline__ RowCopies(const GemmParams& p, int first_row, int exist, int first_k, const Steps& steps,
                                         uint32_t shared) {
        // Eight lanes write eight times 16 bytes in one go, to different banks: a whole row of 128 bytes, or, of
        // shorter rows, a column of eight.
        const uint32_t lane = threadIdx.x % 32;
        const uint32_t row = PER_ROW == 4 ? threadIdx.x / 32 * 8 + lane % 8 : threadIdx.x / PER_ROW;
        const uint32_t column = (PER_ROW == 4 ? lane / 8 : threadIdx.x % PER_ROW) * 16;
        target = kept(shared + row * T::PITCH + column);
        last = steps.last > static_cast<int>(column);
        rows = exist - static_cast<int>(row);
        const uint32_t stride = static_cast<uint32_t>(p.codes_stride);
        const int8_t* tile = p.codes + static_cast<uint64_t>(static_cast<uint32_t>(first_row)) * stride +
                             (static_cast<uint32_t>(first_k) + column);
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            source[i] = kept(tile + static_cast<uint64_t>(row + i * ROW_STEP) * stride);
            if (!T::LARGE) sizes[i] = kept(rows > i * ROW_STEP ? 16 : 0);
        }
    }
    template <int SLOT, int AHEAD, bool SIZED>
    __device__ __forceinline__ void copy(bool is_last, uint32_t slot) {
        copy_each<SLOT * T::ACTIVATIONS, AHEAD * T::STEP_K>(is_last, target + slot * T::ACTIVATIONS);
    }
    template <int TO, int FROM, int I = 0>
    __device__ __forceinline__ void copy_each(bool is_last, uint32_t to) {
        if constexpr (I < EACH) {
            const uint32_t size = T::LARGE ? (rows > I * ROW_STEP ? 16 : 0) : sizes[T::LARGE ? 0 : I];
            const uint32_t bytes = is_last && !last ? 0 : size;
            if constexpr (ALL % T::THREADS == 0 || I + 1 < EACH) {
                copy16_or_zero<TO + I * TARGET_STEP, FROM>(to, source[I], bytes);
            } else {
                copy16_or_zero_if<TO + I * TARGET_STEP, FROM>(threadIdx.x < ALL % T::THREADS, to, source[I], bytes);
            }
            copy_each<TO, FROM, I + 1>(is_last, to);
        }
    }
    template <int STEPS>
    __device__ __forceinline__ void advance() {
#pragma unroll
        for (int i = 0; i < EACH; ++i) source[i] += STEPS * T::STEP_K;
    }
};

// What a kernel that normalised its rows copies of them: nothing.
struct NoCopies {
    template <int SLOT, int AHEAD, bool SIZED>
    __device__ __forceinline__ void copy(bool, uint32_t) {}
    template <int STEPS>
    __device__ __forceinline__ void advance() {}
};

// The steps of a block. As long as all copies of a turn of the ring are full ones, turns are a loop that asks nothing;
// the others follow without one. Addresses move once per turn; inside, they differ by constants. RESIDENT: all rows are
// in shared memory, and a warp reads no weights but its own: there is nothing to wait for others.
template <class T, int BITS, int GROUPS, int WARPS_K, int DEPTH, int STAGES, bool RESIDENT>
struct Pipeline {
    static constexpr int EARLY = STAGES - 1;  // steps from a copy to its use

    WeightRing<T, DEPTH, WARPS_K>& ring;
    std::conditional_t<RESIDENT, NoCopies, RowCopies<T>>& copies;
    uint32_t rows;         // this lane's row of the first eight: in the first slot; RESIDENT: in the turn's first step
    const uint32_t group;  // RESIDENT: bytes from one group of eight rows to the next
    int steps;             // from the current turn on

    // The copies of a step, SIZED if it may be the last one. `slot` counts from SLOT.
    template <int SLOT, int AHEAD, bool SIZED>
    __device__ __forceinline__ void copy(bool is_last, uint32_t slot = 0) {
        ring.template copy<SLOT, AHEAD, SIZED>(is_last, slot);
        copies.template copy<SLOT, AHEAD, SIZED>(is_last, slot);
    }
    // Those of a step if it exists: `left` steps from it on do.
    template <int SLOT, int AHEAD>
    __device__ __forceinline__ void copy_if(int left) {
        if constexpr (T::LARGE) {
            if (left >= 1) copy<SLOT, AHEAD, true>(left == 1);
        } else if (left > 1) {
            copy<SLOT, AHEAD, false>(false);
        } else if (left == 1) {
            copy<SLOT, AHEAD, true>(true);
        }
    }
    template <int STEPS>
    __device__ __forceinline__ void advance() {
        ring.template advance<STEPS>();
        copies.template advance<STEPS>();
    }
    template <int SLOT = 0>
    __device__ __forceinline__ void fill() {
        if constexpr (SLOT < EARLY) {
            copy_if<SLOT, SLOT>(steps - SLOT);
            commit_copies();
            fill<SLOT + 1>();
        } else {
            advance<EARLY>();
        }
    }
    enum class Copy { full, perhaps, none };

    template <int SLOT, Copy COPY>
    __device__ __forceinline__ void step(int32_t (&acc)[2][GROUPS][4]) {
        wait_copies<STAGES - 2>();
        if constexpr (!RESIDENT) __syncthreads();
        constexpr int AHEAD = SLOT + EARLY;
        if constexpr (COPY == Copy::full) copy<AHEAD % STAGES, SLOT, false>(false);
        if constexpr (COPY == Copy::perhaps) copy_if<AHEAD % STAGES, SLOT>(steps - AHEAD);
        commit_copies();
        multiply_bricks<T, BITS, GROUPS, RESIDENT ? 0 : 8 * T::PITCH, DEPTH, SLOT * T::WEIGHTS,
                        SLOT * (RESIDENT ? T::STEP_K : T::ACTIVATIONS)>(acc, ring.slots, rows, group);
    }
    template <Copy COPY, int SLOT = 0>
    __device__ __forceinline__ void turn(int32_t (&acc)[2][GROUPS][4]) {
        if constexpr (SLOT < STAGES) {
            step<SLOT, COPY>(acc);
            turn<COPY, SLOT + 1>(acc);
        } else {
            steps -= STAGES;
            if constexpr (RESIDENT) rows += STAGES * T::STEP_K;
        }
    }
    template <int SLOT = 0>
    __device__ __forceinline__ void rest(int32_t (&acc)[2][GROUPS][4]) {
        if constexpr (SLOT < EARLY) {
            if (SLOT >= steps) return;
            step<SLOT, Copy::none>(acc);
            rest<SLOT + 1>(acc);
        }
    }
    // The same, a step at a time.
    __device__ __forceinline__ void rest_rolled(int32_t (&acc)[2][GROUPS][4]) {
        uint32_t slot = 0;
#pragma unroll 1
        for (; steps > 0; --steps) {
            wait_copies<STAGES - 2>();
            __syncthreads();
            if (steps > EARLY) copy<0, 0, true>(steps == EARLY + 1, slot == 0 ? EARLY : slot - 1);
            commit_copies();
            advance<1>();
            multiply_bricks<T, BITS, GROUPS, 8 * T::PITCH, DEPTH, 0, 0>(acc, ring.slots + slot * T::WEIGHTS,
                                                                        rows + slot * T::ACTIVATIONS, group);
            slot = slot == EARLY ? 0 : slot + 1;
        }
    }
    __device__ __forceinline__ void run(int32_t (&acc)[2][GROUPS][4]) {
#pragma unroll 1
        while (steps > STAGES + EARLY) {
            turn<Copy::full>(acc);
            advance<STAGES>();
        }
        if constexpr (T::LARGE) {
            rest_rolled(acc);
        } else {
            if (steps >= STAGES) turn<Copy::perhaps>(acc);
            rest(acc);
        }
    }
};

// What the epilogue needs of the positions of the tile's rows. Asked for before the main loop, which hides the way
// there.
template <class T, Output OUTPUT>
__device__ __forceinline__ void load_grids(const GemmParams& p, int first_row, int exist, RowGrids* grids) {
    static_assert(T::ROWS <= T::THREADS, "a thread has one row");
    const uint32_t r = threadIdx.x;
    if (r >= T::ROWS) return;
    Grid in{}, out{};  // rows that do not exist are computed along, and dropped
    if (static_cast<int>(r) < exist) {
        const int64_t position = position_at(p.positions, p.grids.wide, (first_row + r) % p.grids.period);
        in = load_grid(p.table + clamp_index(position, p.grids.length));
        if (OUTPUT == Output::quant) out = load_grid(p.out_table + clamp_index(position, p.out_length));
    }
    grids[r].store_input(in);
    if (OUTPUT == Output::quant) grids[r].store_output(out);
}

// Unit u of a lane (g = lane / 4, t = lane % 4): four channels, 4 g..4 g + 3 of the strip, of row 8 (u / 2) + 2 t + u
// % 2.
template <int GROUPS>
__device__ __forceinline__ int4 unit_of(const int32_t (&acc)[2][GROUPS][4], int u) {
    const int g = u / 2, odd = u % 2;
    return make_int4(acc[0][g][odd], acc[0][g][2 + odd], acc[1][g][odd], acc[1][g][2 + odd]);
}
// What all products of a unit are: those of left-justified codes of six bits are a multiple of 4, and fit
// (gemm_plan.cpp).
template <int BITS>
__device__ __forceinline__ int4 sums_of(const int4& unit) {
    constexpr int SHIFT = BITS == 6 ? 2 : 0;
    return make_int4(unit.x >> SHIFT, unit.y >> SHIFT, unit.z >> SHIFT, unit.w >> SHIFT);
}
__device__ __forceinline__ uint32_t row_of_unit(uint32_t u, uint32_t lane) {
    return (u >> 1) * 8 + (lane & 3) * 2 + (u & 1);
}

__device__ __forceinline__ int4 operator+(const int4& a, const int4& b) {
    return make_int4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// No strip is shared: a warp writes units to its own shared memory and takes them from there again, which is how
// registers are indexed in a loop. A lane reads what it wrote. Half of the groups at a time.
template <class T, int BITS, int GROUPS, class Epilogue>
__device__ __forceinline__ void finish_alone(const int32_t (&acc)[2][GROUPS][4], const Warp& warp,
                                             const RowGrids* grids, int exist, int4* exchange,
                                             const Epilogue& epilogue) {
    constexpr int HALF = (GROUPS + 1) / 2;
    int4* own = exchange + warp.index * (2 * HALF * 32) + warp.lane;
#pragma unroll
    for (int begin = 0; begin < GROUPS; begin += HALF) {
        const int end = begin + HALF < GROUPS ? begin + HALF : GROUPS;
#pragma unroll
        for (int u = 2 * begin; u < 2 * end; ++u) own[(u - 2 * begin) * 32] = sums_of<BITS>(unit_of(acc, u));
#pragma unroll 1
        for (int u = 2 * begin; u < 2 * end; u += 2) {
            const uint32_t local[2] = {row_of_unit(u, warp.lane), row_of_unit(u, warp.lane) + 1};
            const int4 sums[2] = {own[(u - 2 * begin) * 32], own[(u - 2 * begin + 1) * 32]};
            epilogue.rows(grids, exist, local, sums);
        }
    }
}

// WARPS_K warps share a strip: each writes all units, and finishes every WARPS_K-th.
template <class T, int BITS, int GROUPS, int WARPS_N, int WARPS_K, class Epilogue>
__device__ __forceinline__ void finish_together(const GemmParams& p, const int32_t (&acc)[2][GROUPS][4],
                                                const Warp& warp, const RowGrids* grids, int exist, int4* exchange,
                                                const Epilogue& epilogue) {
    constexpr int EACH = T::UNITS / WARPS_K, AT_ONCE = EACH % 4 == 0 ? 4 : EACH;
    static_assert(T::UNITS % WARPS_K == 0, "warps finish the same number of units");
    int4* own = exchange + warp.index * (T::UNITS * 32) + warp.lane;
#pragma unroll
    for (int u = 0; u < T::UNITS; ++u) own[u * 32] = unit_of(acc, u);
    __syncthreads();
    // This lane's place of the unit that its warp finishes first, and of the others from there.
    int4* strip = exchange + (warp.n * T::UNITS + warp.k) * 32 + warp.lane;
    const auto sum_of = [&](int i) {
        int4 sum = strip[i * (WARPS_K * 32)];
#pragma unroll
        for (int k = 1; k < WARPS_K; ++k) sum = sum + strip[k * (WARPS_N * T::UNITS * 32) + i * (WARPS_K * 32)];
        return sum;
    };
    const uint32_t parts = gridDim.z;
    if (parts > 1) {
        // A part's sums, [strip][unit][row of the unit][channels / 4]: rows that do not exist are left out.
        const uint32_t tile = blockIdx.y * gridDim.x + blockIdx.x;
        const auto partial_of = [&](uint32_t part, uint32_t u) {
            const int64_t place = static_cast<int64_t>(part) * (gridDim.x * gridDim.y) + tile;
            return reinterpret_cast<int4*>(p.partial) + ((place * WARPS_N + warp.n) * T::UNITS + u) * 32 +
                   (warp.lane & 3) * 8 + (warp.lane >> 2);
        };
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const uint32_t u = warp.k + i * WARPS_K;
            if (static_cast<int>(row_of_unit(u, warp.lane)) < exist) *partial_of(blockIdx.z, u) = sum_of(i);
        }
        __shared__ unsigned int flag;
        if (!arrive_last(p.counters + tile, parts, &flag)) return;
        // Those of the others are added to this lane's own copy, where the loop below finds them.
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const uint32_t u = warp.k + i * WARPS_K;
            if (static_cast<int>(row_of_unit(u, warp.lane)) >= exist) continue;
            int4 sum = strip[i * (WARPS_K * 32)];
            for (uint32_t part = 0; part < parts; ++part) {
                if (part != blockIdx.z) sum = sum + __ldcg(partial_of(part, u));
            }
            strip[i * (WARPS_K * 32)] = sum;
        }
    }
#pragma unroll 1
    for (int i = 0; i < EACH; i += AT_ONCE) {
        uint32_t local[AT_ONCE];
        int4 sums[AT_ONCE];
#pragma unroll
        for (int a = 0; a < AT_ONCE; ++a) {
            local[a] = row_of_unit(warp.k + (i + a) * WARPS_K, warp.lane);
            sums[a] = sums_of<BITS>(sum_of(i + a));
        }
        epilogue.rows(grids, exist, local, sums);
    }
}

extern __shared__ __align__(16) unsigned char gemm_shared[];

// A tile of the result. Grid: row tiles, column tiles, parts of K.
// NORM: the rows are those of a residual stream, normalised and quantized here (norm_tile.cuh), and stay in shared
// memory; there is one row tile and one part. Weights are on their way meanwhile.
template <int BITS, int GROUPS, int WARPS_N, int WARPS_K, int DEPTH, int STAGES, Output OUTPUT, bool NORM>
__device__ __forceinline__ void gemm_tile(const GemmParams& p) {
    using T = Tile<BITS, GROUPS, WARPS_N, WARPS_K, DEPTH, STAGES>;
    const Warp warp(WARPS_N);
    const int first_row = NORM ? 0 : static_cast<int>(blockIdx.x * T::ROWS);
    const int exist = min(static_cast<int>(p.rows) - first_row, T::ROWS);
    const int first_channel = static_cast<int>(blockIdx.y) * T::SHAPE.channels();
    const int strip = static_cast<int>(blockIdx.y * WARPS_N + warp.n);

    // Shared memory: constants; the resident rows of NORM; slots of weights and, behind all of those, of activations.
    RowGrids* grids = reinterpret_cast<RowGrids*>(gemm_shared);
    auto& table = *reinterpret_cast<ChannelTable<T::SHAPE.channels()>*>(grids + T::ROWS);
    unsigned char* resident = gemm_shared + T::SHAPE.constant_bytes();
    const int resident_columns = p.part_bricks * BRICK_K;  // whole steps
    const int pitch = NORM ? TileShape::pitch(resident_columns) : T::PITCH;
    unsigned char* slots = resident + (NORM ? T::ROWS * pitch : 0);
    const uint32_t weight_slots = shared_address(slots), row_slots = weight_slots + STAGES * T::WEIGHTS;

    const int begin = NORM ? 0 : static_cast<int>(blockIdx.z) * p.part_bricks;
    const Steps steps(min(resident_columns, p.width - begin * BRICK_K), T::STEP_K);
    WeightRing<T, DEPTH, WARPS_K> ring(p, warp, strip, begin, steps, weight_slots);
    const uint32_t lane_row = (warp.lane & 7) * pitch + (warp.lane >> 3) * 16 + warp.k * (DEPTH * BRICK_K);
    const uint32_t rows = kept((NORM ? shared_address(resident) : row_slots) + lane_row);
    int32_t acc[2][GROUPS][4] = {};
    if constexpr (NORM) {
        NoCopies copies;
        Pipeline<T, BITS, GROUPS, WARPS_K, DEPTH, STAGES, true> pipeline{ring, copies, rows, 8u * pitch, steps.count};
        pipeline.fill();
        __shared__ NormScratch<T::ROWS, NORM_SEGMENTS> scratch;
        const auto place = [&](int row, int column) { return resident + row * pitch + column; };
        const auto meanwhile = [&] {
            table.load(p, first_channel);
            load_grids<T, OUTPUT>(p, first_row, exist, grids);
        };
        norm_quantize_tile<T::SHAPE.warps()>(p.norm_in, p.norm, p.table, p.positions, p.grids, 0,
                                             static_cast<int>(p.rows), T::ROWS, resident_columns, scratch, place,
                                             meanwhile);
        __syncthreads();
        pipeline.run(acc);
    } else {
        RowCopies<T> copies(p, first_row, exist, begin * BRICK_K, steps, row_slots);
        Pipeline<T, BITS, GROUPS, WARPS_K, DEPTH, STAGES, false> pipeline{ring, copies, rows, 0, steps.count};
        pipeline.fill();
        table.load(p, first_channel);
        load_grids<T, OUTPUT>(p, first_row, exist, grids);
        pipeline.run(acc);
    }

    __syncthreads();  // the slots become room for the exchange
    int4* exchange = reinterpret_cast<int4*>(slots);
    const Channels channels(p, table, first_channel, warp.n * STRIP + (warp.lane >> 2) * QUAD);
    const auto finish = [&](const auto& epilogue) {
        if constexpr (WARPS_K == 1) {
            finish_alone<T, BITS, GROUPS>(acc, warp, grids, exist, exchange, epilogue);
        } else {
            finish_together<T, BITS, GROUPS, WARPS_N, WARPS_K>(p, acc, warp, grids, exist, exchange, epilogue);
        }
    };
    if (OUTPUT != Output::gate_residual && p.activation != Activation::none) {
        finish(Epilogue<OUTPUT, true>(p, channels, first_row));
    } else {
        finish(Epilogue<OUTPUT, false>(p, channels, first_row));
    }
}

}  // namespace ptq::cuda
