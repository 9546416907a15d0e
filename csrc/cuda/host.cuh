// The host's side of a launch: argument checks, errors of CUDA as exceptions, limits of the device.
#pragma once

#include <mutex>
#include <stdexcept>
#include <string>

#include "bertkd_cuda.h"
#include "device.cuh"

namespace bertkd::cuda {

inline void require(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument(message);
}

inline void require_workspace(const Launch& launch, int64_t floats) {
  require(floats == 0 || (launch.workspace != nullptr && launch.workspace_size >= floats),
          "workspace has " + std::to_string(launch.workspace_size) + " floats, needs " +
              std::to_string(floats));
}

inline int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

inline void require_dtype(const char* name, DType dtype) {
  require(dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16,
          std::string(name) + " has unknown dtype " + std::to_string(static_cast<int>(dtype)) +
              " (0 fp32, 1 fp16, 2 bf16)");
}

inline bool is_aligned(const void* p, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

// A matrix whose elements lie where their dtype wants them.
inline void require_rows(const char* name, const Rows& x, int64_t width) {
  require_dtype(name, x.dtype);
  require(x.width == width, std::string(name) + " has width " + std::to_string(x.width) +
                                ", expected " + std::to_string(width));
  require(x.data != nullptr, std::string(name) + " has no data");
  require(is_aligned(x.data, size_of(x.dtype)), std::string(name) + " is not aligned to its dtype");
  require(x.stride >= 0, std::string(name) + " has a negative row stride");
}

#ifndef BERTKD_EMULATE
inline std::string remedy(cudaError_t error) {
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction)
    return " This build has no code for this GPU: reinstall with BERTKD_CUDA_ARCHS set to its "
           "architecture.";
  if (error == cudaErrorInsufficientDriver)
    return " The driver is older than the CUDA toolkit this was built with: update it, or build "
           "with an older nvcc.";
  return " It may come from a kernel launched earlier; CUDA_LAUNCH_BLOCKING=1 tells.";
}

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  // Errors of a launch are sticky: read, so that the next call does not report this one again.
  cudaGetLastError();
  throw std::runtime_error(std::string(what) + ": CUDA error " + cudaGetErrorName(error) + " (" +
                           cudaGetErrorString(error) + ")." + remedy(error));
}

inline int64_t shared_limit() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return shared_limit(device);
}

template <class Params>
void launch_kernel(const char* name, void (*kernel)(Params), dim3 grid, int threads, int64_t shared,
                   void* stream, Params params) {
  const void* function = reinterpret_cast<const void*>(kernel);
  // More than 48 KiB has to be asked for, on every device anew. Threads do so one after the other:
  // what one asks for must not be lowered by another before its launch.
  static std::mutex asking;
  std::lock_guard<std::mutex> lock(asking);
  if (shared > 48 * 1024) {
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared)),
          name);
  }
  void* arguments[] = {&params};
  check(cudaLaunchKernel(function, grid, dim3(threads), arguments, static_cast<size_t>(shared),
                         static_cast<cudaStream_t>(stream)),
        name);
}
#endif

// out[0] = sum of `count` floats in a fixed order, by one block.
void sum_partials(const float* partials, int64_t count, float* out, void* stream);

// Adds the values of a warp; every lane gets the sum.
__device__ __forceinline__ float warp_sum(float x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x += shuffle_xor(x, lanes);
  return x;
}

}  // namespace bertkd::cuda
