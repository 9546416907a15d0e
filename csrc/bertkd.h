// The native losses: plain structs of addresses and sizes, no torch, no Python.
//
// Every function checks its arguments first and throws std::invalid_argument, naming the argument,
// before it touches any memory. Strides count elements. The last dimension of a float tensor is
// always contiguous. Sums are made in fp32 (the losses' last stage in fp64); a gradient is rounded
// once, into the dtype of its tensor. Results depend on the inputs, the instruction set and, where
// one head is split over threads, the number of threads: never on timing.
#pragma once

#include <cstdint>

namespace bertkd {

enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// (B, H, L, width): element (b, h, i, d) lies at data + b stride_b + h stride_h + i stride_l + d.
// For outputs, data is written in spite of its type.
struct Heads {
  const void* data;
  DType dtype;
  int64_t width;
  int64_t stride_b, stride_h, stride_l;
};

// (N, width): row i lies at data + i stride.
struct Rows {
  const void* data;
  DType dtype;
  int64_t width;
  int64_t stride;
};

// Which keys may be attended to: one byte each, 0 = pad, at data + b stride_b + j stride_l. Null:
// all.
struct Mask {
  const uint8_t* data;
  int64_t stride_b, stride_l;
};

// fp32 weights of the rows (B, H, L). Strides may be 0 (an expanded tensor).
struct RowWeights {
  const float* data;
  int64_t stride_b, stride_h, stride_l;
};

// Arguments of relation_kl and attention_mse: (a, b) are (queries, keys) of student and teacher.
// Without `weights` the loss of every row goes to `rows`, contiguous (B, H, L); with them the
// weighted sum goes to `loss` and the gradients of a_s and b_s to grad_a and grad_b, pads included
// (they are 0 there). A row without any key to compare has the loss and the gradient 0.
struct Attention {
  int64_t batch, heads, length;
  Heads a_s, b_s, a_t, b_t;
  Mask mask;
  int64_t window = -1;  // row i compares the keys from i - window to i + window; -1: all of them
  float scale_s, scale_t;
  float* rows;
  RowWeights weights;
  float* loss;
  Heads grad_a, grad_b;
  int threads;
};

// Row i: KL(softmax(scale_t a_t_i . b_t) || softmax(scale_s a_s_i . b_s)) over the real keys of its
// window.
void relation_kl(const Attention& args);

// The same with a = b: b_s, b_t and grad_b are ignored, grad_a gets the gradient through both
// roles.
void self_relation_kl(const Attention& args);

// Row i: sum over the real keys of its window of (scale_s a_s_i . b_s - scale_t a_t_i . b_t)^2.
void attention_mse(const Attention& args);

// softmax(scale q k^T) v over the real keys of a row's window, (B, H, L, width) all of them, with
// dropout of the map: a pair is dropped with probability `dropout`, by a hash of `seed` and its
// place, and the others are divided by 1 - dropout. A row without any key is 0. Forward
// (grad_out.data null): writes `out` and `stats`, contiguous (B, H, L, 2), a row's largest score in
// units of log 2 and one over its sum of exponentials. Backward: reads both, writes the three
// gradients.
struct SelfAttention {
  int64_t batch, heads, length;
  Heads q, k, v;
  Mask mask;
  int64_t window = -1;  // as of Attention
  float scale, dropout;
  uint64_t seed;
  Heads out;
  float* stats;
  Heads grad_out, grad_q, grad_k, grad_v;
  int threads;
};
void self_attention(const SelfAttention& args);

// sum over states k and rows i of w_i |student[k]_i - teacher[k]_i|^2; grad[k] gets 2 w_i (student
// - teacher), unless grad is null.
struct HiddenMse {
  int64_t states, rows;
  const Rows *student, *teacher, *grad;
  const float* weights;
  int64_t stride_w;
  float* loss;
  int threads;
};
void hidden_mse(const HiddenMse& args);

// Row i: KL(softmax(teacher_i / T) || softmax(student_i / T)). Without `weights` the rows go to
// `out_rows` (N,); with them the weighted sum goes to `loss` and w_i (P_s - P_t) / T to `grad`,
// which may be the student's own memory.
struct SoftmaxKl {
  int64_t rows;
  Rows student, teacher;
  float temperature;
  float* out_rows;
  const float* weights;
  int64_t stride_w;
  float* loss;
  Rows grad;
  int threads;
};
void softmax_kl(const SoftmaxKl& args);

// Asks the system to back fresh memory with large pages as it is first written. Advice, of which
// nothing comes where there are none; nothing is read or written.
void use_large_pages(void* data, int64_t bytes);

// out[i] = 2^x[i] as the kernels compute it, for its error bound: within 2^-22 relative for -100 <=
// x <= 127; below, 2^-100.
void exp2(const float* x, float* out, int64_t count);

// The instruction set in use ("avx512", "avx2" or "portable"): the best of this processor, unless
// the environment variable BERTKD_CPU_ISA or select_cpu_isa says otherwise. Both throw if the
// processor or the build lacks it.
const char* cpu_isa();
void select_cpu_isa(const char* name);

// Names of what this build and this processor can run, best first, separated by commas.
const char* cpu_isas();

}  // namespace bertkd
