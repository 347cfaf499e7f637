// Activations in float32.
#pragma once

#include "../types.h"

namespace ptq::cuda {

// x / (1 + e^-x). The quotient and e^x are the approximations of the hardware (2 ulp): where e^-x is wrong by more, for
// large negative x, the result is close to 0.
__device__ __forceinline__ float over_one_plus_exp(float x, float u) {
    return __fdividef(x, 1.0f + __expf(u));
}

__device__ __forceinline__ float silu(float x) {
    return over_one_plus_exp(x, -x);
}

// x / 2 * (1 + erf(x / sqrt 2))
__device__ __forceinline__ float gelu_erf(float x) {
    return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
}

// x / 2 * (1 + tanh u) = x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3): the second form does not cancel where
// tanh is close to -1.
__device__ __forceinline__ float gelu_tanh(float x) {
    return over_one_plus_exp(x, (x + (x * x * x) * 0.044715f) * -1.5957691216057308f);
}

// All N values; the switch is uniform, so it stands outside of the loop.
template <int N>
__device__ __forceinline__ void activate(Activation activation, float (&v)[N]) {
    if (activation == Activation::gelu_tanh) {
#pragma unroll
        for (int i = 0; i < N; ++i) v[i] = gelu_tanh(v[i]);
    } else if (activation == Activation::gelu_erf) {
#pragma unroll
        for (int i = 0; i < N; ++i) v[i] = gelu_erf(v[i]);
    } else if (activation == Activation::silu) {
#pragma unroll
        for (int i = 0; i < N; ++i) v[i] = silu(v[i]);
    }
}

}  // namespace ptq::cuda
