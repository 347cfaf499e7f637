#include "gemm_kernels.cuh"

PTQ_GEMM_KERNELS(8, gate_residual)
