// Fuzz target of the native argument checks: whatever an argument holds, an op
// either refuses it before it touches memory, or works within memory that is
// exactly as large as the argument says. With libFuzzer: clang++
// -fsanitize=fuzzer,address,undefined -DBERTKD_LIBFUZZER. Without it main()
// feeds random bytes, as test_native_sanitize.py does under the sanitizers.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "bertkd.h"
#include "cpu/checks.h"

namespace {

using bertkd::DType;

constexpr int64_t kMostBytes = 1 << 16;
// Aligned, not null, and no memory of ours: reading it is found out.
const auto kNowhere = reinterpret_cast<uint8_t*>(uintptr_t{4096});

long refused = 0, ran = 0, too_large = 0;

// Values from the fuzzer's bytes; zeros when they are used up.
struct Source {
  const uint8_t* data;
  size_t left;

  uint8_t byte() { return left ? (--left, *data++) : 0; }
  uint64_t word() {
    uint64_t bits = 0;
    for (int i = 0; i < 8; ++i) bits = bits << 8 | byte();
    return bits;
  }
  bool rarely() { return byte() % 32 == 1; }
  // Mostly below `most`; rarely anything, and often then near a power of two.
  int64_t number(int64_t most) {
    if (!rarely()) return byte() % (most + 1);
    const int64_t edge = int64_t{1} << (byte() % 63), near = byte() % 3 - 1;
    return byte() % 2 ? static_cast<int64_t>(word()) : byte() % 2 ? edge + near : -edge + near;
  }
  float real() {
    if (!rarely()) return 0.125f * static_cast<float>(byte() % 16 + 1);
    const auto bits = static_cast<uint32_t>(word());
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }
  DType dtype() { return static_cast<DType>(rarely() ? static_cast<int32_t>(word()) : byte() % 3); }
};

// Memory of a call, each piece exactly as large as asked for.
struct Memory {
  std::vector<std::unique_ptr<uint8_t[]>> pieces;
  bool complete = true;  // false: something is too large, or nonsense, to be allocated

  struct Axis {
    int64_t size, stride;
  };

  void* take(Source& from, int64_t element, std::initializer_list<Axis> axes) {
    // Null or misaligned: whoever uses it has to refuse it, for touching it is
    // the end. A mask has single bytes, which lie everywhere.
    if (from.rarely()) return element == 1 || from.byte() % 2 ? nullptr : kNowhere + 1;
    int64_t last = 0;
    bool empty = false;
    for (const Axis& axis : axes) {
      int64_t reach = 0;
      empty = empty || axis.size == 0;
      if (axis.size < 0 || axis.stride < 0 ||
          __builtin_mul_overflow(axis.size - 1, axis.stride, &reach) || reach > kMostBytes ||
          (last += reach) > kMostBytes) {
        complete = complete && axis.size == 0;
        return kNowhere;
      }
    }
    const auto bytes = static_cast<size_t>(empty ? 0 : (last + 1) * element);
    pieces.emplace_back(new uint8_t[bytes + (bytes == 0)]);
    // Of every byte 0x3c the floats of all dtypes are small numbers.
    std::memset(pieces.back().get(), 0x3c, bytes);
    return pieces.back().get();
  }
};

int64_t bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

template <class Args>
bertkd::Heads heads(Source& from, Memory& memory, const Args& args, int64_t width, DType dtype) {
  if (from.rarely()) width = from.number(40);
  if (from.rarely()) dtype = from.dtype();
  // A dense tensor's strides, its rows a little apart; what overflows is
  // nonsense, to be refused.
  int64_t stride_l = -1, stride_h = -1, stride_b = -1;
  if (__builtin_add_overflow(width, from.byte() % 3, &stride_l) ||
      __builtin_mul_overflow(args.length, stride_l, &stride_h) ||
      __builtin_mul_overflow(args.heads, stride_h, &stride_b))
    stride_l = stride_h = stride_b = -1;
  if (from.rarely()) stride_l = from.number(80);
  if (from.rarely()) stride_h = from.number(80);
  if (from.rarely()) stride_b = from.number(400);
  void* data = memory.take(
      from, bytes_of(dtype),
      {{args.batch, stride_b}, {args.heads, stride_h}, {args.length, stride_l}, {width, 1}});
  return {data, dtype, width, stride_b, stride_h, stride_l};
}

// What no check may accept, said a second time: of a tensor that is used, and
// of a gradient.
bool known(DType dtype) { return static_cast<uint32_t>(dtype) < 3; }

bool reaches(int64_t size, int64_t stride) {
  int64_t reach = 0;
  return stride >= 0 && !__builtin_mul_overflow(size, stride, &reach) && reach <= int64_t{1} << 46;
}

template <class Args>
bool wrong(const Args& args, const bertkd::Heads& x, const bertkd::Heads* like) {
  if (!known(x.dtype) || x.width < 1 || !reaches(args.batch, x.stride_b) ||
      !reaches(args.heads, x.stride_h) || !reaches(args.length, x.stride_l))
    return true;
  return like && (x.dtype != like->dtype || x.width != like->width ||
                  (args.length > 1 && x.stride_l < x.width));
}

bool wrong(int64_t rows, const bertkd::Rows& x, const bertkd::Rows* like) {
  if (!known(x.dtype) || x.width < 1 || !reaches(rows, x.stride)) return true;
  return like &&
         (x.dtype != like->dtype || x.width != like->width || (rows > 1 && x.stride < x.width));
}

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "native_fuzz: %s\n", what);
  std::abort();
}

// The check must refuse what is wrong, and the op what the check refuses, with
// the same exception.
template <class Args, class Check, class Op>
void exercise(const Args& args, const Memory& memory, bool is_wrong, const Check& check,
              const Op& op) {
  bool good = true;
  try {
    check(args);
  } catch (const std::invalid_argument& error) {
    if (std::strchr(error.what(), ':') == nullptr) fail("a refusal that names no argument");
    good = false;
  }
  if (good && is_wrong) fail("a check accepts what no op can work with");
  if (good && !memory.complete) {
    ++too_large;
    return;
  }
  try {
    op(args);
    if (!good) fail("an op ran what its check refuses");
    ++ran;
  } catch (const std::invalid_argument&) {
    if (good) fail("an op refused what its check accepts");
    ++refused;
  }
}

template <class Args>
void sizes_of(Source& from, Args& args) {
  args.batch = from.number(3), args.heads = from.number(3), args.length = from.number(40);
  args.threads = static_cast<int>(from.rarely() ? from.number(4) : 1 + from.byte() % 2);
}

template <class Args>
void mask_of(Source& from, Memory& memory, Args& args) {
  if (from.byte() % 2 == 0) return;
  args.mask.stride_b = from.number(40), args.mask.stride_l = from.number(2);
  args.mask.data = static_cast<uint8_t*>(
      memory.take(from, 1, {{args.batch, args.mask.stride_b}, {args.length, args.mask.stride_l}}));
}

// Rows that an op may write a number for, if there are few enough.
template <class Args>
std::vector<float> numbers(Memory& memory, const Args& args, int64_t each) {
  const bool small = args.batch >= 0 && args.batch < 8 && args.heads >= 0 && args.heads < 8 &&
                     args.length >= 0 && args.length < 4096;
  memory.complete = memory.complete && small;
  const int64_t count = small ? args.batch * args.heads * args.length * each : 0;
  return std::vector<float>(static_cast<size_t>(count) + 1);
}

void attention(Source& from) {
  Memory memory;
  bertkd::Attention args = {};
  sizes_of(from, args);
  args.window = from.byte() % 2 ? -1 : from.number(40);
  args.scale_s = from.real(), args.scale_t = from.real();
  const int64_t width_s = 1 + from.byte() % 40, width_t = 1 + from.byte() % 40;
  const DType dtype_s = from.dtype(), dtype_t = from.dtype();
  args.a_s = heads(from, memory, args, width_s, dtype_s);
  args.b_s = heads(from, memory, args, width_s, dtype_s);
  args.a_t = heads(from, memory, args, width_t, dtype_t);
  args.b_t = heads(from, memory, args, width_t, dtype_t);
  mask_of(from, memory, args);
  std::vector<float> loss(1);
  if (from.byte() % 4) {
    auto& w = args.weights;
    w.stride_b = from.number(120), w.stride_h = from.number(40), w.stride_l = from.number(2);
    w.data = static_cast<float*>(memory.take(
        from, 4, {{args.batch, w.stride_b}, {args.heads, w.stride_h}, {args.length, w.stride_l}}));
    args.loss = from.rarely() ? nullptr : loss.data();
    args.grad_a = heads(from, memory, args, width_s, dtype_s);
    args.grad_b = heads(from, memory, args, width_s, dtype_s);
  }
  // Without weights, also where they came out as null, the losses of the rows
  // are written.
  std::vector<float> rows = numbers(memory, args, 1);
  args.rows = from.rarely() ? nullptr : rows.data();
  const bertkd::Relation relation =
      from.byte() % 2 ? bertkd::Relation::kPair : bertkd::Relation::kSelf;
  const bool mse = relation == bertkd::Relation::kPair && from.byte() % 2;
  const bool pair = relation == bertkd::Relation::kPair, backward = args.weights.data != nullptr;
  bool is_wrong =
      !std::isfinite(args.scale_s) || !std::isfinite(args.scale_t) || args.window < -1;
  if (rows.size() > 1) {
    is_wrong |= wrong(args, args.a_s, nullptr) || wrong(args, args.a_t, nullptr);
    is_wrong |= pair && (wrong(args, args.b_s, nullptr) || wrong(args, args.b_t, nullptr));
    is_wrong |= backward && wrong(args, args.grad_a, &args.a_s);
    is_wrong |= backward && pair && wrong(args, args.grad_b, &args.b_s);
  }
  exercise(
      args, memory, is_wrong, [&](const auto& a) { bertkd::check_attention("fuzz", a, relation); },
      mse                                   ? bertkd::attention_mse
      : relation == bertkd::Relation::kPair ? bertkd::relation_kl
                                            : bertkd::self_relation_kl);
}

void networks(Source& from) {
  Memory memory;
  bertkd::SelfAttention args = {};
  sizes_of(from, args);
  args.scale = from.real();
  args.dropout = from.byte() % 2 ? 0.f : from.real() / 4.f;
  args.seed = from.word();
  args.window = from.byte() % 2 ? -1 : from.number(40);
  const int64_t width = 1 + from.byte() % 40;
  bertkd::Heads* const tensors[] = {&args.q,        &args.k,      &args.v,      &args.out,
                                    &args.grad_out, &args.grad_q, &args.grad_k, &args.grad_v};
  const int used = from.byte() % 2 ? 8 : 4;
  for (int i = 0; i < used; ++i) *tensors[i] = heads(from, memory, args, width, from.dtype());
  mask_of(from, memory, args);
  std::vector<float> stats = numbers(memory, args, 2);
  args.stats = from.rarely() ? nullptr : stats.data();
  const bool backward = args.grad_out.data != nullptr;
  bool is_wrong = !std::isfinite(args.scale) || !(args.dropout >= 0.f && args.dropout < 1.f) ||
                  args.window < -1;
  for (int i = 0; stats.size() > 1 && i < (backward ? 8 : 4); ++i) {
    const bool written = i == 3 ? !backward : i > 4;
    is_wrong |= wrong(args, *tensors[i], nullptr) || tensors[i]->width != args.q.width ||
                (written && args.length > 1 && tensors[i]->stride_l < tensors[i]->width);
  }
  exercise(args, memory, is_wrong, bertkd::check_self_attention, bertkd::self_attention);
}

bertkd::Rows table(Source& from, Memory& memory, int64_t rows, int64_t width, DType dtype) {
  if (from.rarely()) width = from.number(600);
  if (from.rarely()) dtype = from.dtype();
  int64_t stride = -1;
  if (from.rarely() || __builtin_add_overflow(width, from.byte() % 3, &stride))
    stride = from.number(600);
  void* data = memory.take(from, bytes_of(dtype), {{rows, stride}, {width, 1}});
  return {data, dtype, width, stride};
}

float* weights_of(Source& from, Memory& memory, int64_t rows, int64_t* stride) {
  *stride = from.number(2);
  return static_cast<float*>(memory.take(from, 4, {{rows, *stride}}));
}

void logits(Source& from) {
  Memory memory;
  bertkd::SoftmaxKl args = {};
  args.rows = from.number(9);
  args.temperature = from.real();
  args.threads = static_cast<int>(from.number(3));
  const int64_t width = 1 + 3 * (from.byte() % 200);
  const DType dtype = from.dtype();
  args.student = table(from, memory, args.rows, width, dtype);
  args.teacher = table(from, memory, args.rows, width, from.dtype());
  std::vector<float> loss(1);
  if (from.byte() % 4) {
    args.weights = weights_of(from, memory, args.rows, &args.stride_w);
    args.loss = from.rarely() ? nullptr : loss.data();
    args.grad = table(from, memory, args.rows, width, dtype);
  }
  const bool small = args.rows >= 0 && args.rows < 4096;
  std::vector<float> rows(small ? static_cast<size_t>(args.rows) + 1 : 1);
  memory.complete = memory.complete && small;
  args.out_rows = from.rarely() ? nullptr : rows.data();
  bool is_wrong = !(args.temperature > 0.f) || !std::isfinite(args.temperature);
  if (rows.size() > 1) {
    is_wrong |= wrong(args.rows, args.student, nullptr) || wrong(args.rows, args.teacher, nullptr);
    is_wrong |= args.weights && wrong(args.rows, args.grad, &args.student);
  }
  exercise(args, memory, is_wrong, bertkd::check_softmax_kl, bertkd::softmax_kl);
}

void states(Source& from) {
  Memory memory;
  bertkd::HiddenMse args = {};
  const int64_t count = from.byte() % 4;
  args.rows = from.number(9);
  args.threads = static_cast<int>(from.number(3));
  std::vector<bertkd::Rows> student, teacher, grad;
  for (int64_t k = 0; k < count; ++k) {
    const int64_t width = 1 + from.byte() % 80;
    const DType dtype = from.dtype();
    student.push_back(table(from, memory, args.rows, width, dtype));
    teacher.push_back(table(from, memory, args.rows, width, from.dtype()));
    grad.push_back(table(from, memory, args.rows, width, dtype));
  }
  std::vector<float> loss(1);
  args.states = from.rarely() ? -1 - from.byte() : count;
  args.student = student.data(), args.teacher = teacher.data();
  args.grad = from.rarely() ? nullptr : grad.data();
  args.weights = weights_of(from, memory, args.rows, &args.stride_w);
  args.loss = from.rarely() ? nullptr : loss.data();
  bool is_wrong = args.states < 0;
  for (size_t k = 0; args.rows > 0 && args.states >= 0 && k < student.size(); ++k)
    is_wrong |= wrong(args.rows, student[k], nullptr) || wrong(args.rows, teacher[k], nullptr) ||
                (args.grad && wrong(args.rows, grad[k], &student[k]));
  exercise(args, memory, is_wrong, bertkd::check_hidden_mse, bertkd::hidden_mse);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Source from{data, size};
  switch (from.byte() % 5) {
    case 0:
      logits(from);
      break;
    case 1:
      states(from);
      break;
    case 2:
      networks(from);
      break;
    default:
      attention(from);
  }
  return 0;
}

#if !defined(BERTKD_LIBFUZZER)
int main(int, char** argv) {
  const long inputs = std::atol(argv[1]);
  std::mt19937 generator(0);
  for (long i = 0; i < inputs; ++i) {
    uint8_t bytes[256];
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(generator());
    LLVMFuzzerTestOneInput(bytes, sizeof bytes);
  }
  std::printf("%ld inputs: %ld refused, %ld ran, %ld too large to run\n", inputs, refused, ran,
              too_large);
}
#endif
