// Operators on rows of floating-point numbers: quantize.cpp, append.cpp and attention.cpp. Included by the table of
// kernels.
#pragma once

#include "isa.h"
#include "kernels.h"

namespace ptq::PTQ_NS {

Status quantize(const QuantizeArgs& args, int threads);
Status adaln_quant(const AdalnArgs& args, int threads);
Status qkv_append(const AppendArgs& args, int threads);
void attention(const AttentionArgs& args, int threads);

}  // namespace ptq::PTQ_NS
