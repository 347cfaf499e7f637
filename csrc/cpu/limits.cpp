#include "limits.h"

#include <atomic>
#include <chrono>
#include <cstring>

#include "dispatch.h"
#include "memory.h"
#include "threads.h"

namespace ptq {

double measure_read(int64_t bytes, int repeats, int threads) {
    constexpr int64_t PIECE = 1 << 20;
    const int64_t pieces = bytes / PIECE > 0 ? bytes / PIECE : 1;
    const LargeBuffer memory(pieces * PIECE);
    std::memset(memory.data(), 1, static_cast<size_t>(pieces * PIECE));
    double best = 0;
    for (int repeat = 0; repeat < repeats; ++repeat) {
        std::atomic<int32_t> sink{0};
        const auto start = std::chrono::steady_clock::now();
        parallel(threads, pieces,
                 [&](int64_t piece) { sink += kernels().read_memory(memory.data() + piece * PIECE, PIECE); });
        const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        const double rate = static_cast<double>(pieces * PIECE) / seconds;
        best = rate > best ? rate : best;
    }
    return best;
}

}  // namespace ptq
