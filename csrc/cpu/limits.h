// The machine's limits, measured: what a benchmark compares the kernels with.
#pragma once

#include <cstdint>

namespace ptq {

// Bytes per second of reading `bytes` of memory (larger than the caches) once, best of `repeats`.
double measure_read(int64_t bytes, int repeats, int threads);

}  // namespace ptq
