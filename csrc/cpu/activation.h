// exp and the activations on 16 lanes: no tables, no library calls, the same bits on every instruction set. NaN stays
// NaN.
#pragma once

#include "isa.h"

namespace ptq::PTQ_NS {

// Adding 1.5 * 2^23 to |y| < 2^22 rounds y to an integer n and leaves n in the low bits of the float. Adding `bias`
// with it and shifting left by 23 then makes these bits an exponent: 2^n for the bias 127. A further 256 sets the sign.
constexpr float ROUNDER = 0x1.8p23f;

inline F times_power(F a, F rounded) {
    return a * as_float(shift_left(as_int(rounded), 23));
}

// c[0] + c[1] x + ... + c[N - 1] x^(N - 1)
template <int N>
inline F polynomial(F x, const float (&c)[N]) {
    F y = set1(c[N - 1]);
    for (int i = N - 2; i >= 0; --i) y = fma(y, x, set1(c[i]));
    return y;
}

// e^x = 2^n e^r, n = rne(x log2(e)), |r| <= ln(2) / 2: within 1 ulp where the result is normal. 0 below -87.69,
// infinity above 88.37: the subnormal results and the last half binade are not worth the instructions.
inline F exp(F x) {
    // Polynomial: relative error 3e-9. ln(2) in two parts.
    constexpr float c[] = {1.0f, 1.0f, 0x1.fffffcp-2f, 0x1.55549p-3f, 0x1.5558f4p-5f, 0x1.123a6cp-7f, 0x1.6a2352p-10f};
    constexpr float ln2_high = 0x1.62e43p-1f, ln2_low = -0x1.05c61p-29f;
    // n in [-127, 128] gives the factors 0 and infinity at the ends. Order of arguments: a NaN must pass.
    x = min(set1(88.7f), max(set1(-88.0f), x));
    const F rounded = fma(x, set1(0x1.715476p0f), set1(ROUNDER + 127.0f));
    const F n = rounded - set1(ROUNDER + 127.0f);
    const F r = fma(n, set1(-ln2_low), fma(n, set1(-ln2_high), x));
    return times_power(polynomial(r, c), rounded);
}

// x / (1 + e^-x)
inline F silu(F x) {
    return x / (set1(1.0f) + exp(set1(0.0f) - x));
}

// 0.5 x (1 + tanh(u)) = x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3): no cancellation for negative x.
inline F gelu_tanh(F x) {
    constexpr float c1 = -1.5957691216057308f, c3 = -0.07135481282052485f;  // of -2u
    return x / (set1(1.0f) + exp(x * fma(x * x, set1(c3), set1(c1))));
}

// x Phi(x) = max(x, 0) - |x| Phi(-|x|): a difference without cancellation.
//
//   Phi(-a) = 2^(y - 1),  y = a Q(a)
//
// log2(2 Phi(-a)) is smooth: degree 9 for Q reaches the rounding error of y on 0 <= a <= 5.5. Further out, where the
// product is below 1e-7, y falls faster than it should, and always towards minus infinity.
inline F gelu_erf(F x) {
    constexpr float q[] = {-0x1.26aedcp+0f,  -0x1.d63a6ap-2f, -0x1.adf35ap-5f,  0x1.cb72f6p-8f,  -0x1.ad9c1ep-15f,
                           -0x1.0c488cp-12f, 0x1.252898p-14f, -0x1.4ca632p-17f, 0x1.9c6f46p-21f, -0x1.b83280p-26f};
    constexpr float power[] = {1.0f,           0x1.62e43p-1f,   0x1.ebfbdcp-3f, 0x1.c6aee6p-5f,
                               0x1.3b2d50p-7f, 0x1.5f3f30p-10f, 0x1.41fb2ep-13f};  // 2^f, |f| <= 1/2, to 2e-9
    constexpr float rounder = ROUNDER + 126.0f + 256.0f;                           // -2^(n - 1)
    const F a = abs(x);
    const F y = max(set1(-126.0f), a * polynomial(a, q));
    const F rounded = y + set1(rounder);
    const F f = y - (rounded - set1(rounder));
    return fma(a, times_power(polynomial(f, power), rounded), max(set1(0.0f), x));
}

inline F activate(F x, Activation activation) {
    switch (activation) {
        case Activation::none:
            return x;
        case Activation::silu:
            return silu(x);
        case Activation::gelu_erf:
            return gelu_erf(x);
        case Activation::gelu_tanh:
            return gelu_tanh(x);
    }
    return x;
}

}  // namespace ptq::PTQ_NS
