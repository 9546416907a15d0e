// The submodule bertkd._C.cuda: bindings.cpp's tuples of addresses, plus the stream and a
// workspace.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "cuda/bertkd_cuda.h"

namespace py = pybind11;

namespace {

using HeadsTuple = std::tuple<uint64_t, int32_t, int64_t, std::array<int64_t, 3>>;
using RowsTuple = std::tuple<uint64_t, int32_t, int64_t, int64_t>;
using MaskTuple = std::tuple<uint64_t, std::array<int64_t, 2>>;
using WeightsTuple = std::tuple<uint64_t, std::array<int64_t, 3>>;
using VectorTuple = std::tuple<uint64_t, int64_t>;
// Stream, workspace, its size in floats.
using LaunchTuple = std::tuple<uint64_t, uint64_t, int64_t>;
using Shape = std::array<int64_t, 3>;

template <class T>
T* pointer(uint64_t address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
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

bertkd::cuda::Launch launch(const LaunchTuple& x) {
  const auto& [stream, workspace, size] = x;
  return {pointer<void>(stream), pointer<float>(workspace), size};
}

bertkd::Attention attention(const Shape& shape, const HeadsTuple& a_s, const HeadsTuple& b_s,
                            const HeadsTuple& a_t, const HeadsTuple& b_t,
                            const std::optional<MaskTuple>& mask, float scale_s, float scale_t) {
  bertkd::Attention args = {};
  args.batch = shape[0], args.heads = shape[1], args.length = shape[2];
  args.a_s = heads(a_s), args.b_s = heads(b_s), args.a_t = heads(a_t), args.b_t = heads(b_t);
  if (mask) {
    const auto& [address, strides] = *mask;
    args.mask = {pointer<const uint8_t>(address), strides[0], strides[1]};
  }
  args.scale_s = scale_s, args.scale_t = scale_t;
  return args;
}

using AttentionOp = void (*)(const bertkd::Attention&, const bertkd::cuda::Launch&);

template <AttentionOp run>
void attention_rows(const Shape& shape, const HeadsTuple& a_s, const HeadsTuple& b_s,
                    const HeadsTuple& a_t, const HeadsTuple& b_t,
                    const std::optional<MaskTuple>& mask, float scale_s, float scale_t,
                    uint64_t out, const LaunchTuple& where) {
  auto args = attention(shape, a_s, b_s, a_t, b_t, mask, scale_s, scale_t);
  args.rows = pointer<float>(out);
  const auto to = launch(where);
  py::gil_scoped_release unlocked;
  run(args, to);
}

template <AttentionOp run>
void attention_fwd_bwd(const Shape& shape, const WeightsTuple& row_weight, const HeadsTuple& a_s,
                       const HeadsTuple& b_s, const HeadsTuple& a_t, const HeadsTuple& b_t,
                       const std::optional<MaskTuple>& mask, float scale_s, float scale_t,
                       uint64_t loss, const HeadsTuple& grad_a, const HeadsTuple& grad_b,
                       const LaunchTuple& where) {
  auto args = attention(shape, a_s, b_s, a_t, b_t, mask, scale_s, scale_t);
  const auto& [address, strides] = row_weight;
  if (address == 0) throw std::invalid_argument("row_weight has no data");
  args.weights = {pointer<const float>(address), strides[0], strides[1], strides[2]};
  args.loss = pointer<float>(loss);
  args.grad_a = heads(grad_a), args.grad_b = heads(grad_b);
  const auto to = launch(where);
  py::gil_scoped_release unlocked;
  run(args, to);
}

void hidden_mse(int64_t count, const VectorTuple& row_weight, const std::vector<RowsTuple>& student,
                const std::vector<RowsTuple>& teacher, const std::vector<RowsTuple>& grad,
                uint64_t loss, const LaunchTuple& where) {
  if (student.size() != teacher.size() || (!grad.empty() && student.size() != grad.size()))
    throw std::invalid_argument(
        "student and teacher must be lists of one length, and grad too or empty");
  std::vector<bertkd::Rows> all;
  for (const auto* side : {&student, &teacher, &grad})
    for (const auto& x : *side) all.push_back(rows(x));
  const auto states = static_cast<int64_t>(student.size());
  bertkd::HiddenMse args = {};
  args.states = states, args.rows = count;
  args.student = all.data(), args.teacher = all.data() + states,
  args.grad = grad.empty() ? nullptr : all.data() + 2 * states;
  args.weights = pointer<const float>(std::get<0>(row_weight)),
  args.stride_w = std::get<1>(row_weight);
  args.loss = pointer<float>(loss);
  const auto to = launch(where);
  py::gil_scoped_release unlocked;
  bertkd::cuda::hidden_mse(args, to);
}

void softmax_kl_rows(int64_t count, const RowsTuple& z_s, const RowsTuple& z_t, float temperature,
                     uint64_t out, const LaunchTuple& where) {
  bertkd::SoftmaxKl args = {};
  args.rows = count, args.student = rows(z_s), args.teacher = rows(z_t),
  args.temperature = temperature;
  args.out_rows = pointer<float>(out);
  const auto to = launch(where);
  py::gil_scoped_release unlocked;
  bertkd::cuda::softmax_kl(args, to);
}

void softmax_kl_fwd_bwd(int64_t count, const VectorTuple& row_weight, const RowsTuple& z_s,
                        const RowsTuple& z_t, float temperature, uint64_t loss,
                        const RowsTuple& grad, const LaunchTuple& where) {
  bertkd::SoftmaxKl args = {};
  args.rows = count, args.student = rows(z_s), args.teacher = rows(z_t),
  args.temperature = temperature;
  args.weights = pointer<const float>(std::get<0>(row_weight)),
  args.stride_w = std::get<1>(row_weight);
  if (args.weights == nullptr) throw std::invalid_argument("row_weight has no data");
  args.loss = pointer<float>(loss), args.grad = rows(grad);
  const auto to = launch(where);
  py::gil_scoped_release unlocked;
  bertkd::cuda::softmax_kl(args, to);
}

}  // namespace

void bind_cuda(py::module_& parent) {
  namespace cuda = bertkd::cuda;
  py::module_ m = parent.def_submodule(
      "cuda", "CUDA kernels. See csrc/cuda/bertkd_cuda.h; called by bertkd.ops.cuda.");
  m.def("relation_kl_rows", &attention_rows<cuda::relation_kl>);
  m.def("relation_kl_fwd_bwd", &attention_fwd_bwd<cuda::relation_kl>);
  m.def("self_relation_kl_rows", &attention_rows<cuda::self_relation_kl>);
  m.def("self_relation_kl_fwd_bwd", &attention_fwd_bwd<cuda::self_relation_kl>);
  m.def("hidden_mse", &hidden_mse);
  m.def("softmax_kl_rows", &softmax_kl_rows);
  m.def("softmax_kl_fwd_bwd", &softmax_kl_fwd_bwd);
  m.def("relation_kl_workspace", &cuda::relation_kl_workspace);
  m.def("softmax_kl_workspace", &cuda::softmax_kl_workspace);
  m.def("hidden_mse_workspace", &cuda::hidden_mse_workspace);
  m.def("relation_kl_shared_bytes", &cuda::relation_kl_shared_bytes);
  m.def("shared_limit", &cuda::shared_limit);
  m.def("runtime_version", &cuda::runtime_version);
  m.def("driver_version", &cuda::driver_version);
}
