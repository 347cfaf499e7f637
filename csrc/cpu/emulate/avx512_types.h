// Registers of the emulated AVX-512 as arrays, and reinterpretations between them.
#pragma once

#include <stdint.h>
#include <string.h>

namespace ptq {

struct alignas(16) __m128 {
    float v[4];
};
struct alignas(32) __m256 {
    float v[8];
};
struct alignas(64) __m512 {
    float v[16];
};
struct alignas(64) __m512d {
    double v[8];
};
struct alignas(16) __m128i {
    int8_t v[16];
};
struct alignas(32) __m256i {
    uint16_t v[16];
};
struct alignas(64) __m512i {
    uint32_t v[16];  // unsigned: the sums of the hardware wrap
};
using __mmask16 = uint16_t;

// The bits of `a` (its first ones, where To is narrower).
template <typename To, typename From>
inline To bits_as(const From& a) {
    static_assert(sizeof(To) <= sizeof(From), "no bits are invented");
    To r;
    memcpy(&r, &a, sizeof r);
    return r;
}

inline __m512i _mm512_castps_si512(__m512 a) {
    return bits_as<__m512i>(a);
}
inline __m512 _mm512_castsi512_ps(__m512i a) {
    return bits_as<__m512>(a);
}
inline __m512d _mm512_castps_pd(__m512 a) {
    return bits_as<__m512d>(a);
}
inline __m512 _mm512_castpd_ps(__m512d a) {
    return bits_as<__m512>(a);
}
inline __m256 _mm512_castps512_ps256(__m512 a) {
    return bits_as<__m256>(a);
}
inline __m128 _mm256_castps256_ps128(__m256 a) {
    return bits_as<__m128>(a);
}

}  // namespace ptq
