// C[M,N] f16 = (A[M,K] s8 . B[N,K]^T s8) * sa[m] * sb[n] + bias[n]: 64x64x64 tiles, 4 warps of 32x32, two cp.async
// stages. BUG plants a mistake, SWIZZLED off costs bank conflicts; the kernels at the end are the variants that tests
// run.
#include <cuda_fp16.h>
#include <cstdint>

constexpr int BM = 64, BN = 64, BK = 64;
__device__ __forceinline__ uint32_t sm(const void* p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}
__device__ __forceinline__ void cp16(uint32_t dst, const void* src, int n) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(dst), "l"(src), "r"(n));
}
__device__ __forceinline__ void ldsm4(uint32_t* r, uint32_t a) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(a));
}
__device__ __forceinline__ void mma(int* c, const uint32_t* a, const uint32_t* b) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Byte offset of the 16-byte chunk c of row r; rows of 64 bytes.
template <bool SWIZZLED>
__device__ __forceinline__ int chunk(int r, int c) {
    return r * 64 + (SWIZZLED ? c ^ ((r >> 1) & 3) : c) * 16;
}

struct Operands {
    const int8_t *A, *B;
    const float *sa, *sb, *bias;
    __half* C;
    int M, N, K;
};

template <int BUG, bool SWIZZLED>
__device__ __forceinline__ void gemm(const Operands& o) {
    const int8_t* __restrict__ A = o.A, * __restrict__ B = o.B;
    const float* __restrict__ sa = o.sa, * __restrict__ sb = o.sb, * __restrict__ bias = o.bias;
    __half* __restrict__ C = o.C;
    const int M = o.M, N = o.N, K = o.K;
    __shared__ __align__(128) int8_t As[2][BM * BK], Bs[2][BN * BK];
    int t = threadIdx.x, lane = t & 31, w = t >> 5, m0 = blockIdx.y * BM, n0 = blockIdx.x * BN, wm = (w & 1) * 32,
        wn = (w >> 1) * 32;
    int acc[2][4][4] = {};
    auto load = [&](int st, int k0) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int q = t + i * 128, r = q >> 2, c = q & 3, k = k0 + c * 16, n = max(0, min(16, K - k));
            int na = m0 + r < M ? n : 0, nb = n0 + r < N ? n : 0;
            if (BUG == 3) na = n;  // no guard for the rows: reads past the end of A
            cp16(sm(&As[st][chunk<SWIZZLED>(r, c)]), na ? A + (size_t)(m0 + r) * K + k : A, na);
            cp16(sm(&Bs[st][chunk<SWIZZLED>(r, c)]), nb ? B + (size_t)(n0 + r) * K + k : B, nb);
        }
        asm volatile("cp.async.commit_group;\n");
    };
    int nk = (K + BK - 1) / BK;
    load(0, 0);
    for (int kt = 0; kt < nk; kt++) {
        if (kt + 1 < nk) {
            load((kt + 1) & 1, (kt + 1) * BK);
            asm volatile("cp.async.wait_group %0;\n" ::"n"(BUG == 2 ? 2 : 1));
        } else if (BUG != 2) {
            asm volatile("cp.async.wait_group 0;\n");
        }
        if (BUG != 1) __syncthreads();
        const int8_t *as = As[kt & 1], *bs = Bs[kt & 1];
#pragma unroll
        for (int kk = 0; kk < 2; kk++) {
            uint32_t a[2][4], b[2][4];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int row = wm + i * 16 + (lane & 15), ch = kk * 2 + (lane >> 4);
                if (BUG == 4) row = wm + i * 16 + (lane & 7);                         // rows 8 to 15 are never fetched
                ldsm4(a[i], sm(as + chunk<SWIZZLED>(row, ch)) + (BUG == 6 ? 8 : 0));  // 6: misaligned
                int rb = wn + i * 16 + (lane & 7) + ((lane >> 4) << 3), cb = kk * 2 + ((lane >> 3) & 1);
                ldsm4(b[i], sm(bs + chunk<SWIZZLED>(rb, cb)));
            }
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) mma(acc[i][j], a[i], &b[j >> 1][(j & 1) * 2]);
        }
        if (BUG != 5) __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int m = m0 + wm + i * 16 + (lane >> 2) + (e >> 1) * 8, n = n0 + wn + j * 8 + (lane & 3) * 2 + (e & 1);
                if (m < M && n < N)
                    C[(size_t)m * N + n] =
                        __float2half_rn(__fmaf_rn(__fmul_rn((float)acc[i][j][e], sa[m]), sb[n], bias[n]));
            }
}

#define KERNEL(NAME, BUG, SWIZZLED)                                                                                   \
    extern "C" __global__ void __launch_bounds__(128)                                                                 \
        NAME(const int8_t* A, const int8_t* B, const float* sa, const float* sb, const float* bias, __half* C, int M, \
             int N, int K) {                                                                                          \
        gemm<BUG, SWIZZLED>(Operands{A, B, sa, sb, bias, C, M, N, K});                                                \
    }
KERNEL(gemm_s8, 0, true)
KERNEL(gemm_unswizzled, 0, false)
KERNEL(gemm_bug1, 1, true)  // no barrier after the wait
KERNEL(gemm_bug2, 2, true)  // no wait
KERNEL(gemm_bug3, 3, true)
KERNEL(gemm_bug4, 4, true)
KERNEL(gemm_bug5, 5, true)  // no barrier at the end of the loop
KERNEL(gemm_bug6, 6, true)
