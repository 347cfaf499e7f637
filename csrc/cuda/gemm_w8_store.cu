#include "gemm_kernels.cuh"

PTQ_GEMM_KERNELS(8, store)
PTQ_GEMM_NORM_KERNELS(8, store)
