// Runs every native op over small and awkward shapes without Python, in memory
// that is exactly as large as it must be, and compares with plain loops in
// double. Built with the address and undefined-behaviour sanitizers by
// test_native_sanitize.py; prints the number of cases.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "bertkd.h"

namespace {

using bertkd::DType;

std::mt19937 generator(0);
int cases = 0;

[[noreturn]] void fail(const char* what, double got, double want) {
  std::fprintf(stderr, "%s: got %.9g, expected %.9g (case %d)\n", what, got, want, cases);
  std::exit(1);
}

void expect(const char* what, double got, double want, double scale) {
  if (!(std::fabs(got - want) <= 2e-4 * scale + 2e-5)) fail(what, got, want);
}

// A tensor of (b, h, l, d) laid out as (b, l, h, d), without a byte to spare,
// and its values as double.
struct Tensor {
  int64_t b, h, l, d;
  DType dtype;
  std::vector<uint8_t> bytes;
  std::vector<double> values;

  Tensor(int64_t b_, int64_t h_, int64_t l_, int64_t d_, DType dtype_)
      : b(b_), h(h_), l(l_), d(d_), dtype(dtype_) {
    std::normal_distribution<float> normal;
    const int64_t count = b * h * l * d, size = dtype == DType::kFloat32 ? 4 : 2;
    bytes.resize(static_cast<size_t>(count * size));
    values.resize(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) {
      float x = normal(generator);
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      bits &= 0xffff0000u;  // exact in bf16
      if (dtype == DType::kFloat16) {
        // Small multiples of 1/8 are exact in fp16.
        const int eighths = static_cast<int>(std::lround(x * 8.f));
        x = static_cast<float>(eighths) / 8.f;
        uint16_t half = 0;
        if (eighths) {
          int exponent;
          const float fraction = std::frexp(std::fabs(x), &exponent);  // in [1/2, 1)
          half = static_cast<uint16_t>((eighths < 0 ? 0x8000 : 0) | ((exponent + 14) << 10) |
                                       (static_cast<int>(fraction * 2048.f) & 0x3ff));
        }
        std::memcpy(&bytes[static_cast<size_t>(2 * i)], &half, 2);
      } else {
        std::memcpy(&x, &bits, 4);
        if (dtype == DType::kFloat32)
          std::memcpy(&bytes[static_cast<size_t>(4 * i)], &x, 4);
        else
          for (int k = 0; k < 2; ++k)
            bytes[static_cast<size_t>(2 * i + k)] = static_cast<uint8_t>(bits >> (16 + 8 * k));
      }
      values[static_cast<size_t>(i)] = x;
    }
  }

  int64_t offset(int64_t ib, int64_t ih, int64_t il, int64_t id) const {
    return ((ib * l + il) * h + ih) * d + id;
  }
  double at(int64_t ib, int64_t ih, int64_t il, int64_t id) const {
    return values[static_cast<size_t>(offset(ib, ih, il, id))];
  }
  // What an op wrote; low precision gradients are only touched here, not
  // compared.
  double written(int64_t ib, int64_t ih, int64_t il, int64_t id) const {
    float x;
    std::memcpy(&x, &bytes[static_cast<size_t>(4 * offset(ib, ih, il, id))], 4);
    return x;
  }
  bertkd::Heads heads() const { return {bytes.data(), dtype, d, l * h * d, d, h * d}; }
  bertkd::Rows rows() const { return {bytes.data(), dtype, d, d}; }
};

struct Case {
  int64_t b, h, l, ds, dt;
  int mask;  // 0 none, 1 right-padded, 2 holes, 3 nothing real
  DType dtype_s, dtype_t;
  int threads;
  int64_t window = -1;

  bool sees(int64_t i, int64_t j) const { return window < 0 || std::llabs(i - j) <= window; }
};

std::vector<uint8_t> make_mask(const Case& c) {
  std::vector<uint8_t> mask(static_cast<size_t>(c.b * c.l), 1);
  for (int64_t b = 0; b < c.b; ++b)
    for (int64_t j = 0; j < c.l; ++j)
      mask[static_cast<size_t>(b * c.l + j)] = c.mask == 0 || (c.mask == 1   ? j <= c.l / 2
                                                               : c.mask == 2 ? (j + b) % 3 != 1
                                                                             : false);
  return mask;
}

double dot(const Tensor& x, const Tensor& y, int64_t b, int64_t h, int64_t i, int64_t j) {
  double sum = 0;
  for (int64_t d = 0; d < x.d; ++d) sum += x.at(b, h, i, d) * y.at(b, h, j, d);
  return sum;
}

// relation_kl, self_relation_kl (b = a) and attention_mse against the plain
// definition.
void run_attention(const Case& c, const char* op) {
  const bool mse = std::strcmp(op, "attention_mse") == 0;
  const bool self = std::strcmp(op, "self_relation_kl") == 0;
  ++cases;
  const Tensor a_s(c.b, c.h, c.l, c.ds, c.dtype_s), a_t(c.b, c.h, c.l, c.dt, c.dtype_t);
  const Tensor k_s(c.b, c.h, c.l, c.ds, c.dtype_s), k_t(c.b, c.h, c.l, c.dt, c.dtype_t);
  const Tensor &b_s = self ? a_s : k_s, &b_t = self ? a_t : k_t;
  Tensor grad_a = a_s, grad_b = b_s;
  const std::vector<uint8_t> mask = make_mask(c);
  std::vector<float> weights(static_cast<size_t>(c.b * c.h * c.l));
  for (size_t i = 0; i < weights.size(); ++i)
    weights[i] = i % 5 == 2 ? 0.f : 0.01f * static_cast<float>(i % 7);
  std::vector<float> rows(weights.size());
  float loss = -1.f;
  bertkd::Attention args = {};
  args.batch = c.b, args.heads = c.h, args.length = c.l, args.threads = c.threads;
  args.a_s = a_s.heads(), args.b_s = b_s.heads(), args.a_t = a_t.heads(), args.b_t = b_t.heads();
  if (c.mask) args.mask = {mask.data(), c.l, 1};
  args.window = c.window, args.scale_s = 0.3f, args.scale_t = 0.2f;
  auto run = mse ? bertkd::attention_mse : self ? bertkd::self_relation_kl : bertkd::relation_kl;
  args.rows = rows.data();
  run(args);
  args.weights = {weights.data(), c.h * c.l, c.l, 1};
  args.loss = &loss, args.grad_a = grad_a.heads(), args.grad_b = grad_b.heads();
  run(args);

  double total = 0, sizes = 0;
  std::vector<double> want_a(a_s.values.size()), want_b(b_s.values.size());
  const auto n = static_cast<size_t>(c.l);
  for (int64_t b = 0; b < c.b; ++b)
    for (int64_t h = 0; h < c.h; ++h)
      for (int64_t i = 0; i < c.l; ++i) {
        std::vector<double> s(n), t(n), slope(n);
        double high_s = -1e300, high_t = -1e300, sum_s = 0, sum_t = 0, row = 0;
        const auto compares = [&](int64_t j) {
          return mask[static_cast<size_t>(b * c.l + j)] && c.sees(i, j);
        };
        for (int64_t j = 0; j < c.l; ++j) {
          if (!compares(j)) continue;
          const auto at = static_cast<size_t>(j);
          s[at] = 0.3 * dot(a_s, b_s, b, h, i, j), t[at] = 0.2 * dot(a_t, b_t, b, h, i, j);
          high_s = std::fmax(high_s, s[at]), high_t = std::fmax(high_t, t[at]);
        }
        for (int64_t j = 0; j < c.l; ++j)
          if (compares(j)) {
            sum_s += std::exp(s[static_cast<size_t>(j)] - high_s);
            sum_t += std::exp(t[static_cast<size_t>(j)] - high_t);
          }
        for (int64_t j = 0; j < c.l; ++j) {
          if (!compares(j)) continue;
          const auto at = static_cast<size_t>(j);
          const double log_s = s[at] - high_s - std::log(sum_s);
          const double log_t = t[at] - high_t - std::log(sum_t);
          row += mse ? (s[at] - t[at]) * (s[at] - t[at]) : std::exp(log_t) * (log_t - log_s);
          slope[at] = mse ? 2 * (s[at] - t[at]) : std::exp(log_s) - std::exp(log_t);
        }
        const auto index = static_cast<size_t>((b * c.h + h) * c.l + i);
        expect("row", rows[index], row, row);
        const double w = weights[index];
        total += w * row, sizes += std::fabs(w * row);
        for (int64_t j = 0; j < c.l; ++j)
          for (int64_t d = 0; d < c.ds; ++d) {
            const double g = 0.3 * w * slope[static_cast<size_t>(j)];
            want_a[static_cast<size_t>(a_s.offset(b, h, i, d))] += g * b_s.at(b, h, j, d);
            auto& other = self ? want_a : want_b;
            other[static_cast<size_t>(a_s.offset(b, h, j, d))] += g * a_s.at(b, h, i, d);
          }
      }
  expect("loss", loss, total, sizes);
  if (c.dtype_s != DType::kFloat32) return;
  for (int64_t b = 0; b < c.b; ++b)
    for (int64_t h = 0; h < c.h; ++h)
      for (int64_t i = 0; i < c.l; ++i)
        for (int64_t d = 0; d < c.ds; ++d) {
          const auto at = static_cast<size_t>(a_s.offset(b, h, i, d));
          expect("grad_a", grad_a.written(b, h, i, d), want_a[at], 1 + std::fabs(want_a[at]));
          if (!self)
            expect("grad_b", grad_b.written(b, h, i, d), want_b[at], 1 + std::fabs(want_b[at]));
        }
}

// self_attention against the plain definition; with dropout, whose choice only
// the kernel knows, the sum over what it returns: grad_v summed over keys is
// grad_out summed over the kept weights.
void run_self_attention(const Case& c, float dropout) {
  ++cases;
  const Tensor q(c.b, c.h, c.l, c.ds, c.dtype_s), k(c.b, c.h, c.l, c.ds, c.dtype_s);
  const Tensor v(c.b, c.h, c.l, c.ds, c.dtype_t), grad_out(c.b, c.h, c.l, c.ds, c.dtype_s);
  Tensor out(c.b, c.h, c.l, c.ds, DType::kFloat32), grad_q = q, grad_k = k, grad_v = v;
  const std::vector<uint8_t> mask = make_mask(c);
  std::vector<float> stats(static_cast<size_t>(2 * c.b * c.h * c.l));
  bertkd::SelfAttention args = {};
  args.batch = c.b, args.heads = c.h, args.length = c.l, args.threads = c.threads;
  args.q = q.heads(), args.k = k.heads(), args.v = v.heads(), args.out = out.heads();
  if (c.mask) args.mask = {mask.data(), c.l, 1};
  args.window = c.window;
  args.scale = 0.3f, args.dropout = dropout, args.seed = 7, args.stats = stats.data();
  bertkd::self_attention(args);
  args.grad_out = grad_out.heads(), args.grad_q = grad_q.heads();
  args.grad_k = grad_k.heads(), args.grad_v = grad_v.heads();
  bertkd::self_attention(args);

  std::vector<double> want_q(q.values.size()), want_k(q.values.size()), want_v(q.values.size());
  for (int64_t b = 0; b < c.b; ++b)
    for (int64_t h = 0; h < c.h; ++h) {
      double got_sum = 0, want_sum = 0, size = 1;
      for (int64_t i = 0; i < c.l; ++i) {
        std::vector<double> p(static_cast<size_t>(c.l)), slope(p.size());
        double sum = 0, mean = 0;
        for (int64_t j = 0; j < c.l; ++j)
          if (mask[static_cast<size_t>(b * c.l + j)] && c.sees(i, j))
            sum += p[static_cast<size_t>(j)] = std::exp(0.3 * dot(q, k, b, h, i, j));
        for (int64_t j = 0; j < c.l && sum > 0; ++j) {
          const auto at = static_cast<size_t>(j);
          p[at] /= sum, slope[at] = dot(grad_out, v, b, h, i, j), mean += p[at] * slope[at];
        }
        for (int64_t d = 0; d < c.ds; ++d) {
          double want = 0;
          for (int64_t j = 0; j < c.l; ++j) {
            const auto at = static_cast<size_t>(j);
            const double g = 0.3 * p[at] * (slope[at] - mean);
            want += p[at] * v.at(b, h, j, d);
            want_q[static_cast<size_t>(q.offset(b, h, i, d))] += g * k.at(b, h, j, d);
            want_k[static_cast<size_t>(q.offset(b, h, j, d))] += g * q.at(b, h, i, d);
            want_v[static_cast<size_t>(q.offset(b, h, j, d))] += p[at] * grad_out.at(b, h, i, d);
          }
          const double got = out.written(b, h, i, d);
          if (dropout == 0.f) expect("out", got, want, 1);
          // <out, grad_out> is <v, grad_v>, whatever was dropped.
          got_sum += got * grad_out.at(b, h, i, d), size += std::fabs(want);
        }
      }
      if (c.dtype_t != DType::kFloat32) continue;
      for (int64_t j = 0; j < c.l; ++j)
        for (int64_t d = 0; d < c.ds; ++d)
          want_sum += grad_v.written(b, h, j, d) * v.at(b, h, j, d);
      expect("sum with dropout", got_sum, want_sum, size);
    }
  if (dropout > 0.f || c.dtype_s != DType::kFloat32 || c.dtype_t != DType::kFloat32) return;
  for (size_t i = 0; i < want_q.size(); ++i) {
    float got[3];
    std::memcpy(&got[0], &grad_q.bytes[4 * i], 4);
    std::memcpy(&got[1], &grad_k.bytes[4 * i], 4);
    std::memcpy(&got[2], &grad_v.bytes[4 * i], 4);
    expect("grad_q", got[0], want_q[i], 1 + std::fabs(want_q[i]));
    expect("grad_k", got[1], want_k[i], 1 + std::fabs(want_k[i]));
    expect("grad_v", got[2], want_v[i], 1 + std::fabs(want_v[i]));
  }
}

void run_rows(int64_t rows, int64_t width, DType dtype_s, DType dtype_t, int threads) {
  ++cases;
  const Tensor s(1, 1, rows, width, dtype_s), t(1, 1, rows, width, dtype_t);
  Tensor grad = s;
  std::vector<float> weights(static_cast<size_t>(rows)), out(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) weights[i] = i % 3 == 1 ? 0.f : 0.5f;
  float loss = -1.f, state_loss = -1.f;
  bertkd::SoftmaxKl args = {};
  args.rows = rows, args.student = s.rows(), args.teacher = t.rows(), args.temperature = 1.5f;
  args.out_rows = out.data(), args.threads = threads;
  bertkd::softmax_kl(args);
  args.weights = weights.data(), args.stride_w = 1, args.loss = &loss, args.grad = grad.rows();
  bertkd::softmax_kl(args);
  double total = 0, squares = 0;
  for (int64_t i = 0; i < rows; ++i) {
    double sum_s = 0, sum_t = 0, row = 0;
    for (int64_t j = 0; j < width; ++j) {
      sum_s += std::exp(s.at(0, 0, i, j) / 1.5), sum_t += std::exp(t.at(0, 0, i, j) / 1.5);
    }
    const double w = weights[static_cast<size_t>(i)];
    for (int64_t j = 0; j < width; ++j) {
      const double x = s.at(0, 0, i, j), y = t.at(0, 0, i, j);
      const double log_s = x / 1.5 - std::log(sum_s), log_t = y / 1.5 - std::log(sum_t);
      row += std::exp(log_t) * (log_t - log_s);
      squares += w * (x - y) * (x - y);
      if (dtype_s == DType::kFloat32)
        expect("logit gradient", grad.written(0, 0, i, j),
               w / 1.5 * (std::exp(log_s) - std::exp(log_t)), 1);
    }
    expect("logit row", out[static_cast<size_t>(i)], row, row);
    total += w * row;
  }
  expect("logit loss", loss, total, total);
  const bertkd::Rows student[] = {s.rows(), s.rows()}, teacher[] = {t.rows(), t.rows()};
  Tensor second = grad;
  const bertkd::Rows grads[] = {grad.rows(), second.rows()};
  bertkd::hidden_mse({2, rows, student, teacher, grads, weights.data(), 1, &state_loss, threads});
  expect("state loss", state_loss, 2 * squares, squares);
  bertkd::hidden_mse({2, rows, student, teacher, nullptr, weights.data(), 1, &state_loss, threads});
  expect("state loss alone", state_loss, 2 * squares, squares);
  if (dtype_s != DType::kFloat32) return;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < width; ++j)
      expect("state gradient", second.written(0, 0, i, j),
             2. * weights[static_cast<size_t>(i)] * (s.at(0, 0, i, j) - t.at(0, 0, i, j)), 1);
}

void run_all() {
  const DType f32 = DType::kFloat32, f16 = DType::kFloat16, bf16 = DType::kBFloat16;
  const DType pairs[][2] = {{f32, f32}, {f16, f32}, {bf16, f16}, {f32, bf16}};
  const int64_t lengths[] = {1, 5, 16, 17, 33, 130},
                widths[][2] = {{1, 1}, {7, 7}, {16, 33}, {64, 64}};
  int turn = 0;
  for (const char* op : {"relation_kl", "self_relation_kl", "attention_mse"}) {
    for (int64_t l : lengths)
      for (const auto& w : widths)
        for (int mask = 0; mask < 4; ++mask, ++turn)
          run_attention({1 + turn % 2, 1 + turn % 3, l, w[0], w[1], mask, pairs[turn % 4][0],
                         pairs[turn % 4][1], 1 + turn % 2},
                        op);
    // One head on two threads; rows too long for one block; Gram matrices in
    // several slices.
    run_attention({1, 1, 300, 8, 8, 2, f32, f32, 2}, op);
    run_attention({1, 1, 700, 3, 4, 0, f32, bf16, 2}, op);
    for (int64_t window : {0, 3, 16, 60, 1000})
      for (int mask = 0; mask < 4; ++mask, ++turn)
        run_attention({1 + turn % 2, 1, 40 + 50 * (turn % 3), 8, 8 + turn % 2, mask, f32, bf16,
                       1 + turn % 2, window},
                      op);
  }
  for (int64_t l : lengths)
    for (const auto& w : widths)
      for (int mask = 0; mask < 4; ++mask, ++turn)
        run_self_attention({1 + turn % 2, 1 + turn % 3, l, w[1], 0, mask, pairs[turn % 4][0],
                            pairs[turn % 4][1], 1 + turn % 2},
                           turn % 3 ? 0.f : 0.25f);
  run_self_attention({1, 2, 300, 8, 0, 2, f32, f32, 2}, 0.f);
  for (int64_t window : {0, 3, 16, 60, 1000})
    for (int mask = 0; mask < 4; ++mask, ++turn)
      run_self_attention(
          {1 + turn % 2, 1, 40 + 50 * (turn % 3), 8, 0, mask, f32, f32, 1 + turn % 2, window},
          turn % 2 ? 0.f : 0.25f);
  for (int64_t rows : {1, 3, 70})
    for (int64_t width : {1, 6, 16, 31, 515, 1100})
      for (const auto& p : pairs) run_rows(rows, width, p[0], p[1], 1 + turn++ % 2);
  for (int64_t count = 0; count < 40; ++count) {
    std::vector<float> x(static_cast<size_t>(count), -1.f), y(x.size());
    bertkd::exp2(x.data(), y.data(), count);
    for (float value : y) expect("exp2", value, 0.5, 1);
  }
}

}  // namespace

// The instruction sets to run, separated by commas; without any all that this processor has.
int main(int argc, char** argv) {
  const char* wanted = argc > 1 ? argv[1] : bertkd::cpu_isas();
  std::vector<char> names(wanted, wanted + std::strlen(wanted) + 1);
  for (char* name = std::strtok(names.data(), ","); name; name = std::strtok(nullptr, ",")) {
    cases = 0;
    bertkd::select_cpu_isa(name);
    run_all();
    std::printf("%s: %d cases\n", name, cases);
  }
}
