// What relation_kl and attention_mse share: which keys and rows take part, and packing them as
// fp32.
//
// Pads and rows without weight are left out when a head is packed, wherever they stand: the inner
// loops see only real keys and rows that count, without any mask. Packed keys are in the order of
// their positions, so those that lie within a window around a row are neighbours.
#pragma once

#include "convert.h"
#include "gemm.h"

namespace bertkd {
namespace BERTKD_ISA {
namespace {

// Memory handed out piece by piece, every piece on a cache line of its own. Without a base it only
// counts, so that one constructor of buffers says both how much to allocate and what lies where.
struct Arena {
  char* base = nullptr;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }
};

inline const char* row_of(const Heads& x, int64_t b, int64_t h, int64_t i) {
  return static_cast<const char*>(x.data) +
         (b * x.stride_b + h * x.stride_h + i * x.stride_l) * bytes_of(x.dtype);
}

inline char* row_to(const Heads& x, int64_t b, int64_t h, int64_t i) {
  return const_cast<char*>(row_of(x, b, h, i));
}

// The head that a thread probably visits next, whose rows it asks for while it computes. They lie
// apart, one head of (B, L, H, D), which no processor foresees; without this, to pack them is to
// wait for memory.
class NextHead {
 public:
  // The one `step` heads further on, if there is one.
  template <class... Tensors>
  NextHead(int64_t head, int64_t step, int64_t batch, int64_t heads, int64_t length,
           const Tensors&... tensors)
      : b_((head + step) / heads),
        h_((head + step) % heads),
        is_worth_it_(b_ < batch && length * (row_bytes(tensors) + ...) <= kMost) {}

  // Always inlined: GCC takes a function that only prefetches for one without effects, and drops
  // its calls.
  template <class... Tensors>
  __attribute__((always_inline)) void fetch(int64_t i, const Tensors&... tensors) const {
    if (is_worth_it_) (fetch_row(tensors, i), ...);
  }

 private:
  // Of a head: more would drive the one at hand out of an L2 of 1 MiB, and has computation enough
  // to hide its loads.
  static constexpr int64_t kMost = int64_t{512} << 10;

  static int64_t row_bytes(const Heads& x) { return x.width * bytes_of(x.dtype); }

  __attribute__((always_inline)) void fetch_row(const Heads& x, int64_t i) const {
    const char* row = row_of(x, b_, h_, i);
    for (int64_t d = 0; d < row_bytes(x); d += 64) __builtin_prefetch(row + d, 0, 2);
  }

  int64_t b_, h_;
  bool is_worth_it_;
};

// Positions of the real keys of sequence b.
inline int64_t list_keys(const Mask& mask, int64_t length, int64_t b, int32_t* keys) {
  int64_t count = 0;
  for (int64_t j = 0; j < length; ++j) {
    if (mask.data && !mask.data[b * mask.stride_b + j * mask.stride_l]) continue;
    keys[count++] = static_cast<int32_t>(j);
  }
  return count;
}

inline float weight_of(const Attention& args, int64_t b, int64_t h, int64_t i) {
  const RowWeights& w = args.weights;
  return w.data ? w.data[b * w.stride_b + h * w.stride_h + i * w.stride_l] : 1.f;
}

// All rows attend, those of pads too.
inline float weight_of(const SelfAttention&, int64_t, int64_t, int64_t) { return 1.f; }

// Some neighbours among the packed keys of a head, and where the panels that hold them begin and
// end.
struct KeyRange {
  int32_t first, last;  // last is the first behind them

  int64_t begin() const { return first / kPanel * kPanel; }
  int64_t end() const { return round_up(last, kPanel); }
};

// What the panels of a row's scores hold beside its own keys is no score.
inline void bar_others(float* scores, KeyRange own) {
  for (int64_t j = own.begin(); j < own.first; ++j) scores[j] = kLow;
  for (int64_t j = own.last; j < own.end(); ++j) scores[j] = kLow;
}

// Positions of the rows of (b, h) with a weight other than 0 and a key to compare, and which of the
// n packed keys each of them compares.
template <class Args>
inline int64_t list_rows(const Args& args, int64_t b, int64_t h, const int32_t* keys,
                         int64_t n, int32_t* rows, KeyRange* ranges) {
  const int64_t window = args.window < 0 ? args.length : args.window;
  int64_t count = 0, first = 0, last = 0;
  for (int64_t i = 0; i < args.length; ++i) {
    while (first < n && keys[first] < i - window) ++first;
    while (last < n && keys[last] <= i + window) ++last;
    if (first == last || weight_of(args, b, h, i) == 0.f) continue;
    ranges[count] = {static_cast<int32_t>(first), static_cast<int32_t>(last)};
    rows[count++] = static_cast<int32_t>(i);
  }
  return count;
}

// to[r][0..ld) = row index[r] of head (b, h), zeros beyond its width and beyond `count` up to
// `padded` rows.
inline void pack_rows(const Heads& x, int64_t b, int64_t h, const int32_t* index, int64_t count,
                      int64_t padded, float* to, int64_t ld) {
  for (int64_t r = 0; r < padded; ++r) {
    int64_t d = 0;
    if (r < count) widen(row_of(x, b, h, index[r]), x.dtype, d = x.width, to + r * ld);
    for (; d < ld; ++d) to[r * ld + d] = 0.f;
  }
}

// The first `panels` panels of columns of (count x ld): to[p][r][0..kPanel), times factor[r] if
// given.
inline void panel_columns(const float* rows, int64_t count, int64_t ld, int64_t panels,
                          const float* factor, float* to) {
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t r = 0; r < count; ++r, to += kPanel) {
      const Vec x = splat(factor ? factor[r] : 1.f);
      store(to, load(rows + r * ld + p * kPanel) * x);
      store(to + kLanes, load(rows + r * ld + p * kPanel + kLanes) * x);
    }
}

#if defined(__AVX2__)
// Eight rows become eight columns, in registers; AVX-512 does so four times.
inline void transpose_eight(const float* from, int64_t ld, float* to) {
  __m256 r[8], s[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(from + i * ld);
  for (int i = 0; i < 4; ++i) {
    s[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    s[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 2; ++j) {
      const __m256 low = s[4 * i + j], high = s[4 * i + j + 2];
      r[4 * i + 2 * j] = _mm256_shuffle_ps(low, high, _MM_SHUFFLE(1, 0, 1, 0));
      r[4 * i + 2 * j + 1] = _mm256_shuffle_ps(low, high, _MM_SHUFFLE(3, 2, 3, 2));
    }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * kPanel, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * kPanel, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}

inline void transpose_block(const float* from, int64_t ld, float* to) {
  for (int d = 0; d < kLanes; d += 8)
    for (int j = 0; j < kLanes; j += 8)
      transpose_eight(from + j * ld + d, ld, to + d * kPanel + j);
}
#else
inline void transpose_block(const float* from, int64_t ld, float* to) {
  for (int d = 0; d < kLanes; ++d)
    for (int j = 0; j < kLanes; ++j) to[d * kPanel + j] = from[j * ld + d];
}
#endif

// From rows (padded x ld; padded a multiple of kPanel) to panels of rows: to[p][d][0..kPanel), d <
// width. Writes up to round_up(width, kLanes) lines of the last panel.
inline void panel_rows(const float* rows, int64_t padded, int64_t ld, int64_t width, float* to) {
  for (int64_t p = 0; p < padded; p += kPanel, to += width * kPanel)
    for (int64_t d = 0; d < width; d += kLanes) {
      transpose_block(rows + p * ld + d, ld, to + d * kPanel);
      transpose_block(rows + (p + kLanes) * ld + d, ld, to + d * kPanel + kLanes);
    }
}

}  // namespace
}  // namespace BERTKD_ISA
}  // namespace bertkd
