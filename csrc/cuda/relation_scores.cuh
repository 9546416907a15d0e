// relation_kl: scores of a warp's rows on tensor cores, and both softmaxes of them in registers.
#pragma once

#include "relation_block.cuh"

namespace bertkd::cuda {

namespace relation {

// Finite, so that a difference of two of them makes no NaN.
constexpr float kLow = -1e30f;
constexpr float kLn2 = 0.6931471805599453f;

// Scores of the warp's rows against its keys; whole tiles of keys beyond `keys` stay 0.
template <class T>
__device__ __forceinline__ void make_scores(float (&out)[kAccumulators][4], const T* rows,
                                            const T* cols, int stride, int width, int row0,
                                            int key0, int keys, int lane) {
  const Place left = left_place(lane), right = right_place(lane);
  const T* a_at = rows + (row0 + left.row) * stride + left.column;
  const T* b_at = cols + (key0 + right.row) * stride + right.column;
#pragma unroll
  for (int n = 0; n < kAccumulators; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) out[n][e] = 0.0f;
  }
#pragma unroll 1
  for (int k = 0; k < width; k += 16) {
    uint32_t a[4];
    load_matrices(a, a_at + k);
#pragma unroll
    for (int pair = 0; pair < kAccumulators / 2; ++pair) {
      if (key0 + pair * 16 < keys) {
        uint32_t b[4];
        load_matrices(b, b_at + pair * 16 * stride + k);
        multiply<T>(out[2 * pair], a, b[0], b[1]);
        multiply<T>(out[2 * pair + 1], a, b[2], b[3]);
      }
    }
  }
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// Base-2 scores of real keys, kLow at the others.
__device__ __forceinline__ void scale_and_mask(float (&x)[kAccumulators][4], float factor,
                                               uint32_t real) {
#pragma unroll
  for (int n = 0; n < kAccumulators; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      x[n][e] = (real >> (2 * n + e % 2)) & 1u ? mul(x[n][e], factor) : kLow;
  }
}

// Sums of two rows (lane / 4, and 8 below) that a lane works on.
struct Sums {
  float l_s[2], l_t[2], a[2];
};

// Turns scores into 2^(x - m) and adds up.
__device__ __forceinline__ Sums exponentiate(float (&s)[kAccumulators][4],
                                             float (&t)[kAccumulators][4], const float (&m_s)[2],
                                             const float (&m_t)[2]) {
  Sums sums{};
#pragma unroll
  for (int n = 0; n < kAccumulators; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int half = e / 2;
      const float of_s = s[n][e] - m_s[half], of_t = t[n][e] - m_t[half];
      s[n][e] = fast_exp2(of_s);
      t[n][e] = fast_exp2(of_t);
      sums.l_s[half] += s[n][e];
      sums.l_t[half] += t[n][e];
      sums.a[half] += t[n][e] * (of_t - of_s);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sums.l_s[half] = quad_sum(sums.l_s[half]);
    sums.l_t[half] = quad_sum(sums.l_t[half]);
    sums.a[half] = quad_sum(sums.a[half]);
  }
  return sums;
}

}  // namespace relation

}  // namespace bertkd::cuda
