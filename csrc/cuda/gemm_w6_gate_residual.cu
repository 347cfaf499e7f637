#include "gemm_kernels.cuh"

PTQ_GEMM_KERNELS(6, gate_residual)
