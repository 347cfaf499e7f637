// broad instruction coverage of nvcc output
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cassert>
#include <cstdint>
#include <cstdio>
struct P {
    int a;
    float b;
    short c[3];
};
__constant__ int tab[8] = {1, 2, 3, 5, 8, 13, 21, 34};
__device__ int counter;
extern "C" __global__ void wide(const int* x, const float* f, long long* o, float* g, P p, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    int v = x[i];
    unsigned u = v;
    float h = f[i];
    assert(n > 0);
    int loc[16];
    for (int k = 0; k < 16; k++) loc[k] = v * k + p.c[k % 3];
    long long r = loc[u & 15] + p.a;
    switch (u % 7) {
        case 0:
            r += 3;
            break;
        case 1:
            r *= 5;
            break;
        case 2:
            r ^= 77;
            break;
        case 3:
            r -= v;
            break;
        case 4:
            r = r << 2;
            break;
        case 5:
            r = r / 3;
            break;
        default:
            r = -r;
    }
    r += (long long)v * 1000003LL / (1 + (u & 255)) + (unsigned long long)u % 97ULL;
    r += __dp4a(v, (int)0x01FF7F80, 5) + __byte_perm(u, ~u, 0x2705) + __funnelshift_r(u, ~u, v & 31) + __popc(u) +
         __clz(v) + __ffs(v) + __brev(u);
    r += tab[u & 7] + __vadd4(u, 0x01020304u);
    r += (int)(int8_t)(u >> 3) + max(min(v, 100), -100) + abs(v) + __mulhi(v, 12345) + (int)__umulhi(u, 54321u);
    if (v == 123456789) printf("hello %d\n", v);
    o[i] = r;
    float a = expf(h) + logf(fabsf(h) + 1) + sinf(h) + tanhf(h) + rsqrtf(h * h + 1) + erff(h) +
              powf(fabsf(h) + .5f, 1.7f) + fmodf(h, .7f) + p.b;
    a += __half2float(__hfma(__float2half(h), __float2half(2.f), __float2half(1.f)));
    __half2 h2 = __hadd2(__floats2half2_rn(h, 2 * h), __float2half2_rn(.5f));
    a += __low2float(h2) * __high2float(h2);
    a += __bfloat162float(__float2bfloat16(h)) + floorf(h) + ceilf(h) + truncf(h) + rintf(h) +
         (float)(double)sqrt((double)fabsf(h));
    g[i] = a;
    atomicAdd(&counter, 1);
}
extern "C" __global__ void div_loop(const int* x, int* o, int n) {  // nested divergence with early exits and a warp sum
    int i = threadIdx.x, s = 0;
    for (int k = 0; k < x[i]; k++) {
        if (k == 7) continue;
        for (int j = 0; j < (k & 3); j++) {
            s += j * k;
            if (s > 500) goto out;
        }
        if ((k ^ i) % 11 == 10) break;
    }
out:
    __syncwarp();
    s = __reduce_add_sync(~0u, s);
    o[i] = s + __popc(__ballot_sync(~0u, x[i] & 1));
    __shared__ int last;
    if (i == 0) last = 0;
    __syncthreads();
    if (x[i] & 1) atomicMax(&last, i);
    if (__syncthreads_or(x[i] > 1000)) o[i] = -1;
    o[i] += last;
}
