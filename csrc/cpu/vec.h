// One vector type per instruction set, chosen by the flags this file is compiled with, and the
// exponential.
//
// Everything here and in the files that include it lies in a namespace of the instruction set and
// in an anonymous one: a function shared by name between differently compiled files could be linked
// from the wrong one and run instructions the processor lacks. For the same reason no standard
// library templates are used in them.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__AVX2__) || defined(__AVX512F__)
// GCC 12 finds its own _mm512_undefined_ps uninitialised.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#if !defined(BERTKD_ISA)
#error "define BERTKD_ISA (the namespace of the instruction set) before including vec.h"
#endif

namespace bertkd {
namespace BERTKD_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kTileRows = 12;  // 12 x 2 accumulators of the 32 registers
using Vec = __m512;
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// Returns b where either is NaN, so that max(bound, x) keeps a NaN.
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec splat(float x) { return _mm512_set1_ps(x); }
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kTileRows = 6;  // 6 x 2 accumulators of the 16 registers
using Vec = __m256;
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
// Returns b where either is NaN, so that max(bound, x) keeps a NaN.
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec splat(float x) { return _mm256_set1_ps(x); }
#else
// Vector extensions of GCC and Clang: SSE2, NEON, or plain scalars. The tests set 16 lanes to run
// AVX-512's layout.
#if !defined(BERTKD_PORTABLE_LANES)
#define BERTKD_PORTABLE_LANES 4
#endif
constexpr int kLanes = BERTKD_PORTABLE_LANES;
constexpr int kTileRows = kLanes == 16 ? 12 : 6;
typedef float Vec __attribute__((vector_size(4 * BERTKD_PORTABLE_LANES)));
inline Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }
// Fused where the processor has it (the compiler contracts), else rounded twice.
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec splat(float x) { return x - Vec{}; }
#endif

typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));

constexpr int kPanel = 2 * kLanes;  // columns of a register tile

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

inline float sum_lanes(Vec v) {
  float lane[kLanes];
  store(lane, v);
  float total = 0.f;
  for (int i = 0; i < kLanes; ++i) total += lane[i];
  return total;
}

inline float max_lanes(Vec v) {
  float lane[kLanes];
  store(lane, v);
  float most = lane[0];
  for (int i = 1; i < kLanes; ++i) most = lane[i] > most ? lane[i] : most;
  return most;
}

constexpr float kLog2e = 1.44269504088896341f;
constexpr double kLn2 = 0.69314718055994530942;
constexpr float kLow =
    -1e30f;  // a score that no real one can be near, finite so that no difference is NaN

// 2^x for x <= 127. Adding 1.5 * 2^23 + 127 rounds x to an integer in the low bits of the mantissa,
// with the exponent's bias added: shifted up they are the power of two. What is left of x lies in
// [-1/2, 1/2], where a polynomial of degree 5 (minimax with the constant fixed at 1) errs
// by 8.1e-8. The two are multiplied as floats: to add the integer to the exponent would take the
// bits of a NaN along, and could make a number of it. Below -100 the result stays at 2^-100: nothing
// next to a row's largest term, which is 1, and large enough that no difference of two results is a
// (slow) subnormal number.
inline Vec exp2(Vec x) {
  const Vec magic = splat(12582912.f + 127.f);
  x = max(splat(-100.f), x);
  const Vec shifted = x + magic;
  const Vec r = x - (shifted - magic);
  Vec p = splat(0.001327463336532476f);
  p = fma(p, r, splat(0.009671961679595494f));
  p = fma(p, r, splat(0.05550678368720907f));
  p = fma(p, r, splat(0.2402223532236195f));
  p = fma(p, r, splat(0.693147061560251f));
  p = fma(p, r, splat(1.f));
  return p * (Vec)((Bits)shifted << 23);
}

}  // namespace
}  // namespace BERTKD_ISA
}  // namespace bertkd
