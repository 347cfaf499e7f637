// Vectors of attention heads: what a qk_kind does to a query or key. A vector lies over a group of lanes, N
// neighbouring values in each, zeros behind its end.
#pragma once

#include "octets.cuh"

namespace ptq::cuda {

constexpr float L2_EPS = 1e-12f;  // as torch.nn.functional.normalize

// (x - mean) * rsqrt(var + eps). `count`: how many of this lane's values exist.
template <int N>
__device__ __forceinline__ void head_layer_norm(float (&v)[N], int count, int head_dim, float eps, int lanes) {
    const float width = static_cast<float>(head_dim);
    float sum = v[0];
#pragma unroll
    for (int i = 1; i < N; ++i) sum += v[i];
    const float mean = __fdiv_rn(group_sum(sum, lanes), width);
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        v[i] = i < count ? v[i] - mean : 0.0f;
        squares = __fmaf_rn(v[i], v[i], squares);
    }
    const float rstd = __frcp_rn(__fsqrt_rn(__fdiv_rn(group_sum(squares, lanes), width) + eps));
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = v[i] * rstd;
}

// x / max(|x|, 1e-12) * factor
template <int N>
__device__ __forceinline__ void head_l2_norm(float (&v)[N], float factor, int lanes) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) squares = __fmaf_rn(v[i], v[i], squares);
    const float shrink = __frcp_rn(fmaxf(__fsqrt_rn(group_sum(squares, lanes)), L2_EPS));
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = (v[i] * shrink) * factor;
}

// The pairs (2j, 2j + 1): (a, b) -> (a cos - b sin, b cos + a sin). angles: (cos, sin) of the same columns.
template <int N>
__device__ __forceinline__ void head_rotate(float (&v)[N], const float (&angles)[N]) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
        const float a = v[i], b = v[i + 1], cos = angles[i], sin = angles[i + 1];
        v[i] = a * cos - b * sin;
        v[i + 1] = b * cos + a * sin;
    }
}

// What a kind applies to eight values of q and k of a head. P has `kind`, `eps`, `head_dim` and, as AppendParams does,
// pointers and dtypes of the vectors. Fetching and applying are apart, so that loads start early.
struct HeadVectors {
    Raw<OCTET> q_weight, q_bias, k_weight, k_bias, angles;
    float factor;

    // Values [first, first + count) of a head; `slot`: the row of the rotation.
    template <class P>
    __device__ __forceinline__ void fetch_for(const P& p, uint32_t head, int64_t slot, int first, int count) {
        const auto vector = [&](const void* data, DType dtype, int64_t begin) {
            return fetch_octet<Aligned::quads>(at(data, dtype, begin + first), dtype, count);
        };
        if (p.kind == QkKind::layer_norm) {
            if (p.q_weight) q_weight = vector(p.q_weight, p.q_weight_dtype, 0);
            if (p.q_bias) q_bias = vector(p.q_bias, p.q_bias_dtype, 0);
            if (p.k_weight) k_weight = vector(p.k_weight, p.k_weight_dtype, 0);
            if (p.k_bias) k_bias = vector(p.k_bias, p.k_bias_dtype, 0);
        } else if (p.kind == QkKind::l2) {
            factor = count > 0 ? load_float(p.q_scale, p.q_scale_dtype, head) : 0.0f;
        } else if (p.kind == QkKind::rope) {
            angles = vector(p.rope, p.rope_dtype, slot * p.head_dim);
        }
    }

    // By all lanes of a warp; a vector lies over `lanes` of them.
    template <class P>
    __device__ __forceinline__ void apply(const P& p, float (&q)[OCTET], float (&k)[OCTET], int count,
                                          int lanes) const {
        if (p.kind == QkKind::layer_norm) {
            head_layer_norm(q, count, p.head_dim, p.eps, lanes);
            head_layer_norm(k, count, p.head_dim, p.eps, lanes);
            affine(q, p.q_weight, q_weight, p.q_weight_dtype, p.q_bias, q_bias, p.q_bias_dtype);
            affine(k, p.k_weight, k_weight, p.k_weight_dtype, p.k_bias, k_bias, p.k_bias_dtype);
        } else if (p.kind == QkKind::l2) {
            head_l2_norm(q, factor, lanes);
            head_l2_norm(k, 1.0f, lanes);
        } else if (p.kind == QkKind::rope) {
            float turn[OCTET];
            widen(angles, p.rope_dtype, turn);
            head_rotate(q, turn);
            head_rotate(k, turn);
        }
    }

  private:
    static __device__ __forceinline__ void affine(float (&v)[OCTET], const void* has_weight, const Raw<OCTET>& weight,
                                                  DType weight_dtype, const void* has_bias, const Raw<OCTET>& bias,
                                                  DType bias_dtype) {
        float w[OCTET];
        if (has_weight) {
            widen(weight, weight_dtype, w);
#pragma unroll
            for (int i = 0; i < OCTET; ++i) v[i] = v[i] * w[i];
        }
        if (has_bias) {
            widen(bias, bias_dtype, w);
#pragma unroll
            for (int i = 0; i < OCTET; ++i) v[i] = v[i] + w[i];
        }
    }
};

// Codes on the 8-bit grid of a group and head, zeros where the vector has ended.
__device__ __forceinline__ void head_codes(float recip, float zq, const float (&v)[OCTET], int count,
                                           uint32_t (&codes)[2]) {
    to_codes(Quantizer(recip, zq, 128.0f), v, codes);
    clear_codes(codes, count);
}

}  // namespace ptq::cuda
