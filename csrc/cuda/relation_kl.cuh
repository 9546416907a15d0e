// relation_kl of short sequences: one thread block owns a head and reads it once.
//
// A warp owns 16 query rows and 64 keys; two warps share the rows of a longer sequence and exchange
// their maxima and sums. Whole rows of both sides' scores stay in registers, so both softmaxes are
// exact:
//   A_i = sum_j 2^(x_t - m_t) ((x_t - m_t) - (x_s - m_s)),
//   KL_i = ln 2 (A_i / l_t + log2 l_s - log2 l_t).
// dS_i = w_i (P_s - P_t) is formed in fp32 and rounded once into shared memory, from where the
// tensor cores make da = dS b and db = dS^T a. No atomics: every sum has one order.
#pragma once

#include "relation_gradient.cuh"
#include "relation_scores.cuh"

namespace bertkd::cuda {

namespace relation {

// 512 threads of at most 128 registers.
template <class T>
__global__ void __launch_bounds__(512, 1) relation_kl_kernel(const BERTKD_GRID_CONSTANT Params p) {
  BERTKD_SHARED(memory);
  const Attention& args = p.args;
  const Layout& at = p.layout;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t b = blockIdx.y, h = blockIdx.x, head = b * args.heads + h;
  const int length = static_cast<int>(args.length);
  const int width_s = static_cast<int>(args.a_s.width), width_t = static_cast<int>(args.a_t.width);
  float* weights = reinterpret_cast<float*>(memory + at.weights);
  float* row_loss = reinterpret_cast<float*>(memory + at.row_loss);
  const unsigned char* real = memory + at.real;

  const Extent extent = read_mask(p, memory, b, h);
  if (extent.keys == 0 || extent.active == 0u) {
    if (p.backward) {
      write_zeros(head_of<T>(args.grad_a, b, h), length, width_s);
      if (!p.self) write_zeros(head_of<T>(args.grad_b, b, h), length, width_s);
      if (threadIdx.x == 0) p.partials[head] = 0.0f;
    } else {
      for (int i = threadIdx.x; i < length; i += blockDim.x) args.rows[head * length + i] = 0.0f;
    }
    return;
  }

  const auto is_real = [&](int i) { return real[i] != 0; };
  const auto is_weighted = [&](int i) { return weights[i] != 0.0f; };
  const auto either = [&](int i) { return is_real(i) || is_weighted(i); };
  const auto is_row = [&](int i) { return ((extent.active >> (i / kRowTile)) & 1u) != 0u; };
  const auto is_key = [&](int i) { return i < extent.keys; };
  const auto any = [&](int i) { return is_row(i) || is_key(i); };
  const auto load_side = [&](const Heads& rows, const Heads& keys, int rows_at, int keys_at,
                             int stride, int width) {
    T* to_rows = reinterpret_cast<T*>(memory + rows_at);
    T* to_keys = reinterpret_cast<T*>(memory + keys_at);
    if (p.self) {
      load_rows(to_rows, stride, head_of<T>(rows, b, h), length, width, at.rows, either, any);
    } else {
      load_rows(to_rows, stride, head_of<T>(rows, b, h), length, width, at.rows, is_weighted,
                is_row);
      load_rows(to_keys, stride, head_of<T>(keys, b, h), length, width, at.rows, is_real, is_key);
    }
    copy_commit();
  };
  load_side(args.a_t, args.b_t, at.teacher, at.teacher_keys, at.stride_t, width_t);
  load_side(args.a_s, args.b_s, at.student, at.student_keys, at.stride_s, width_s);

  const bool shared_rows = at.key_groups == 2;
  const int tile = shared_rows ? warp / 2 : warp, group = shared_rows ? warp % 2 : 0;
  const int row0 = tile * kRowTile, key0 = group * kKeyGroup;
  const bool works = ((extent.active >> tile) & 1u) != 0u;
  float s[kAccumulators][4], t[kAccumulators][4];

  // The teacher's scores are made while the student's rows are still on their way.
  copy_wait<1>();
  sync_block();
  if (works) {
    make_scores(t, reinterpret_cast<const T*>(memory + at.teacher),
                reinterpret_cast<const T*>(memory + at.teacher_keys), at.stride_t, width_t, row0,
                key0, extent.keys, lane);
  }
  copy_wait<0>();
  sync_block();

  uint32_t real_bits = 0u;
  float m_s[2] = {kLow, kLow}, m_t[2] = {kLow, kLow};
  if (works) {
    make_scores(s, reinterpret_cast<const T*>(memory + at.student),
                reinterpret_cast<const T*>(memory + at.student_keys), at.stride_s, width_s, row0,
                key0, extent.keys, lane);
#pragma unroll
    for (int n = 0; n < kAccumulators; ++n) {
      const int key = key0 + n * 8 + accumulator_place(lane, 0).column;
      real_bits |= (real[key] ? 1u : 0u) << (2 * n) | (real[key + 1] ? 2u : 0u) << (2 * n);
    }
    scale_and_mask(s, p.factor_s, real_bits);
    scale_and_mask(t, p.factor_t, real_bits);
#pragma unroll
    for (int n = 0; n < kAccumulators; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        m_s[e / 2] = fmaxf(m_s[e / 2], s[n][e]);
        m_t[e / 2] = fmaxf(m_t[e / 2], t[n][e]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      m_s[half] = quad_max(m_s[half]);
      m_t[half] = quad_max(m_t[half]);
    }
  }
  if (shared_rows) {
    float* maxima = reinterpret_cast<float*>(memory + at.maxima);
    if (works && lane % 4 == 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* mine = maxima + (group * kMaxRows + row0 + lane / 4 + 8 * half) * 2;
        mine[0] = m_s[half];
        mine[1] = m_t[half];
      }
    }
    sync_block();
    if (works) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* other = maxima + ((1 - group) * kMaxRows + row0 + lane / 4 + 8 * half) * 2;
        m_s[half] = fmaxf(m_s[half], other[0]);
        m_t[half] = fmaxf(m_t[half], other[1]);
      }
    }
  }

  Sums sums{};
  if (works) sums = exponentiate(s, t, m_s, m_t);
  if (shared_rows) {
    float* shared_sums = reinterpret_cast<float*>(memory + at.sums);
    if (works && lane % 4 == 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* mine = shared_sums + (group * kMaxRows + row0 + lane / 4 + 8 * half) * 3;
        mine[0] = sums.l_s[half];
        mine[1] = sums.l_t[half];
        mine[2] = sums.a[half];
      }
    }
    sync_block();
    if (works) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* other =
            shared_sums + ((1 - group) * kMaxRows + row0 + lane / 4 + 8 * half) * 3;
        sums.l_s[half] += other[0];
        sums.l_t[half] += other[1];
        sums.a[half] += other[2];
      }
    }
  }

  if (works) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + lane / 4 + 8 * half;
      const float kl = kLn2 * (sums.a[half] * reciprocal(sums.l_t[half]) +
                               (log2f(sums.l_s[half]) - log2f(sums.l_t[half])));
      if (group == 0 && lane % 4 == 0) {
        if (p.backward) {
          row_loss[row] = weights[row] == 0.0f ? 0.0f : kl * weights[row];
        } else if (row < length) {
          args.rows[head * length + row] = kl;
        }
      }
    }
  } else if (p.backward && group == 0 && lane < kRowTile) {
    row_loss[row0 + lane] = 0.0f;
  }
  if (!p.backward) return;

  if (works) {
    T* ds = reinterpret_cast<T*>(memory + at.gradient);
    const float gain = kGain * reciprocal(*reinterpret_cast<const float*>(memory + at.max_weight));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + lane / 4 + 8 * half;
      const float inverse_s = reciprocal(sums.l_s[half]), inverse_t = reciprocal(sums.l_t[half]);
      const float relative = weights[row] * gain;
#pragma unroll
      for (int n = 0; n < kAccumulators; ++n) {
        if (key0 + n / 2 * 16 < extent.keys) {
          float d[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            d[e] = (mul(s[n][2 * half + e], inverse_s) - mul(t[n][2 * half + e], inverse_t)) *
                   relative;
          }
          T* to = ds + row * at.stride_d + key0 + n * 8 + accumulator_place(lane, 0).column;
          *reinterpret_cast<uint32_t*>(to) = pack<T>(d[0], d[1]);
        }
      }
    }
  }
  sync_block();
  if (warp == 0) {
    float sum = 0.0f;
    for (int i = lane; i < at.rows; i += 32) sum += row_loss[i];
    sum = warp_sum(sum);
    if (lane == 0) p.partials[head] = sum;
  }
  make_gradients<T>(p, memory, extent, b, h);
}

// One object file per dtype: they compile side by side.
template <class T>
void launch_relation(const Params& p, void* stream) {
  const dim3 grid(static_cast<unsigned>(p.args.heads), static_cast<unsigned>(p.args.batch));
  launch_kernel("relation_kl_kernel", relation_kl_kernel<T>, grid, threads_of(p.layout),
                p.layout.total, stream, p);
}

extern template void launch_relation<F16>(const Params&, void*);
extern template void launch_relation<BF16>(const Params&, void*);

}  // namespace relation

}  // namespace bertkd::cuda
