#pragma once

#include "isa.h"
#include "kernels.h"

namespace ptq::PTQ_NS {

// sums[i] = sum_k codes[i, k]
void sum_codes(const Codes& codes, int64_t rows, int64_t width, int threads);

// Whether every code lies in the grid of its position and the row sums are those of the codes.
bool good_codes(const LinearArgs& args, int threads);

}  // namespace ptq::PTQ_NS
