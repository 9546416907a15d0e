// Chunks of eight elements of a row, in any dtype, in 16-byte loads and stores where addresses
// allow it.
//
// The dtype is a run-time value: these kernels wait for memory, and a branch that a whole warp
// takes together costs nothing beside that. One kernel then serves every mix of student and
// teacher.
#pragma once

#include "device.cuh"
#include "host.cuh"

namespace bertkd::cuda {

constexpr int kChunk = 8;

struct Row {
  unsigned char* data;
  DType dtype;
};

__device__ __forceinline__ int element_size(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
}

__device__ __forceinline__ Row row_of(const Rows& x, int64_t i) {
  unsigned char* base = static_cast<unsigned char*>(const_cast<void*>(x.data));
  return {base + i * x.stride * element_size(x.dtype), x.dtype};
}

// Eight elements as they lie in memory: 16 bytes, or 32 for fp32.
struct RawChunk {
  uint4 low, high;
};

__device__ __forceinline__ RawChunk load_raw(const unsigned char* p, DType dtype) {
  RawChunk raw;
  const uint4* vector = reinterpret_cast<const uint4*>(p);
  raw.low = vector[0];
  raw.high = dtype == DType::kFloat32 ? vector[1] : make_uint4(0, 0, 0, 0);
  return raw;
}

__device__ __forceinline__ void store_raw(unsigned char* p, DType dtype, const RawChunk& raw) {
  uint4* vector = reinterpret_cast<uint4*>(p);
  vector[0] = raw.low;
  if (dtype == DType::kFloat32) vector[1] = raw.high;
}

__device__ __forceinline__ float as_float(uint32_t bits) { return __uint_as_float(bits); }

__device__ __forceinline__ void unpack(const RawChunk& raw, DType dtype, float (&out)[kChunk]) {
  const uint32_t low[4] = {raw.low.x, raw.low.y, raw.low.z, raw.low.w};
  const uint32_t high[4] = {raw.high.x, raw.high.y, raw.high.z, raw.high.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (dtype == DType::kFloat32) {
      out[i] = as_float(low[i]);
      out[4 + i] = as_float(high[i]);
    } else if (dtype == DType::kBFloat16) {
      out[2 * i] = as_float(low[i] << 16);
      out[2 * i + 1] = as_float(low[i] & 0xffff0000u);
    } else {
      out[2 * i] = low_f16(low[i]);
      out[2 * i + 1] = high_f16(low[i]);
    }
  }
}

__device__ __forceinline__ RawChunk repack(const float (&x)[kChunk], DType dtype) {
  uint32_t low[4], high[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (dtype == DType::kFloat32) {
      low[i] = __float_as_uint(x[i]);
      high[i] = __float_as_uint(x[4 + i]);
    } else if (dtype == DType::kBFloat16) {
      low[i] = pack<BF16>(x[2 * i], x[2 * i + 1]);
    } else {
      low[i] = pack<F16>(x[2 * i], x[2 * i + 1]);
    }
  }
  return {make_uint4(low[0], low[1], low[2], low[3]),
          make_uint4(high[0], high[1], high[2], high[3])};
}

__device__ __forceinline__ float load_one(const Row& row, int64_t i) {
  if (row.dtype == DType::kFloat32) return reinterpret_cast<const float*>(row.data)[i];
  if (row.dtype == DType::kBFloat16) return to_float(reinterpret_cast<const BF16*>(row.data)[i]);
  return to_float(reinterpret_cast<const F16*>(row.data)[i]);
}

__device__ __forceinline__ void store_one(const Row& row, int64_t i, float x) {
  if (row.dtype == DType::kFloat32) {
    reinterpret_cast<float*>(row.data)[i] = x;
  } else {
    const uint32_t bits = row.dtype == DType::kBFloat16 ? pack<BF16>(x, 0.0f) : pack<F16>(x, 0.0f);
    reinterpret_cast<uint16_t*>(row.data)[i] = static_cast<uint16_t>(bits & 0xffffu);
  }
}

// Elements between the last 16-byte boundary and the row's first element.
__device__ __forceinline__ int lead_of(const Row& row) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(row.data) % 16) / element_size(row.dtype);
}

// Whether the row's chunks, shifted by `lead`, start on 16-byte boundaries.
__device__ __forceinline__ bool fits_lead(const Row& row, int lead) {
  return (reinterpret_cast<uintptr_t>(row.data) - lead * element_size(row.dtype)) % 16 == 0;
}

// Chunk c of a row of `width` elements has elements [first, first + 8) with first = 8 c - lead;
// those outside the row do not exist.
struct Span {
  int64_t first;
  int from, to;
  bool full;
};

__device__ __forceinline__ Span span_of(int64_t chunk, int lead, int64_t width) {
  Span span;
  span.first = chunk * kChunk - lead;
  span.from = span.first < 0 ? static_cast<int>(-span.first) : 0;
  span.to = span.first + kChunk > width ? static_cast<int>(width - span.first) : kChunk;
  span.full = span.from == 0 && span.to == kChunk;
  return span;
}

// `vectors` says that the row's chunks are aligned; `missing` stands for elements that do not
// exist.
__device__ __forceinline__ void load_chunk(const Row& row, const Span& span, bool vectors,
                                           float missing, float (&out)[kChunk]) {
  if (vectors && span.full) {
    unpack(load_raw(row.data + span.first * element_size(row.dtype), row.dtype), row.dtype, out);
    return;
  }
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    out[i] = i >= span.from && i < span.to ? load_one(row, span.first + i) : missing;
  }
}

__device__ __forceinline__ void store_chunk(const Row& row, const Span& span, bool vectors,
                                            const float (&x)[kChunk]) {
  if (vectors && span.full) {
    store_raw(row.data + span.first * element_size(row.dtype), row.dtype, repack(x, row.dtype));
    return;
  }
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    if (i >= span.from && i < span.to) store_one(row, span.first + i, x[i]);
  }
}

}  // namespace bertkd::cuda
