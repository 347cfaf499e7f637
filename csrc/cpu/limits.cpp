#include "limits.h"

#include <chrono>
#include <cstring>
#include <memory>

#include "threads.h"

namespace ptq {

double measure_read(int64_t bytes, int repeats, int threads) {
    constexpr int64_t PIECE = 1 << 20;
    const int64_t pieces = bytes / PIECE > 0 ? bytes / PIECE : 1;
    std::unique_ptr<uint64_t[]> memory(new uint64_t[static_cast<size_t>(pieces * PIECE / 8)]);
    std::memset(memory.get(), 1, static_cast<size_t>(pieces * PIECE));
    double best = 0;
    for (int repeat = 0; repeat < repeats; ++repeat) {
        volatile uint64_t sink = 0;
        const auto start = std::chrono::steady_clock::now();
        parallel(threads, pieces, [&](int64_t piece) {
            const uint64_t* p = memory.get() + piece * (PIECE / 8);
            uint64_t sum[8] = {};
            for (int64_t i = 0; i < PIECE / 8; i += 8) {
                __builtin_prefetch(p + i + 256);
                for (int j = 0; j < 8; ++j) sum[j] += p[i + j];
            }
            for (int j = 0; j < 8; ++j) sink = sink + sum[j];
        });
        const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        const double rate = static_cast<double>(pieces * PIECE) / seconds;
        best = rate > best ? rate : best;
    }
    return best;
}

}  // namespace ptq
