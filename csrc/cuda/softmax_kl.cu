// KL(softmax(z_t / T) || softmax(z_s / T)) of every row, and its gradient, with one read of either
// side from HBM.
//
// Sweep 1 keeps, per side, a running maximum m and the sum l of 2^(x - m), where x = z log2(e) / T,
// and A = sum 2^(x_t - m_t) ((x_t - m_t) - (x_s - m_s)). Then KL = ln 2 (A / l_t + log2 l_s - log2
// l_t): a shift of all logits of one side costs no accuracy. Sweep 2 makes the gradient from the
// row in shared memory where both rows fit there, else from L2.
#include "chunk.cuh"

namespace bertkd::cuda {

namespace {

// Finite, so that a difference of two of them makes no NaN.
constexpr float kLow = -1e30f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr int kMaxThreads = 512;
constexpr int kWarpsPerBlock = 4;

struct RowState {
  float m_s, l_s, m_t, l_t, a;
};

struct SoftmaxParams {
  SoftmaxKl args;
  float factor, inverse_temperature;
  float* row_loss;
  int threads_per_row;
  bool cached;
  int64_t cache_bytes;
};

__device__ __forceinline__ void move_maxima(RowState& x, float m_s, float m_t) {
  const float by_s = x.m_s - m_s, by_t = x.m_t - m_t;
  x.a = fast_exp2(by_t) * (x.a + x.l_t * (by_t - by_s));
  x.l_s *= fast_exp2(by_s);
  x.l_t *= fast_exp2(by_t);
  x.m_s = m_s;
  x.m_t = m_t;
}

__device__ __forceinline__ void merge(RowState& x, RowState y) {
  const float m_s = fmaxf(x.m_s, y.m_s), m_t = fmaxf(x.m_t, y.m_t);
  move_maxima(x, m_s, m_t);
  move_maxima(y, m_s, m_t);
  x.l_s += y.l_s;
  x.l_t += y.l_t;
  x.a += y.a;
}

__device__ __forceinline__ void add_chunk(RowState& x, const float (&s)[kChunk],
                                          const float (&t)[kChunk]) {
  float m_s = x.m_s, m_t = x.m_t;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    m_s = fmaxf(m_s, s[i]);
    m_t = fmaxf(m_t, t[i]);
  }
  move_maxima(x, m_s, m_t);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const float of_s = s[i] - m_s, of_t = t[i] - m_t;
    const float e_t = fast_exp2(of_t);
    x.l_s += fast_exp2(of_s);
    x.l_t += e_t;
    if (e_t > 0.f) x.a += e_t * (of_t - of_s);  // both may be -inf where e_t is 0
  }
}

// Merges over a warp: sums of two numbers do not depend on their order, so every lane ends with the
// same bits.
__device__ __forceinline__ RowState merge_warp(RowState x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const RowState y = {shuffle_xor(x.m_s, lanes), shuffle_xor(x.l_s, lanes),
                        shuffle_xor(x.m_t, lanes), shuffle_xor(x.l_t, lanes),
                        shuffle_xor(x.a, lanes)};
    merge(x, y);
  }
  return x;
}

// Both sides of a row, as chunks of x = z * factor.
struct Sides {
  Row s, t;
  int lead;
  bool vectors;
  int64_t width, chunks;
  float factor;
  unsigned char *cache_s, *cache_t;

  __device__ __forceinline__ void read(int64_t chunk, bool first_sweep, float (&x)[kChunk],
                                       float (&y)[kChunk]) const {
    const Span span = span_of(chunk, lead, width);
    if (cache_s != nullptr && vectors && span.full) {
      // A thread comes back to the chunks that it put there itself: no barrier is needed.
      unsigned char* at_s = cache_s + chunk * kChunk * element_size(s.dtype);
      unsigned char* at_t = cache_t + chunk * kChunk * element_size(t.dtype);
      RawChunk raw_s, raw_t;
      if (first_sweep) {
        raw_s = load_raw(s.data + span.first * element_size(s.dtype), s.dtype);
        raw_t = load_raw(t.data + span.first * element_size(t.dtype), t.dtype);
        store_raw(at_s, s.dtype, raw_s);
        store_raw(at_t, t.dtype, raw_t);
      } else {
        raw_s = load_raw(at_s, s.dtype);
        raw_t = load_raw(at_t, t.dtype);
      }
      unpack(raw_s, s.dtype, x);
      unpack(raw_t, t.dtype, y);
    } else {
      load_chunk(s, span, vectors, kLow, x);
      load_chunk(t, span, vectors, kLow, y);
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const bool exists = i >= span.from && i < span.to;
      x[i] = exists ? mul(x[i], factor) : kLow;
      y[i] = exists ? mul(y[i], factor) : kLow;
    }
  }
};

__device__ __forceinline__ void write_gradient(const Sides& sides, const Row& grad,
                                               const RowState& x, float weight, int start,
                                               int step) {
  const float inverse_s = reciprocal(x.l_s), inverse_t = reciprocal(x.l_t);
  for (int64_t chunk = start; chunk < sides.chunks; chunk += step) {
    float s[kChunk], t[kChunk];
    sides.read(chunk, false, s, t);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      s[i] = weight *
             (mul(fast_exp2(s[i] - x.m_s), inverse_s) - mul(fast_exp2(t[i] - x.m_t), inverse_t));
    }
    store_chunk(grad, span_of(chunk, sides.lead, sides.width), sides.vectors, s);
  }
}

__device__ __forceinline__ void write_zeros(const Row& grad, int64_t width, int start, int step) {
  const int lead = lead_of(grad);
  const float zeros[kChunk] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
  const int64_t chunks = (width + lead + kChunk - 1) / kChunk;
  for (int64_t chunk = start; chunk < chunks; chunk += step) {
    store_chunk(grad, span_of(chunk, lead, width), true, zeros);
  }
}

__global__ void __launch_bounds__(kMaxThreads, 1)
    softmax_kl_kernel(const BERTKD_GRID_CONSTANT SoftmaxParams p) {
  BERTKD_SHARED(memory);
  const SoftmaxKl& args = p.args;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool warp_owns_row = p.threads_per_row == 32;
  const int rows_per_block = blockDim.x / p.threads_per_row;
  const int slot = threadIdx.x / p.threads_per_row;
  const int start = threadIdx.x % p.threads_per_row, step = p.threads_per_row;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * rows_per_block + slot;
  // Warps leave only where no barrier of the block follows.
  if (row >= args.rows) return;

  const bool backward = args.weights != nullptr;
  const float weight = backward ? args.weights[row * args.stride_w] : 1.0f;
  const Row grad = row_of(args.grad, row);
  const int64_t width = args.student.width;
  if (weight == 0.0f) {
    write_zeros(grad, width, start, step);
    if (start == 0) p.row_loss[row] = 0.0f;
    return;
  }

  Sides sides;
  sides.s = row_of(args.student, row);
  sides.t = row_of(args.teacher, row);
  sides.lead = lead_of(sides.s);
  sides.vectors = fits_lead(sides.t, sides.lead) && (!backward || fits_lead(grad, sides.lead));
  sides.width = width;
  sides.chunks = (width + sides.lead + kChunk - 1) / kChunk;
  sides.factor = p.factor;
  sides.cache_s = p.cached ? memory + slot * p.cache_bytes : nullptr;
  // One chunk more than the width has: `lead` may push the last elements into it.
  sides.cache_t = sides.cache_s + (width / kChunk + 2) * kChunk * element_size(sides.s.dtype);

  RowState x = {kLow, 0.0f, kLow, 0.0f, 0.0f};
  for (int64_t chunk = start; chunk < sides.chunks; chunk += step) {
    float s[kChunk], t[kChunk];
    sides.read(chunk, true, s, t);
    add_chunk(x, s, t);
  }
  x = merge_warp(x);
  if (!warp_owns_row) {
    RowState* of_warp = reinterpret_cast<RowState*>(memory + rows_per_block * p.cache_bytes);
    if (lane == 0) of_warp[warp] = x;
    sync_block();
    const RowState nothing = {kLow, 0.0f, kLow, 0.0f, 0.0f};
    x = merge_warp(lane < step / 32 ? of_warp[lane] : nothing);
  }
  if (start == 0) {
    const float kl = kLn2 * (x.a * reciprocal(x.l_t) + (log2f(x.l_s) - log2f(x.l_t)));
    (backward ? p.row_loss : args.out_rows)[row] = kl * weight;
  }
  if (backward) write_gradient(sides, grad, x, weight * p.inverse_temperature, start, step);
}

int threads_for(int64_t width) {
  const int64_t chunks = width / kChunk + 1;
  if (chunks <= 128) return 32;
  return chunks <= 1024 ? 128 : kMaxThreads;
}

}  // namespace

int64_t softmax_kl_workspace(int64_t rows) { return rows; }

void softmax_kl(const SoftmaxKl& args, const Launch& launch) {
  const bool backward = args.weights != nullptr;
  require(args.rows >= 0 && args.rows < (int64_t{1} << 31), "rows must be below 2^31");
  require(args.student.width > 0, "student has no columns");
  require(args.temperature > 0.0f, "temperature must be positive");
  if (backward) require(args.loss != nullptr, "loss is missing");
  if (args.rows > 0) {
    require_rows("student", args.student, args.student.width);
    require_rows("teacher", args.teacher, args.student.width);
    if (backward) {
      require_rows("grad", args.grad, args.student.width);
      require_workspace(launch, softmax_kl_workspace(args.rows));
    } else {
      require(args.out_rows != nullptr, "out_rows is missing");
    }
    SoftmaxParams p;
    p.args = args;
    p.factor = 1.4426950408889634f / args.temperature;
    p.inverse_temperature = 1.0f / args.temperature;
    p.row_loss = launch.workspace;
    p.threads_per_row = threads_for(args.student.width);
    const int rows_per_block = p.threads_per_row == 32 ? kWarpsPerBlock : 1;
    const int64_t states = kMaxThreads / 32 * static_cast<int64_t>(sizeof(RowState));
    p.cache_bytes = (args.student.width / kChunk + 2) * kChunk *
                    (size_of(args.student.dtype) + size_of(args.teacher.dtype));
    // Without a gradient there is no second sweep to cache for.
    p.cached = backward && rows_per_block * p.cache_bytes + states <= shared_limit();
    if (!p.cached) p.cache_bytes = 0;
    const int64_t blocks = (args.rows + rows_per_block - 1) / rows_per_block;
    launch_kernel("softmax_kl_kernel", softmax_kl_kernel, dim3(static_cast<unsigned>(blocks)),
                  rows_per_block * p.threads_per_row, rows_per_block * p.cache_bytes + states,
                  launch.stream, p);
  }
  if (backward) sum_partials(launch.workspace, args.rows, args.loss, launch.stream);
}

}  // namespace bertkd::cuda
