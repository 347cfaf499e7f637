#pragma once

#include "isa.h"

namespace ptq::PTQ_NS {

// Operations per second of a loop that holds nothing but the products and sums of the kernels, operands in registers.
double products(int bits, int act_bits, int threads);

// Sum of `bytes` (a multiple of 256) of memory as int32: reading, and next to nothing else.
int32_t read_memory(const void* memory, int64_t bytes);

}  // namespace ptq::PTQ_NS
