// relation_kl: both gradients from dS and the student's rows in shared memory.
#pragma once

#include "relation_block.cuh"

namespace bertkd::cuda {

namespace relation {

// dS is scaled by the largest weight and this: fp16 then keeps differences of probabilities down to
// 2e-9.
constexpr float kGain = 32768.0f;

template <class T>
__device__ __forceinline__ void store_gradient(const Matrix<T>& to,
                                               const float (&x)[kGradColumns / 8][4], float factor,
                                               int row0, int column0, int length, int width,
                                               int lane) {
#pragma unroll
  for (int n = 0; n < kGradColumns / 8; ++n) {
    if (column0 + n * 8 < width) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Place place = accumulator_place(lane, 2 * half);
        const int row = row0 + place.row;
        if (row < length) {
          T* at = to.data + row * to.stride + column0 + n * 8 + place.column;
          *reinterpret_cast<uint32_t*>(at) =
              pack<T>(x[n][2 * half] * factor, x[n][2 * half + 1] * factor);
        }
      }
    }
  }
}

// x += left operand times 16 rows [k][column] of `from`, for the columns that exist.
template <class T>
__device__ __forceinline__ void add_product(float (&x)[kGradColumns / 8][4], const uint32_t (&a)[4],
                                            const T* from, int columns) {
#pragma unroll
  for (int pair = 0; pair < kGradColumns / 16; ++pair) {
    if (pair * 16 < columns) {
      uint32_t b[4];
      load_matrices_transposed(b, from + pair * 16);
      multiply<T>(x[2 * pair], a, b[0], b[1]);
      multiply<T>(x[2 * pair + 1], a, b[2], b[3]);
    }
  }
}

// Both gradients, from dS and the student's rows in shared memory: a warp takes 16 rows x 32
// columns at a time.
template <class T>
__device__ __forceinline__ void make_gradients(const Params& p, unsigned char* memory,
                                               const Extent& extent, int64_t b, int64_t h) {
  const Layout& at = p.layout;
  const Matrix<T> grad_a = head_of<T>(p.args.grad_a, b, h),
                  grad_b = head_of<T>(p.args.grad_b, b, h);
  const float factor =
      *reinterpret_cast<const float*>(memory + at.max_weight) * p.args.scale_s * (1.0f / kGain);
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int width = static_cast<int>(p.args.a_s.width), padded = round_up(width, 16);
  const int length = static_cast<int>(p.args.length);
  const T* a_rows = reinterpret_cast<const T*>(memory + at.student);
  const T* b_rows = reinterpret_cast<const T*>(memory + at.student_keys);
  const T* ds = reinterpret_cast<const T*>(memory + at.gradient);
  const Place left = left_place(lane), turned = left_transposed_place(lane),
              right = right_transposed_place(lane);
  const int pieces = (padded + kGradColumns - 1) / kGradColumns;
  for (int unit = threadIdx.x / 32; unit < at.row_tiles * pieces; unit += warps) {
    const int tile = unit / pieces, column0 = unit % pieces * kGradColumns, row0 = tile * kRowTile;
    const int columns = padded - column0;
    float x[kGradColumns / 8][4] = {};
    if ((extent.active >> tile) & 1u) {
      for (int key = 0; key < extent.keys; key += 16) {
        uint32_t a[4];
        load_matrices(a, ds + (row0 + left.row) * at.stride_d + key + left.column);
        add_product(x, a, b_rows + (key + right.row) * at.stride_s + column0 + right.column,
                    columns);
      }
    }
    if (!p.self) {
      store_gradient(grad_a, x, factor, row0, column0, length, width, lane);
#pragma unroll
      for (int n = 0; n < kGradColumns / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) x[n][e] = 0.0f;
      }
    }
    if (row0 < extent.keys) {
      for (int i = 0; i < at.row_tiles; ++i) {
        if ((extent.active >> i) & 1u) {
          const int row = i * kRowTile;
          uint32_t a[4];
          load_matrices_transposed(a, ds + (row + turned.row) * at.stride_d + row0 + turned.column);
          add_product(x, a, a_rows + (row + right.row) * at.stride_s + column0 + right.column,
                      columns);
        }
      }
    }
    store_gradient(grad_b, x, factor, row0, column0, length, width, lane);
  }
}

}  // namespace relation

}  // namespace bertkd::cuda
