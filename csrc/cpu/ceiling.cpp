// The bare register loops: what the instructions of the products allow when nothing has to be loaded. The empty asm
// statements keep the compiler from computing a product once for all repetitions.
#include "ceiling.h"

#include <time.h>

#include "threads.h"

namespace ptq::PTQ_NS {
namespace {

constexpr int ROUNDS = 20000;

double seconds() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

volatile int32_t sink;

// Each returns the operations of one call.
#if defined(PTQ_ISA_AVX512VNNI)
int64_t loop(int /*bits*/, int /*act_bits*/) {
    __m512i sum[24], w = _mm512_set1_epi8(3), q = _mm512_set1_epi8(-2);
#pragma GCC unroll 24
    for (int j = 0; j < 24; ++j) sum[j] = _mm512_setzero_si512();
    for (int i = 0; i < ROUNDS; ++i) {
#pragma GCC unroll 24
        for (int j = 0; j < 24; ++j) asm volatile("vpdpbusd %2, %1, %0" : "+v"(sum[j]) : "v"(w), "v"(q));
    }
#pragma GCC unroll 24
    for (int i = 1; i < 24; ++i) sum[0] = _mm512_add_epi32(sum[0], sum[i]);
    sink = _mm512_reduce_add_epi32(sum[0]);
    return int64_t{ROUNDS} * 24 * 128;
}
#elif defined(PTQ_ISA_AVX2)
template <typename Step>
int64_t repeat(int64_t operations, const Step& step) {
    __m256i sum[8], w = _mm256_set1_epi8(3), q = _mm256_set1_epi8(-2);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) sum[j] = _mm256_setzero_si256();
    for (int i = 0; i < ROUNDS; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
            asm volatile("" : "+x"(w), "+x"(q));
            step(sum[j], w, q);
        }
    }
#pragma GCC unroll 8
    for (int i = 1; i < 8; ++i) sum[0] = _mm256_add_epi32(sum[0], sum[i]);
    sink = _mm256_extract_epi32(sum[0], 0);
    return ROUNDS * 8 * operations;
}

// SUMS `vpmaddubsw` added in 16 bits, then widened: the least a 6-bit weight needs.
template <int SUMS>
int64_t repeat6() {
    return repeat(SUMS * 64, [](__m256i& s, __m256i& w, __m256i& q) {
        __m256i narrow = _mm256_maddubs_epi16(w, q);
#pragma GCC unroll 8
        for (int i = 1; i < SUMS; ++i) {
            asm volatile("" : "+x"(w));
            narrow = _mm256_add_epi16(narrow, _mm256_maddubs_epi16(w, q));
        }
        s = _mm256_add_epi32(s, _mm256_madd_epi16(narrow, _mm256_set1_epi16(1)));
    });
}

int64_t loop(int bits, int act_bits) {
    if (bits == 6) return act_bits == 6 ? repeat6<8>() : repeat6<2>();
    return repeat(32, [](__m256i& s, __m256i& w, __m256i& q) { s = _mm256_add_epi32(s, _mm256_madd_epi16(w, q)); });
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
