#include "checks.h"

#include <cmath>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace bertkd {
namespace {

constexpr int64_t kMostSize = INT32_MAX;             // positions are kept in 32 bits
constexpr int64_t kMostElements = int64_t{1} << 46;  // offsets in bytes then fit 64 bits with room

// What a message starts with: "op: argument".
struct Where {
  const char* op;
  const char* name;
};

[[noreturn]] void refuse(Where where, const std::string& what) {
  throw std::invalid_argument(std::string(where.op) + ": " + where.name + " " + what);
}

void check_size(Where where, int64_t size, int64_t least, int64_t most = kMostSize) {
  if (size < least || size > most)
    refuse(where, "must lie between " + std::to_string(least) + " and " + std::to_string(most) +
                      ", got " + std::to_string(size) + ".");
}

void check_address(Where where, const void* data, int64_t bytes) {
  if (data == nullptr) refuse(where, "is null. Pass the tensor's data_ptr().");
  if (reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(bytes) != 0)
    refuse(where, "is not aligned to its element size of " + std::to_string(bytes) +
                      " bytes. Pass a tensor's own data_ptr().");
}

int64_t size_of(Where where, DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 4;
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
  }
  refuse(where, "has the unknown dtype code " + std::to_string(static_cast<int32_t>(dtype)) +
                    "; known are 0 (fp32), 1 (fp16) and 2 (bf16).");
}

struct Axis {
  int64_t size, stride;
};

// Every element's offset must be non-negative and small enough to be multiplied by its size.
void check_strides(Where where, std::initializer_list<Axis> axes) {
  int64_t last = 0;
  for (const Axis& axis : axes) {
    int64_t reach = 0;
    if (axis.stride < 0)
      refuse(where, "has the negative stride " + std::to_string(axis.stride) +
                        ". Call .contiguous() first.");
    if (__builtin_mul_overflow(axis.size, axis.stride, &reach) || reach > kMostElements ||
        (last += reach) > kMostElements)
      refuse(where, "reaches beyond 2^46 elements: its sizes or strides are wrong.");
  }
}

template <class Args>
void check_heads(Where where, const Heads& x, const Args& args, bool written) {
  check_address(where, x.data, size_of(where, x.dtype));
  check_size(where, x.width, 1);
  check_strides(where, {{args.batch, x.stride_b},
                        {args.heads, x.stride_h},
                        {args.length, x.stride_l},
                        {x.width, 1}});
  // Rows of an output that overlap would be written by two threads.
  if (written && args.length > 1 && x.stride_l < x.width)
    refuse(where, "has rows that overlap: its stride is below its width.");
}

template <class Tensor>
void check_same_width(const char* op, const char* names, const Tensor& a, const Tensor& b) {
  if (a.width != b.width)
    refuse({op, names}, "must have one width, got " + std::to_string(a.width) + " and " +
                            std::to_string(b.width) + ".");
}

// A gradient has the dtype and the width of its tensor.
template <class Tensor>
void check_gradient(const char* op, const char* names, const Tensor& x, const Tensor& grad) {
  check_same_width(op, names, x, grad);
  if (x.dtype != grad.dtype) refuse({op, names}, "must have one dtype.");
}

void check_threads(const char* op, int threads) { check_size({op, "threads"}, threads, 1, 4096); }

void check_finite(Where where, float x) {
  if (!std::isfinite(x)) refuse(where, "must be finite, got " + std::to_string(x) + ".");
}

// Sizes of an op over heads. Whether there is any row.
template <class Args>
bool check_shape(const char* op, const Args& args) {
  check_size({op, "batch"}, args.batch, 0);
  check_size({op, "heads"}, args.heads, 0);
  check_size({op, "length"}, args.length, 0);
  check_threads(op, args.threads);
  int64_t total = 0;
  if (__builtin_mul_overflow(args.batch * args.heads, args.length, &total) || total > kMostElements)
    refuse({op, "batch * heads * length"}, "is over 2^46.");
  return total > 0;
}

template <class Args>
void check_mask(const char* op, const Args& args) {
  if (args.mask.data)
    check_strides({op, "mask"},
                  {{args.batch, args.mask.stride_b}, {args.length, args.mask.stride_l}});
}

void check_rows(Where where, const Rows& x, int64_t rows, bool written) {
  check_address(where, x.data, size_of(where, x.dtype));
  check_size(where, x.width, 1);
  check_strides(where, {{rows, x.stride}, {x.width, 1}});
  if (written && rows > 1 && x.stride < x.width)
    refuse(where, "has rows that overlap: its stride is below its width.");
}

}  // namespace

void check_attention(const char* op, const Attention& args, Relation relation) {
  const bool any = check_shape(op, args);
  check_size({op, "window"}, args.window, -1);
  check_finite({op, "scale_s"}, args.scale_s);
  check_finite({op, "scale_t"}, args.scale_t);
  if (args.weights.data) {
    check_address({op, "loss"}, args.loss, 4);
    check_address({op, "row_weight"}, args.weights.data, 4);
  } else {
    check_address({op, "rows"}, args.rows, 4);
  }
  if (!any) return;
  const bool pair = relation == Relation::kPair, backward = args.weights.data != nullptr;
  check_heads({op, pair ? "a_s" : "x_s"}, args.a_s, args, false);
  check_heads({op, pair ? "a_t" : "x_t"}, args.a_t, args, false);
  if (pair) {
    check_heads({op, "b_s"}, args.b_s, args, false);
    check_heads({op, "b_t"}, args.b_t, args, false);
    check_same_width(op, "a_s and b_s", args.a_s, args.b_s);
    check_same_width(op, "a_t and b_t", args.a_t, args.b_t);
  }
  check_mask(op, args);
  if (!backward) return;
  check_strides({op, "row_weight"}, {{args.batch, args.weights.stride_b},
                                     {args.heads, args.weights.stride_h},
                                     {args.length, args.weights.stride_l}});
  check_heads({op, pair ? "grad_a" : "grad_x"}, args.grad_a, args, true);
  check_gradient(op, pair ? "a_s and grad_a" : "x_s and grad_x", args.a_s, args.grad_a);
  if (!pair) return;
  check_heads({op, "grad_b"}, args.grad_b, args, true);
  check_gradient(op, "b_s and grad_b", args.b_s, args.grad_b);
}

void check_self_attention(const SelfAttention& args) {
  const char* op = "self_attention";
  const bool any = check_shape(op, args), backward = args.grad_out.data != nullptr;
  check_size({op, "window"}, args.window, -1);
  check_finite({op, "scale"}, args.scale);
  if (!(args.dropout >= 0.f && args.dropout < 1.f))
    refuse({op, "dropout"},
           "must be at least 0 and below 1, got " + std::to_string(args.dropout) + ".");
  check_address({op, "stats"}, args.stats, 4);
  if (!any) return;
  check_heads({op, "q"}, args.q, args, false);
  const struct {
    const char *name, *with_q;
    const Heads& tensor;
    bool used, written;
  } others[] = {{"k", "q and k", args.k, true, false},
                {"v", "q and v", args.v, true, false},
                {"out", "q and out", args.out, true, !backward},
                {"grad_out", "q and grad_out", args.grad_out, backward, false},
                {"grad_q", "q and grad_q", args.grad_q, backward, true},
                {"grad_k", "q and grad_k", args.grad_k, backward, true},
                {"grad_v", "q and grad_v", args.grad_v, backward, true}};
  for (const auto& other : others) {
    if (!other.used) continue;
    check_heads({op, other.name}, other.tensor, args, other.written);
    check_same_width(op, other.with_q, args.q, other.tensor);
  }
  check_mask(op, args);
}

void check_hidden_mse(const HiddenMse& args) {
  const char* op = "hidden_mse";
  check_size({op, "states"}, args.states, 0);
  check_size({op, "rows"}, args.rows, 0);
  check_threads(op, args.threads);
  check_address({op, "loss"}, args.loss, 4);
  if (args.states == 0 || args.rows == 0) return;
  check_address({op, "row_weight"}, args.weights, 4);
  check_strides({op, "row_weight"}, {{args.rows, args.stride_w}});
  for (int64_t k = 0; k < args.states; ++k) {
    check_rows({op, "h_s"}, args.student[k], args.rows, false);
    check_rows({op, "h_t"}, args.teacher[k], args.rows, false);
    check_same_width(op, "h_s and h_t", args.student[k], args.teacher[k]);
    if (!args.grad) continue;
    check_rows({op, "grad"}, args.grad[k], args.rows, true);
    check_gradient(op, "h_s and grad", args.student[k], args.grad[k]);
  }
}

void check_softmax_kl(const SoftmaxKl& args) {
  const char* op = "softmax_kl";
  check_size({op, "rows"}, args.rows, 0);
  check_threads(op, args.threads);
  check_finite({op, "temperature"}, args.temperature);
  if (!(args.temperature > 0.f)) refuse({op, "temperature"}, "must be positive.");
  if (args.weights) {
    check_address({op, "loss"}, args.loss, 4);
    check_address({op, "row_weight"}, args.weights, 4);
    check_strides({op, "row_weight"}, {{args.rows, args.stride_w}});
  } else {
    check_address({op, "out_rows"}, args.out_rows, 4);
  }
  if (args.rows == 0) return;
  check_rows({op, "z_s"}, args.student, args.rows, false);
  check_rows({op, "z_t"}, args.teacher, args.rows, false);
  check_same_width(op, "z_s and z_t", args.student, args.teacher);
  if (!args.weights) return;
  check_rows({op, "grad"}, args.grad, args.rows, true);
  check_gradient(op, "z_s and grad", args.student, args.grad);
}

void check_memory(const void* data, int64_t bytes) {
  check_address({"use_large_pages", "data"}, data, 1);
  if (bytes < 0) refuse({"use_large_pages", "bytes"}, "must not be negative.");
}

void check_exp2(const float* x, const float* out, int64_t count) {
  check_size({"exp2", "count"}, count, 0);
  if (count == 0) return;
  check_address({"exp2", "x"}, x, 4);
  check_address({"exp2", "out"}, out, 4);
}

}  // namespace bertkd
