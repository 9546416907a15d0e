// pybind11 module bertkd._C: addresses and sizes in, exceptions out, the interpreter's lock
// released meanwhile.
//
// A tensor crosses as the tuple (address, dtype code, width, strides without the last, in
// elements); a mask or a weight as (address, strides). Nothing here knows torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bertkd.h"

namespace py = pybind11;

#if defined(BERTKD_WITH_CUDA)
void bind_cuda(py::module_& module);
#endif

namespace {

using HeadsTuple = std::tuple<int64_t, int32_t, int64_t, std::array<int64_t, 3>>;
using RowsTuple = std::tuple<int64_t, int32_t, int64_t, int64_t>;
using MaskTuple = std::tuple<int64_t, std::array<int64_t, 2>>;
using WeightsTuple = std::tuple<int64_t, std::array<int64_t, 3>>;
using Shape = std::array<int64_t, 3>;

template <class T>
T* pointer(int64_t address) {
  if (address < 0)
    throw std::invalid_argument("an address is negative: " + std::to_string(address) + ".");
  return reinterpret_cast<T*>(address);
}

bertkd::Heads heads(const HeadsTuple& x) {
  const auto& [address, dtype, width, strides] = x;
  return {pointer<const void>(address),
          static_cast<bertkd::DType>(dtype),
          width,
          strides[0],
          strides[1],
          strides[2]};
}

bertkd::Rows rows(const RowsTuple& x) {
  const auto& [address, dtype, width, stride] = x;
  return {pointer<const void>(address), static_cast<bertkd::DType>(dtype), width, stride};
}

bertkd::Mask key_mask(const std::optional<MaskTuple>& mask) {
  if (!mask) return {};
  const auto& [address, strides] = *mask;
  if (address == 0) throw std::invalid_argument("mask is null. Pass None for no mask.");
  return {pointer<const uint8_t>(address), strides[0], strides[1]};
}

bertkd::Attention attention(const Shape& shape, const HeadsTuple& a_s, const HeadsTuple& b_s,
                            const HeadsTuple& a_t, const HeadsTuple& b_t,
                            const std::optional<MaskTuple>& mask, float scale_s, float scale_t,
                            int threads, int64_t window) {
  bertkd::Attention args = {};
  args.batch = shape[0], args.heads = shape[1], args.length = shape[2];
  args.a_s = heads(a_s), args.b_s = heads(b_s), args.a_t = heads(a_t), args.b_t = heads(b_t);
  args.mask = key_mask(mask), args.window = window;
  args.scale_s = scale_s, args.scale_t = scale_t, args.threads = threads;
  return args;
}

using AttentionOp = void (*)(const bertkd::Attention&);

// Both forms of an attention op, as <name>_rows and <name>_fwd_bwd.
void bind_attention(py::module_& module, const std::string& name, AttentionOp run) {
  module.def(
      (name + "_rows").c_str(),
      [run](const Shape& shape, const HeadsTuple& a_s, const HeadsTuple& b_s, const HeadsTuple& a_t,
            const HeadsTuple& b_t, const std::optional<MaskTuple>& mask, float scale_s,
            float scale_t, int64_t rows, int threads, int64_t window) {
        auto args = attention(shape, a_s, b_s, a_t, b_t, mask, scale_s, scale_t, threads, window);
        args.rows = pointer<float>(rows);
        py::gil_scoped_release unlocked;
        run(args);
      },
      py::arg("shape"), py::arg("a_s"), py::arg("b_s"), py::arg("a_t"), py::arg("b_t"),
      py::arg("mask"), py::arg("scale_s"), py::arg("scale_t"), py::arg("rows"), py::arg("threads"),
      py::arg("window") = -1,
      "Losses of all rows, to fp32 (B, H, L) at the address `rows`.");
  module.def(
      (name + "_fwd_bwd").c_str(),
      [run](const Shape& shape, const WeightsTuple& row_weight, const HeadsTuple& a_s,
            const HeadsTuple& b_s, const HeadsTuple& a_t, const HeadsTuple& b_t,
            const std::optional<MaskTuple>& mask, float scale_s, float scale_t, int64_t loss,
            const HeadsTuple& grad_a, const HeadsTuple& grad_b, int threads, int64_t window) {
        auto args = attention(shape, a_s, b_s, a_t, b_t, mask, scale_s, scale_t, threads, window);
        const auto& [address, strides] = row_weight;
        if (address == 0) throw std::invalid_argument("row_weight is null.");
        args.weights = {pointer<const float>(address), strides[0], strides[1], strides[2]};
        args.loss = pointer<float>(loss);
        args.grad_a = heads(grad_a), args.grad_b = heads(grad_b);
        py::gil_scoped_release unlocked;
        run(args);
      },
      py::arg("shape"), py::arg("row_weight"), py::arg("a_s"), py::arg("b_s"), py::arg("a_t"),
      py::arg("b_t"), py::arg("mask"), py::arg("scale_s"), py::arg("scale_t"), py::arg("loss"),
      py::arg("grad_a"), py::arg("grad_b"), py::arg("threads"), py::arg("window") = -1,
      "Weighted sum of the rows, to fp32 at the address `loss`, and the gradients of a_s and b_s.");
}

bertkd::SelfAttention self_attention(const Shape& shape, const HeadsTuple& q, const HeadsTuple& k,
                                     const HeadsTuple& v, const std::optional<MaskTuple>& mask,
                                     float scale, float dropout, int64_t seed,
                                     const HeadsTuple& out, int64_t stats, int threads,
                                     int64_t window) {
  bertkd::SelfAttention args = {};
  args.batch = shape[0], args.heads = shape[1], args.length = shape[2];
  args.q = heads(q), args.k = heads(k), args.v = heads(v), args.out = heads(out);
  args.mask = key_mask(mask), args.window = window;
  args.scale = scale, args.dropout = dropout, args.seed = static_cast<uint64_t>(seed);
  args.stats = pointer<float>(stats), args.threads = threads;
  return args;
}

void self_attention_fwd(const Shape& shape, const HeadsTuple& q, const HeadsTuple& k,
                        const HeadsTuple& v, const std::optional<MaskTuple>& mask, float scale,
                        float dropout, int64_t seed, const HeadsTuple& out, int64_t stats,
                        int threads, int64_t window) {
  const auto args =
      self_attention(shape, q, k, v, mask, scale, dropout, seed, out, stats, threads, window);
  py::gil_scoped_release unlocked;
  bertkd::self_attention(args);
}

void self_attention_bwd(const Shape& shape, const HeadsTuple& grad_out, const HeadsTuple& q,
                        const HeadsTuple& k, const HeadsTuple& v,
                        const std::optional<MaskTuple>& mask, float scale, float dropout,
                        int64_t seed, const HeadsTuple& out, int64_t stats,
                        const HeadsTuple& grad_q, const HeadsTuple& grad_k,
                        const HeadsTuple& grad_v, int threads, int64_t window) {
  auto args =
      self_attention(shape, q, k, v, mask, scale, dropout, seed, out, stats, threads, window);
  args.grad_out = heads(grad_out), args.grad_q = heads(grad_q);
  args.grad_k = heads(grad_k), args.grad_v = heads(grad_v);
  // Without one the forward would run, and write where it must not.
  if (args.grad_out.data == nullptr)
    throw std::invalid_argument("self_attention: grad_out is null.");
  py::gil_scoped_release unlocked;
  bertkd::self_attention(args);
}

void hidden_mse(int64_t count, std::pair<int64_t, int64_t> row_weight,
                const std::vector<RowsTuple>& student, const std::vector<RowsTuple>& teacher,
                const std::vector<RowsTuple>& grad, int64_t loss, int threads) {
  if (student.size() != teacher.size() || (!grad.empty() && student.size() != grad.size()))
    throw std::invalid_argument(
        "hidden_mse: h_s and h_t must be lists of one length, and grad too or empty.");
  std::vector<bertkd::Rows> all;
  for (const auto* side : {&student, &teacher, &grad})
    for (const auto& x : *side) all.push_back(rows(x));
  const auto states = static_cast<int64_t>(student.size());
  const bertkd::HiddenMse args = {states,
                                  count,
                                  all.data(),
                                  all.data() + states,
                                  grad.empty() ? nullptr : all.data() + 2 * states,
                                  pointer<const float>(row_weight.first),
                                  row_weight.second,
                                  pointer<float>(loss),
                                  threads};
  py::gil_scoped_release unlocked;
  bertkd::hidden_mse(args);
}

void softmax_kl_rows(int64_t count, const RowsTuple& z_s, const RowsTuple& z_t, float temperature,
                     int64_t out, int threads) {
  bertkd::SoftmaxKl args = {};
  args.rows = count, args.student = rows(z_s), args.teacher = rows(z_t);
  args.temperature = temperature, args.out_rows = pointer<float>(out), args.threads = threads;
  py::gil_scoped_release unlocked;
  bertkd::softmax_kl(args);
}

void softmax_kl_fwd_bwd(int64_t count, std::pair<int64_t, int64_t> row_weight, const RowsTuple& z_s,
                        const RowsTuple& z_t, float temperature, int64_t loss,
                        const RowsTuple& grad, int threads) {
  bertkd::SoftmaxKl args = {};
  if (row_weight.first == 0) throw std::invalid_argument("softmax_kl: row_weight is null.");
  args.rows = count, args.student = rows(z_s), args.teacher = rows(z_t);
  args.temperature = temperature, args.threads = threads;
  args.weights = pointer<const float>(row_weight.first), args.stride_w = row_weight.second;
  args.loss = pointer<float>(loss), args.grad = rows(grad);
  py::gil_scoped_release unlocked;
  bertkd::softmax_kl(args);
}

void use_large_pages(int64_t data, int64_t bytes) {
  bertkd::use_large_pages(pointer<void>(data), bytes);
}

void run_exp2(int64_t x, int64_t out, int64_t count) {
  bertkd::exp2(pointer<const float>(x), pointer<float>(out), count);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "bertkd's native kernels. See csrc/bertkd.h; called through bertkd.ops.native.";
  bind_attention(module, "relation_kl", bertkd::relation_kl);
  bind_attention(module, "self_relation_kl", bertkd::self_relation_kl);
  bind_attention(module, "attention_mse", bertkd::attention_mse);
  module.def("self_attention_fwd", &self_attention_fwd, py::arg("shape"), py::arg("q"),
             py::arg("k"), py::arg("v"), py::arg("mask"), py::arg("scale"), py::arg("dropout"),
             py::arg("seed"), py::arg("out"), py::arg("stats"), py::arg("threads"),
             py::arg("window") = -1,
             "softmax(scale q k^T) v to `out`, what the backward needs of the rows to fp32 (B, H, "
             "L, 2) at `stats`.");
  module.def("self_attention_bwd", &self_attention_bwd, py::arg("shape"), py::arg("grad_out"),
             py::arg("q"), py::arg("k"), py::arg("v"), py::arg("mask"), py::arg("scale"),
             py::arg("dropout"), py::arg("seed"), py::arg("out"), py::arg("stats"),
             py::arg("grad_q"), py::arg("grad_k"), py::arg("grad_v"), py::arg("threads"),
             py::arg("window") = -1,
             "The gradients of q, k and v from what self_attention_fwd wrote.");
  module.def("hidden_mse", &hidden_mse, py::arg("count"), py::arg("row_weight"), py::arg("h_s"),
             py::arg("h_t"), py::arg("grad"), py::arg("loss"), py::arg("threads"),
             "Weighted sum of the rows of all states, to fp32 at the address `loss`, and the "
             "gradients of h_s; an empty list `grad` leaves them out.");
  module.def("softmax_kl_rows", &softmax_kl_rows, py::arg("count"), py::arg("z_s"), py::arg("z_t"),
             py::arg("temperature"), py::arg("rows"), py::arg("threads"));
  module.def("softmax_kl_fwd_bwd", &softmax_kl_fwd_bwd, py::arg("count"), py::arg("row_weight"),
             py::arg("z_s"), py::arg("z_t"), py::arg("temperature"), py::arg("loss"),
             py::arg("grad"), py::arg("threads"));
  module.def("use_large_pages", &use_large_pages, py::arg("data"), py::arg("bytes"),
             "Ask the system to back fresh memory with large pages.");
  module.def("exp2", &run_exp2, py::arg("x"), py::arg("out"), py::arg("count"));
  module.def("cpu_isa", &bertkd::cpu_isa, "The instruction set in use.");
  module.def("cpu_isas", &bertkd::cpu_isas, "What this build and processor can run, best first.");
  module.def("select_cpu_isa", &bertkd::select_cpu_isa, py::arg("name"));
#if defined(BERTKD_WITH_CUDA)
  bind_cuda(module);
#endif
}
