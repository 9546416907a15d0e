// Small matrix products in registers: C = A B, with B in panels of kPanel columns and C in tiles of
// kTileRows rows.
//
// Callers pad: C has round_up(m, kTileRows) rows, A can be read that far, and what lies beyond m is
// never looked at.
#pragma once

#include "vec.h"

namespace bertkd {
namespace BERTKD_ISA {
namespace {

// How A's element (i, k) is found: by rows, a[i lda + k], or by columns, a[i + k lda] (that is, A
// is transposed).
enum class Order { kRows, kColumns };
enum class Into { kSet, kAdd };

// Over a multiple of kPanel.
inline float dot(const float* x, const float* y, int64_t count) {
  Vec sum[2] = {Vec{}, Vec{}};
  for (int64_t d = 0; d < count; d += kPanel)
    for (int half = 0; half < 2; ++half)
      sum[half] = fma(load(x + d + half * kLanes), load(y + d + half * kLanes), sum[half]);
  return sum_lanes(sum[0] + sum[1]);
}

// One register tile: C[kTileRows x kPanel] (+)= alpha * A[kTileRows x depth] B[depth x kPanel].
// A function of its own: inlined into its callers, GCC keeps the rows' addresses on the stack and
// the inner loop is bound by loads.
template <Order order, Into into>
__attribute__((noinline)) void multiply_tile(int64_t depth, const float* a, int64_t lda,
                                             const float* b, float* c, int64_t ldc, float alpha) {
  Vec sum[kTileRows][2];
  for (int i = 0; i < kTileRows; ++i) sum[i][0] = sum[i][1] = Vec{};
  for (int64_t k = 0; k < depth; ++k) {
    const Vec b0 = load(b + k * kPanel), b1 = load(b + k * kPanel + kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < kTileRows; ++i) {
      const Vec x = splat(order == Order::kRows ? a[i * lda + k] : a[k * lda + i]);
      sum[i][0] = fma(x, b0, sum[i][0]);
      sum[i][1] = fma(x, b1, sum[i][1]);
    }
  }
  const Vec factor = splat(alpha);
#pragma GCC unroll 12
  for (int i = 0; i < kTileRows; ++i) {
    float* row = c + i * ldc;
    if (into == Into::kSet) {
      store(row, sum[i][0] * factor);
      store(row + kLanes, sum[i][1] * factor);
    } else {
      store(row, fma(sum[i][0], factor, load(row)));
      store(row + kLanes, fma(sum[i][1], factor, load(row + kLanes)));
    }
  }
}

// Panels in the outer loop: right where B's panel (depth x kPanel) fits L1 and A (m x depth) L2.
template <Order order, Into into>
inline void multiply(int64_t m, int64_t panels, int64_t depth, const float* a, int64_t lda,
                     const float* b, int64_t panel_stride, float* c, int64_t ldc, float alpha) {
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t i = 0; i < m; i += kTileRows)
      multiply_tile<order, into>(depth, a + (order == Order::kRows ? i * lda : i), lda,
                                 b + p * panel_stride, c + i * ldc + p * kPanel, ldc, alpha);
}

// C = A B with a long inner dimension, in slices whose panel of B fits L1.
constexpr int64_t kSlice = 2048 / kLanes;

inline void multiply_deep(int64_t m, int64_t panels, int64_t depth, const float* a, int64_t lda,
                          const float* b, int64_t panel_stride, float* c, int64_t ldc) {
  for (int64_t k = 0; k < depth; k += kSlice) {
    const int64_t slice = depth - k < kSlice ? depth - k : kSlice;
    if (k == 0)
      multiply<Order::kRows, Into::kSet>(m, panels, slice, a, lda, b, panel_stride, c, ldc, 1.f);
    else
      multiply<Order::kRows, Into::kAdd>(m, panels, slice, a + k, lda, b + k * kPanel, panel_stride,
                                         c, ldc, 1.f);
  }
}

// C += A^T B for A (depth x m) by rows: tiles of C in the outer loop, so that A is read once.
inline void add_transposed(int64_t m, int64_t panels, int64_t depth, const float* a, int64_t lda,
                           const float* b, int64_t panel_stride, float* c, int64_t ldc) {
  for (int64_t i = 0; i < m; i += kTileRows)
    for (int64_t p = 0; p < panels; ++p)
      multiply_tile<Order::kColumns, Into::kAdd>(depth, a + i, lda, b + p * panel_stride,
                                                 c + i * ldc + p * kPanel, ldc, 1.f);
}

}  // namespace
}  // namespace BERTKD_ISA
}  // namespace bertkd
