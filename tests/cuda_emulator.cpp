// The CUDA kernels, emulated, as a Python module with the functions of bertkd._C, and the block's
// layout for a test.
#include "cuda_emulator.h"

#include <pybind11/pybind11.h>

#include "cuda/bertkd_cuda.h"
#include "cuda/relation_layout.h"

void bind_cuda(pybind11::module_& module);

int64_t bertkd::cuda::shared_limit(int) { return emulator::shared_limit(); }
int bertkd::cuda::runtime_version() { return 13000; }
int bertkd::cuda::driver_version() { return 13000; }

pybind11::dict layout(int length, int width_s, int width_t, bool self, bool backward) {
  const auto at = bertkd::cuda::make_layout(length, width_s, width_t, self, backward);
  pybind11::dict out;
  out["rows"] = at.rows, out["stride_s"] = at.stride_s, out["stride_t"] = at.stride_t,
  out["stride_d"] = at.stride_d;
  out["student_keys"] = at.student_keys, out["teacher"] = at.teacher, out["weights"] = at.weights;
  out["max_weight"] = at.max_weight, out["real"] = at.real, out["total"] = at.total;
  return out;
}

PYBIND11_MODULE(bertkd_emulated, module) {
  bind_cuda(module);
  module.def("layout", &layout);
}
