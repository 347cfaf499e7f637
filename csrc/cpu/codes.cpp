#include "codes.h"

#include "threads.h"

namespace ptq::PTQ_NS {
namespace {

constexpr int64_t TASK_BYTES = 65536;

struct RowFacts {
    int32_t sum;
    float low, high;
};

RowFacts facts(const int8_t* codes, int64_t width, bool bounds) {
    I total = set1i(0);
    F low = set1(0.0f), high = low;  // codes include 0 in every grid
    for (int64_t i = 0; i < width; i += LANES) {
        const I code = i + LANES <= width ? load_i8(codes + i) : load_i8_n(codes + i, width - i);
        total = total + code;
        if (!bounds) continue;
        const F value = to_float(code);
        low = min(low, value);
        high = max(high, value);
    }
    return {sum(total), -max_of(set1(0.0f) - low), max_of(high)};
}

template <typename Function>
void each_row(int64_t rows, int64_t width, int threads, const Function& function) {
    const int64_t per_task = TASK_BYTES / width > 0 ? TASK_BYTES / width : 1;
    parallel(threads, (rows + per_task - 1) / per_task, [&](int64_t task) {
        const int64_t end = (task + 1) * per_task < rows ? (task + 1) * per_task : rows;
        for (int64_t row = task * per_task; row < end; ++row) function(row);
    });
}

}  // namespace

void sum_codes(const Codes& codes, int64_t rows, int64_t width, int threads) {
    if (width == 0) return;
    each_row(rows, width, threads,
             [&](int64_t row) { codes.sums[row] = facts(codes.codes + row * width, width, false).sum; });
}

bool good_codes(const LinearArgs& args, int threads) {
    int bad = 0;
    const int64_t width = args.weights.in_features;
    each_row(args.rows, width, threads, [&](int64_t row) {
        const Grid& grid = args.table.rows[args.positions.of_row(row)];
        const RowFacts found = facts(args.codes + row * width, width, grid.bits != 8.0f);
        if (found.sum != args.row_sums[row] || found.low < -grid.half() || found.high > grid.half() - 1.0f) {
            __atomic_store_n(&bad, 1, __ATOMIC_RELAXED);
        }
    });
    return bad == 0;
}

}  // namespace ptq::PTQ_NS
