#pragma once

#include "isa.h"

namespace ptq::PTQ_NS {

// Operations per second of a loop that holds nothing but the products and sums of the kernels, operands in registers.
double products(int bits, int act_bits, int threads);

}  // namespace ptq::PTQ_NS
