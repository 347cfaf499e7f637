#include "gemm_kernels.cuh"

PTQ_GEMM_KERNELS(6, quant)
PTQ_GEMM_NORM_KERNELS(6, quant)
