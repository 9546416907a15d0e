// relation_kl: what a thread block is given, its mask and weights, and the way of rows into its
// shared memory.
#pragma once

#include "host.cuh"
#include "relation_layout.h"

namespace bertkd::cuda {

namespace relation {

struct Params {
  Attention args;
  Layout layout;
  bool self, backward;
  float factor_s, factor_t;
  float* partials;
};

template <class T>
struct Matrix {
  T* data;
  int64_t stride;
};

template <class T>
__device__ __forceinline__ Matrix<T> head_of(const Heads& x, int64_t b, int64_t h) {
  T* base = static_cast<T*>(const_cast<void*>(x.data));
  return {base + b * x.stride_b + h * x.stride_h, x.stride_l};
}

// What the head's mask and weights say, known to every lane of every warp.
struct Extent {
  int keys;         // up to the last real key, in whole tiles of 16; 0 if there is none
  uint32_t active;  // bit r: row tile r has a row with a weight
};

// Rows of a (length, width) matrix into shared memory, zeros where `wanted` says no and in the
// columns up to a multiple of 16. Rows nobody will read are left alone.
template <class T, class Wanted, class Used>
__device__ __forceinline__ void load_rows(T* to, int stride, const Matrix<T>& from, int length,
                                          int width, int rows, Wanted wanted, Used used) {
  const int pieces = round_up(width, 16) / 8;
  for (int i = threadIdx.x; i < rows * pieces; i += blockDim.x) {
    const int row = i / pieces, column = i % pieces * 8;
    if (!used(row)) continue;
    const bool valid = row < length && column < width && wanted(row);
    copy_async(to + row * stride + column,
               valid ? from.data + row * from.stride + column : from.data, valid);
  }
}

template <class T>
__device__ __forceinline__ void write_zeros(const Matrix<T>& to, int length, int width) {
  const int pairs = width / 2;
  for (int i = threadIdx.x; i < length * pairs; i += blockDim.x) {
    *reinterpret_cast<uint32_t*>(to.data + i / pairs * to.stride + i % pairs * 2) = 0u;
  }
}

// Mask and weights into shared memory, and what they say.
__device__ __forceinline__ Extent read_mask(const Params& p, unsigned char* memory, int64_t b,
                                            int64_t h) {
  const Attention& args = p.args;
  float* weights = reinterpret_cast<float*>(memory + p.layout.weights);
  unsigned char* real = memory + p.layout.real;
  for (int i = threadIdx.x; i < kMaxRows; i += blockDim.x) {
    const bool inside = i < args.length;
    const uint8_t* mask = args.mask.data;
    real[i] =
        inside && (mask == nullptr || mask[b * args.mask.stride_b + i * args.mask.stride_l] != 0);
    const RowWeights& w = args.weights;
    weights[i] = !inside      ? 0.0f
                 : p.backward ? w.data[b * w.stride_b + h * w.stride_h + i * w.stride_l]
                              : 1.0f;
  }
  sync_block();
  const int lane = threadIdx.x % 32;
  Extent extent{0, 0u};
  float largest = 0.0f;
  for (int i = 0; i < kMaxRows / 32; ++i) {
    const int row = i * 32 + lane;
    const uint32_t has_weight = ballot(weights[row] != 0.0f);
    if (has_weight & 0x0000ffffu) extent.active |= 1u << (2 * i);
    if (has_weight & 0xffff0000u) extent.active |= 2u << (2 * i);
    if (real[row]) extent.keys = round_up(row + 1, 16);
    largest = fmaxf(largest, fabsf(weights[row]));
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const int other = shuffle_xor(extent.keys, lanes);
    extent.keys = other > extent.keys ? other : extent.keys;
    largest = fmaxf(largest, shuffle_xor(largest, lanes));
  }
  // Needed again only after two barriers: until then a register is worth more than a place in
  // shared memory.
  if (threadIdx.x == 0) *reinterpret_cast<float*>(memory + p.layout.max_weight) = largest;
  return extent;
}

}  // namespace relation

}  // namespace bertkd::cuda
