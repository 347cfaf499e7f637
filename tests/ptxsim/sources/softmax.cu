// one block per row: softmax, plus the row quantised to int8 with its scale; ragged row length
#include <cuda_fp16.h>
#include <cstdint>
__device__ float red(float v, float* s, bool mx) {
#pragma unroll
    for (int o = 16; o; o >>= 1) {
        float u = __shfl_xor_sync(~0u, v, o);
        v = mx ? fmaxf(v, u) : v + u;
    }
    int w = threadIdx.x >> 5, l = threadIdx.x & 31, nw = blockDim.x >> 5;
    if (l == 0) s[w] = v;
    __syncthreads();
    float r = s[0];
    for (int i = 1; i < nw; i++) r = mx ? fmaxf(r, s[i]) : r + s[i];
    __syncthreads();
    return r;
}
extern "C" __global__ void softmax_q(const __half* __restrict__ x, __half* y, int8_t* q, float* qs, int n) {
    extern __shared__ float buf[];
    __shared__ float s[32];
    const __half* r = x + (size_t)blockIdx.x * n;
    float m = -INFINITY;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        float v = __half2float(r[i]);
        buf[i] = v;
        m = fmaxf(m, v);
    }
    m = red(m, s, true);
    float t = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        float e = exp2f((buf[i] - m) * 1.4426950408889634f);
        buf[i] = e;
        t += e;
    }
    t = red(t, s, false);
    float inv = 1.0f / t, am = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        float p = buf[i] * inv;
        buf[i] = p;
        am = fmaxf(am, p);
        y[(size_t)blockIdx.x * n + i] = __float2half_rn(p);
    }
    am = red(am, s, true);
    if (threadIdx.x == 0) qs[blockIdx.x] = am / 127.0f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        int v = __float2int_rn(buf[i] * (127.0f / am));
        q[(size_t)blockIdx.x * n + i] = (int8_t)max(-128, min(127, v));
    }
}
// block sum with a tree in shared memory and a histogram with atomics
extern "C" __global__ void hist(const uint8_t* x, int* h, int n) {
    __shared__ int s[16];
    if (threadIdx.x < 16) s[threadIdx.x] = 0;
    __syncthreads();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) atomicAdd(&s[x[i] & 15], 1);
    __syncthreads();
    if (threadIdx.x < 16) atomicAdd(&h[threadIdx.x], s[threadIdx.x]);
}
