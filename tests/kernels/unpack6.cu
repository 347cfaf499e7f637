// The unpacking of six-bit weights alone, for its test: three planes of `words` words each into four.
#include "cuda/int6.cuh"

extern "C" __global__ void unpack6_kernel(const uint32_t* planes, uint32_t* out, uint32_t words) {
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    uint32_t w[4];
    ptq::cuda::unpack6(planes[i], planes[words + i], planes[2 * words + i], w);
#pragma unroll
    for (int j = 0; j < 4; ++j) out[j * words + i] = w[j];
}
