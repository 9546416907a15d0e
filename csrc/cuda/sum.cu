// The last step of every loss: partial sums, one float per block or row, added in a fixed order.
#include "host.cuh"

namespace bertkd::cuda {

namespace {

constexpr int kThreads = 1024;

struct SumParams {
  const float* partials;
  int64_t count;
  float* out;
};

__global__ void __launch_bounds__(kThreads) sum_kernel(const BERTKD_GRID_CONSTANT SumParams p) {
  BERTKD_SHARED(memory);
  float* of_warp = reinterpret_cast<float*>(memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < p.count; i += blockDim.x) sum += p.partials[i];
  sum = warp_sum(sum);
  if (lane == 0) of_warp[warp] = sum;
  sync_block();
  if (warp == 0) {
    sum = warp_sum(lane < static_cast<int>(blockDim.x) / 32 ? of_warp[lane] : 0.0f);
    if (lane == 0) p.out[0] = sum;
  }
}

}  // namespace

void sum_partials(const float* partials, int64_t count, float* out, void* stream) {
  // The number of threads depends on the count alone, so the order of the additions does too.
  const int threads = count > 256 ? kThreads : 128;
  launch_kernel("sum_kernel", sum_kernel, dim3(1), threads, kThreads / 32 * 4, stream,
                SumParams{partials, count, out});
}

#ifndef BERTKD_EMULATE
int64_t shared_limit(int device) {
  int bytes = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDeviceGetAttribute");
  return bytes;
}

int runtime_version() {
  int version = 0;
  check(cudaRuntimeGetVersion(&version), "cudaRuntimeGetVersion");
  return version;
}

int driver_version() {
  int version = 0;
  check(cudaDriverGetVersion(&version), "cudaDriverGetVersion");
  return version;
}
#endif

}  // namespace bertkd::cuda
