// The vector types of the instruction set this file is compiled for: PTQ_ISA is portable, avx2, avx512vnni or amx
// (which is avx512vnni with tiles for the products of many rows).
//
// Every set offers the same 16 lanes and the same operations, each rounded once in the same order, so that the float
// results of all sets are equal bit for bit. Only the integer products (gemm_*.h) differ in shape.
#pragma once

#include "../types.h"

namespace ptq {
constexpr int LANES = 16;
}

#if defined(PTQ_ISA_AMX)
#define PTQ_ISA_AVX512VNNI
#endif

#if defined(PTQ_ISA_AVX512VNNI)
#include "isa_avx512.h"
#elif defined(PTQ_ISA_AVX2)
#include "isa_avx2.h"
#else
#include "isa_portable.h"
#endif
