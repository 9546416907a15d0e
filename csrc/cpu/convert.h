// Rows of fp32, fp16 and bf16 into fp32 and back, rounded to nearest even.
#pragma once

#include "../bertkd.h"
#include "vec.h"

namespace bertkd {
namespace BERTKD_ISA {
namespace {

inline uint32_t bits_of(float x) {
  uint32_t b;
  __builtin_memcpy(&b, &x, sizeof b);
  return b;
}

inline float float_of(uint32_t b) {
  float x;
  __builtin_memcpy(&x, &b, sizeof x);
  return x;
}

inline float from_bfloat(uint16_t x) { return float_of(uint32_t{x} << 16); }

inline uint16_t to_bfloat(float x) {
  const uint32_t b = bits_of(x);
  // A NaN must not be rounded into an infinity.
  const uint32_t rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((b & 0x7fffffffu) > 0x7f800000u ? (b >> 16) | 0x40u : rounded);
}

inline float from_half(uint16_t x) {
  const uint32_t sign = (x & 0x8000u) << 16, magnitude = x & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // 2^112 moves the exponent to fp32's bias, exactly, for subnormals too.
  return float_of(sign | bits_of(float_of(magnitude << 13) * 5.192296858534828e33f));
}

inline uint16_t to_half(float x) {
  const uint32_t sign = (bits_of(x) >> 16) & 0x8000u, magnitude = bits_of(x) & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  // Below the smallest normal number, adding 1/2 leaves the subnormal's bits, rounded, at the end
  // of the mantissa.
  if (magnitude < 0x38800000u)
    return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u));
  return static_cast<uint16_t>(
      sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
}

// Sources: a tag type per dtype with vector and scalar access.
struct Float32 {
  using Type = float;
  static float get(const float* p) { return *p; }
  static Vec get_vec(const float* p) { return load(p); }
  static void put(float* p, float x) { *p = x; }
  static void put_vec(float* p, Vec v) { store(p, v); }
};

struct Float16 {
  using Type = uint16_t;
  static float get(const uint16_t* p) { return from_half(*p); }
  static void put(uint16_t* p, float x) { *p = to_half(x); }
#if defined(__AVX512F__)
  static Vec get_vec(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void put_vec(uint16_t* p, Vec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#elif defined(__AVX2__)
  static Vec get_vec(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void put_vec(uint16_t* p, Vec v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#else
  static Vec get_vec(const uint16_t* p) {
    float lane[kLanes];
    for (int i = 0; i < kLanes; ++i) lane[i] = from_half(p[i]);
    return load(lane);
  }
  static void put_vec(uint16_t* p, Vec v) {
    float lane[kLanes];
    store(lane, v);
    for (int i = 0; i < kLanes; ++i) p[i] = to_half(lane[i]);
  }
#endif
};

struct BFloat16 {
  using Type = uint16_t;
  static float get(const uint16_t* p) { return from_bfloat(*p); }
  static void put(uint16_t* p, float x) { *p = to_bfloat(x); }
  // Plain loops of integers: every compiler vectorises them.
  static Vec get_vec(const uint16_t* p) {
    float lane[kLanes];
    for (int i = 0; i < kLanes; ++i) lane[i] = from_bfloat(p[i]);
    return load(lane);
  }
  static void put_vec(uint16_t* p, Vec v) {
    float lane[kLanes];
    store(lane, v);
    for (int i = 0; i < kLanes; ++i) p[i] = to_bfloat(lane[i]);
  }
};

template <class Source>
void widen_as(const void* from, int64_t count, float* to) {
  const auto* p = static_cast<const typename Source::Type*>(from);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, Source::get_vec(p + i));
  for (; i < count; ++i) to[i] = Source::get(p + i);
}

// to[0..count) = from as fp32.
inline void widen(const void* from, DType dtype, int64_t count, float* to) {
  if (dtype == DType::kFloat32) return widen_as<Float32>(from, count, to);
  if (dtype == DType::kFloat16) return widen_as<Float16>(from, count, to);
  widen_as<BFloat16>(from, count, to);
}

template <class Target>
void narrow_as(const float* from, float factor, int64_t count, void* to) {
  auto* p = static_cast<typename Target::Type*>(to);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) Target::put_vec(p + i, load(from + i) * splat(factor));
  for (; i < count; ++i) Target::put(p + i, from[i] * factor);
}

// to = from * factor, rounded once into dtype.
inline void narrow(const float* from, float factor, int64_t count, DType dtype, void* to) {
  if (dtype == DType::kFloat32) return narrow_as<Float32>(from, factor, count, to);
  if (dtype == DType::kFloat16) return narrow_as<Float16>(from, factor, count, to);
  narrow_as<BFloat16>(from, factor, count, to);
}

inline int64_t bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

inline const char* row_of(const Rows& x, int64_t i) {
  return static_cast<const char*>(x.data) + i * x.stride * bytes_of(x.dtype);
}

}  // namespace
}  // namespace BERTKD_ISA
}  // namespace bertkd
