// Runs the kernels of csrc/cuda on a CPU, one fiber per CUDA thread: the same source, the same
// indices, barriers, warp exchanges and tensor-core fragments. It stands in for
// csrc/cuda/device.cuh's instructions.
//
// What it adds to a GPU: shared memory starts as NaN; a cp.async arrives only when it is waited
// for; the order in which threads run is shuffled between barriers, so that a missing barrier
// shows; lanes of a warp that meet at different instructions, threads that wait at a barrier nobody
// else reaches, and misaligned vectors are errors.
#pragma once

#include <cmath>

#include "cuda_fibers.h"

namespace emulator {

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float half_to_float(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31u, fraction = h & 0x3ffu;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000u | fraction << 13);
  const float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                        : std::ldexp(static_cast<float>(fraction | 0x400u),
                                                     static_cast<int>(exponent) - 25);
  return sign ? -magnitude : magnitude;
}

inline uint16_t float_to_half(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return sign | 0x7e00;
  const double magnitude = std::fabs(static_cast<double>(x));
  if (magnitude >= 65520.0) return sign | 0x7c00;
  if (magnitude == 0) return sign;
  int exponent;
  std::frexp(magnitude, &exponent);
  // The spacing of halves there; rint rounds to nearest even.
  const int step = std::max(exponent - 11, -24);
  const auto units = static_cast<uint32_t>(std::rint(std::ldexp(magnitude, -step)));
  return static_cast<uint16_t>(sign | (units + (static_cast<uint32_t>(step + 24) << 10)));
}

inline float bf16_to_float(uint16_t h) { return bits_to_float(static_cast<uint32_t>(h) << 16); }
inline uint16_t float_to_bf16(float x) {
  if (std::isnan(x)) return 0x7fff;
  const uint32_t bits = float_to_bits(x);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace emulator

inline float __uint_as_float(uint32_t x) { return emulator::bits_to_float(x); }
inline uint32_t __float_as_uint(float x) { return emulator::float_to_bits(x); }

namespace bertkd::cuda {

struct F16 {
  uint16_t bits;
};
struct BF16 {
  uint16_t bits;
};
inline float to_float(F16 x) { return emulator::half_to_float(x.bits); }
inline float to_float(BF16 x) { return emulator::bf16_to_float(x.bits); }
inline float low_f16(uint32_t pair) { return emulator::half_to_float(pair & 0xffffu); }
inline float high_f16(uint32_t pair) { return emulator::half_to_float(pair >> 16); }

template <class T>
uint32_t pack(float low, float high);
template <>
inline uint32_t pack<F16>(float low, float high) {
  return emulator::float_to_half(low) | static_cast<uint32_t>(emulator::float_to_half(high)) << 16;
}
template <>
inline uint32_t pack<BF16>(float low, float high) {
  return emulator::float_to_bf16(low) | static_cast<uint32_t>(emulator::float_to_bf16(high)) << 16;
}

inline float mul(float a, float b) { return a * b; }
inline float fast_exp2(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }
inline float reciprocal(float x) { return 1.0f / x; }
inline float log2f(float x) { return std::log2(x); }
inline float fmaxf(float a, float b) { return std::fmax(a, b); }
inline float fabsf(float x) { return std::fabs(x); }

inline uint32_t shuffle_bits(uint32_t x, int lanes) {
  const uint32_t in[2] = {x, static_cast<uint32_t>(lanes)};
  uint32_t out;
  emulator::exchange(100 + lanes, in, 2, &out, 1, [](emulator::Warp& w) {
    for (int i = 0; i < emulator::kWarp; ++i) w.out[i][0] = w.in[i ^ w.in[i][1]][0];
  });
  return out;
}
inline float shuffle_xor(float x, int lanes) {
  return emulator::bits_to_float(shuffle_bits(emulator::float_to_bits(x), lanes));
}
inline int shuffle_xor(int x, int lanes) {
  return static_cast<int>(shuffle_bits(static_cast<uint32_t>(x), lanes));
}
inline uint32_t ballot(bool x) {
  const uint32_t in[1] = {x ? 1u : 0u};
  uint32_t out;
  emulator::exchange(200, in, 1, &out, 1, [](emulator::Warp& w) {
    uint32_t bits = 0;
    for (int i = 0; i < emulator::kWarp; ++i) bits |= w.in[i][0] << i;
    for (int i = 0; i < emulator::kWarp; ++i) w.out[i][0] = bits;
  });
  return out;
}
inline void sync_block() { emulator::barrier(); }

inline void copy_async(void* shared, const void* global, bool valid) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 ||
      (valid && reinterpret_cast<uintptr_t>(global) % 16))
    emulator::fail("cp.async of a misaligned address");
  emulator::fiber().open.push_back({shared, valid ? global : nullptr});
}
inline void copy_commit() {
  emulator::Fiber& f = emulator::fiber();
  f.groups.push_back(std::move(f.open));
  f.open.clear();
}
template <int N>
inline void copy_wait() {
  emulator::Fiber& f = emulator::fiber();
  while (f.groups.size() > N) {
    for (const emulator::Copy& c : f.groups.front()) {
      c.from != nullptr ? std::memcpy(c.to, c.from, 16) : std::memset(c.to, 0, 16);
    }
    f.groups.erase(f.groups.begin());
  }
}

// Lane i gets, of each of four 8 x 8 matrices, the elements (i / 4, 2 (i % 4)) and the one beside
// it; transposed, the elements (2 (i % 4), i / 4) and the one below it.
inline void load_matrices_any(uint32_t (&out)[4], const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16) emulator::fail("ldmatrix of a misaligned address");
  const auto address = reinterpret_cast<uint64_t>(row);
  const uint32_t in[2] = {static_cast<uint32_t>(address), static_cast<uint32_t>(address >> 32)};
  const auto element = [](emulator::Warp& w, int matrix, int r, int c) {
    const uint32_t* words = w.in[matrix * 8 + r];
    return reinterpret_cast<const uint16_t*>(static_cast<uint64_t>(words[1]) << 32 | words[0])[c];
  };
  static const auto read = element;
  const auto plain = [](emulator::Warp& w) {
    for (int i = 0; i < emulator::kWarp; ++i)
      for (int m = 0; m < 4; ++m)
        w.out[i][m] = read(w, m, i / 4, i % 4 * 2) |
                      static_cast<uint32_t>(read(w, m, i / 4, i % 4 * 2 + 1)) << 16;
  };
  const auto turned = [](emulator::Warp& w) {
    for (int i = 0; i < emulator::kWarp; ++i)
      for (int m = 0; m < 4; ++m)
        w.out[i][m] = read(w, m, i % 4 * 2, i / 4) |
                      static_cast<uint32_t>(read(w, m, i % 4 * 2 + 1, i / 4)) << 16;
  };
  transposed ? emulator::exchange(301, in, 2, out, 4, turned)
             : emulator::exchange(300, in, 2, out, 4, plain);
}
inline void load_matrices(uint32_t (&out)[4], const void* row) {
  load_matrices_any(out, row, false);
}
inline void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  load_matrices_any(out, row, true);
}

// PTX ISA, "Matrix Fragments for mma.m16n8k16": group g = lane / 4, t = lane % 4.
template <class T>
void multiply_warp(emulator::Warp& w) {
  float a[16][16], b[16][8];
  const auto half = [](uint32_t word, int which) {
    return to_float(T{static_cast<uint16_t>(which ? word >> 16 : word & 0xffffu)});
  };
  for (int lane = 0; lane < emulator::kWarp; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 2; ++i) {
      a[g][2 * t + i] = half(w.in[lane][0], i);
      a[g + 8][2 * t + i] = half(w.in[lane][1], i);
      a[g][2 * t + 8 + i] = half(w.in[lane][2], i);
      a[g + 8][2 * t + 8 + i] = half(w.in[lane][3], i);
      b[2 * t + i][g] = half(w.in[lane][4], i);
      b[2 * t + 8 + i][g] = half(w.in[lane][5], i);
    }
  }
  for (int lane = 0; lane < emulator::kWarp; ++lane) {
    for (int e = 0; e < 4; ++e) {
      const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
      double sum = emulator::bits_to_float(w.in[lane][6 + e]);
      for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[row][k]) * b[k][column];
      w.out[lane][e] = emulator::float_to_bits(static_cast<float>(sum));
    }
  }
}

template <class T>
inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  uint32_t in[10] = {a[0], a[1], a[2], a[3], b0, b1}, out[4];
  for (int e = 0; e < 4; ++e) in[6 + e] = emulator::float_to_bits(c[e]);
  emulator::exchange(400, in, 10, out, 4, multiply_warp<T>);
  for (int e = 0; e < 4; ++e) c[e] = emulator::bits_to_float(out[e]);
}

inline int64_t shared_limit() { return emulator::shared_limit(); }

template <class Params>
void launch_kernel(const char* name, void (*kernel)(Params), dim3 grid, int threads, int64_t shared,
                   void*, Params params) {
  if (shared > shared_limit())
    throw std::runtime_error(std::string(name) + ": too much shared memory");
  emulator::grid_size() = grid;
  emulator::block_size() = dim3(static_cast<unsigned>(threads));
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      emulator::block_index() = dim3(x, y, 0);
      emulator::run_block(threads, shared, [&] { kernel(params); });
    }
  }
}

}  // namespace bertkd::cuda
