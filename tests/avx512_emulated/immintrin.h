// The instructions of AVX-512 that csrc/cpu asks for by name, in plain C++: found before the
// compiler's own header of this name, it lets kernels_avx512.cpp run on a processor without them.
// Everything else in that file is left to the compiler by either way of building it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

typedef float __m512 __attribute__((vector_size(64), may_alias));
typedef uint16_t __m256i __attribute__((vector_size(32), may_alias, aligned(1)));

#define _MM_FROUND_TO_NEAREST_INT 0
#define _MM_FROUND_NO_EXC 8

inline __m512 _mm512_loadu_ps(const float* p) {
  __m512 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void _mm512_storeu_ps(float* p, __m512 v) { std::memcpy(p, &v, sizeof v); }

inline __m512 _mm512_set1_ps(float x) { return x - __m512{}; }

inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  for (int i = 0; i < 16; ++i) a[i] = std::fma(a[i], b[i], c[i]);
  return a;
}

// As the instruction does: the second operand where either is NaN.
inline __m512 _mm512_max_ps(__m512 a, __m512 b) { return a > b ? a : b; }

inline __m256i _mm256_loadu_si256(const __m256i* p) { return *p; }

inline void _mm256_storeu_si256(__m256i* p, __m256i v) { *p = v; }

inline __m512 _mm512_cvtph_ps(__m256i half) {
  __m512 v;
  for (int i = 0; i < 16; ++i) {
    const int exponent = (half[i] >> 10) & 31, fraction = half[i] & 0x3ff;
    const float magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
                            : exponent    ? std::ldexp(1024.f + fraction, exponent - 25)
                                          : std::ldexp(float(fraction), -24);
    v[i] = half[i] & 0x8000 ? -magnitude : magnitude;
  }
  return v;
}

// Rounded to nearest even by the floating-point unit: the value is scaled to have its last bit at 1.
inline __m256i _mm512_cvtps_ph(__m512 v, int) {
  __m256i half = {};
  for (int i = 0; i < 16; ++i) {
    const float magnitude = std::fabs(v[i]);
    int exponent = 0;
    std::frexp(magnitude, &exponent);  // magnitude in [2^(exponent - 1), 2^exponent)
    int bits = 0x7e00;                 // a NaN
    if (magnitude >= 65520.f) {
      bits = 0x7c00;
    } else if (magnitude == magnitude) {
      const int last = exponent - 11 < -24 || magnitude == 0 ? -24 : exponent - 11;
      // Subnormal numbers and the exponents after them follow each other without a gap.
      bits = static_cast<int>(std::nearbyint(std::ldexp(magnitude, -last))) + 1024 * (last + 24);
    }
    half[i] = static_cast<uint16_t>(bits | (std::signbit(v[i]) ? 0x8000 : 0));
  }
  return half;
}
