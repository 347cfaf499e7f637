// The bare register loops: what the instructions of the products allow when nothing has to be loaded. The empty asm
// statements keep the compiler from computing a product once for all repetitions.
#include "ceiling.h"

#include <time.h>

#if defined(PTQ_ISA_AMX)
#include "amx.h"
#endif
#include "prefetch.h"
#include "threads.h"

namespace ptq::PTQ_NS {
namespace {

#if defined(PTQ_EMULATE_AVX512)
constexpr int ROUNDS = 20;
#else
constexpr int ROUNDS = 20000;
#endif

double seconds() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

volatile int32_t sink;

// Each returns the operations of one call.
#if defined(PTQ_ISA_AMX)
// Four independent accumulators, as in the kernels.
int64_t loop(int /*bits*/, int /*act_bits*/) {
    TileScope scope;
    scope.shape(32);
    for (int i = 0; i < ROUNDS; ++i) {
        _tile_dpbsud(0, 6, 4);
        _tile_dpbsud(1, 6, 5);
        _tile_dpbsud(2, 7, 4);
        _tile_dpbsud(3, 7, 5);
    }
    return int64_t{ROUNDS} * 4 * 16 * 16 * 64 * 2;
}
#elif defined(PTQ_ISA_AVX512VNNI)
int64_t loop(int /*bits*/, int /*act_bits*/) {
    __m512i sum[24], w = _mm512_set1_epi8(3), q = _mm512_set1_epi8(-2);
#pragma GCC unroll 24
    for (int j = 0; j < 24; ++j) sum[j] = _mm512_setzero_si512();
    for (int i = 0; i < ROUNDS; ++i) {
#pragma GCC unroll 24
        for (int j = 0; j < 24; ++j) {
#if defined(PTQ_EMULATE_AVX512)
            sum[j] = _mm512_dpbusd_epi32(sum[j], w, q);
#else
            asm volatile("vpdpbusd %2, %1, %0" : "+v"(sum[j]) : "v"(w), "v"(q));
#endif
        }
    }
#pragma GCC unroll 24
    for (int i = 1; i < 24; ++i) sum[0] = _mm512_add_epi32(sum[0], sum[i]);
    sink = _mm512_reduce_add_epi32(sum[0]);
    return int64_t{ROUNDS} * 24 * 128;
}
#elif defined(PTQ_ISA_AVX2)
// In assembly, so that every product is computed and every sum stays where it is.
inline __m256i multiply8(__m256i w, __m256i q) {
    __m256i product;
    asm volatile("vpmaddubsw %2, %1, %0" : "=x"(product) : "x"(w), "x"(q));
    return product;
}
inline __m256i multiply16(__m256i w, __m256i q) {
    __m256i product;
    asm volatile("vpmaddwd %2, %1, %0" : "=x"(product) : "x"(w), "x"(q));
    return product;
}
inline void add16(__m256i& sum, __m256i a) {
    asm volatile("vpaddw %1, %0, %0" : "+x"(sum) : "x"(a));
}
inline void add32(__m256i& sum, __m256i a) {
    asm volatile("vpaddd %1, %0, %0" : "+x"(sum) : "x"(a));
}

// BITS of the weights; SUMS `vpmaddubsw` of 6-bit weights are added in 16 bits, then widened.
template <int BITS, int SUMS>
int64_t repeat() {
    __m256i sum[8];
    const __m256i w = _mm256_set1_epi8(3), q = _mm256_set1_epi8(-2), ones = _mm256_set1_epi16(1);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) sum[j] = _mm256_setzero_si256();
    for (int i = 0; i < ROUNDS; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
            if (BITS == 8) {
                add32(sum[j], multiply16(w, q));
                continue;
            }
            __m256i narrow = multiply8(w, q);
#pragma GCC unroll 8
            for (int n = 1; n < SUMS; ++n) add16(narrow, multiply8(w, q));
            add32(sum[j], multiply16(narrow, ones));
        }
    }
#pragma GCC unroll 8
    for (int i = 1; i < 8; ++i) sum[0] = _mm256_add_epi32(sum[0], sum[i]);
    sink = _mm256_extract_epi32(sum[0], 0);
    return int64_t{ROUNDS} * 8 * (BITS == 8 ? 32 : 64 * SUMS);
}

int64_t loop(int bits, int act_bits) {
    if (bits == 8) return repeat<8, 1>();
    return act_bits == 6 ? repeat<6, 8>() : repeat<6, 2>();
}
#else
int64_t loop(int /*bits*/, int /*act_bits*/) {
    int32_t sum[LANES] = {}, w[LANES], q = -2;
    for (int i = 0; i < LANES; ++i) w[i] = i;
    for (int i = 0; i < ROUNDS; ++i) {
        asm volatile("" : "+r"(q));
        for (int j = 0; j < LANES; ++j) sum[j] += w[j] * q;
    }
    for (int i = 0; i < LANES; ++i) sink = sink + sum[i];
    return int64_t{ROUNDS} * LANES * 2;
}
#endif

}  // namespace

int32_t read_memory(const void* memory, int64_t bytes) {
    const int32_t* p = static_cast<const int32_t*>(memory);
    I sums[4] = {set1i(0), set1i(0), set1i(0), set1i(0)};
    for (int64_t i = 0; i < bytes / 4; i += 64) {
        for (int j = 0; j < 4; ++j) {
            __builtin_prefetch(p + i + 16 * j + Stream::AHEAD / 4, 0, 2);  // as the kernels do
            sums[j] = sums[j] + loadi(p + i + 16 * j);
        }
    }
    return sum(sums[0] + sums[1] + (sums[2] + sums[3]));
}

double products(int bits, int act_bits, int threads) {
    double best = 0;
    for (int repeat = 0; repeat < 9; ++repeat) {
        const double start = seconds();
        int64_t total = 0;
        parallel(threads, threads * 8,
                 [&](int64_t) { __atomic_fetch_add(&total, loop(bits, act_bits), __ATOMIC_RELAXED); });
        const double rate = static_cast<double>(total) / (seconds() - start);
        best = rate > best ? rate : best;
    }
    return best;
}

}  // namespace ptq::PTQ_NS
