// The driver of the integer linear layer: gemm.cpp. Included by the table of kernels.
#pragma once

#include "isa.h"
#include "kernels.h"

namespace ptq::PTQ_NS {

Status linear(const LinearArgs& args, int threads);

}  // namespace ptq::PTQ_NS
