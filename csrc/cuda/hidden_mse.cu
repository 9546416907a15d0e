// sum_k sum_i w_i |student_k_i - teacher_k_i|^2 and, where asked for, its gradient: all states in
// one launch, everything read once.
#include <algorithm>

#include "chunk.cuh"

namespace bertkd::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
// The states' addresses travel as kernel parameters, which end at 4 KiB.
constexpr int kStates = 32;
constexpr int64_t kMaxBlocks = 1024;

struct HiddenParams {
  Rows student[kStates], teacher[kStates], grad[kStates];
  const float* weights;
  int64_t stride_w, rows;
  float* partials;
};
static_assert(sizeof(HiddenParams) <= 4096, "kernel parameters end at 4 KiB");

__global__ void __launch_bounds__(kThreads, 2)
    hidden_mse_kernel(const BERTKD_GRID_CONSTANT HiddenParams p) {
  BERTKD_SHARED(memory);
  float* of_warp = reinterpret_cast<float*>(memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, state = blockIdx.y;
  const Rows &student = p.student[state], &teacher = p.teacher[state], &gradient = p.grad[state];
  const bool keeps_gradient = gradient.data != nullptr;
  const int64_t width = student.width;
  float sum = 0.0f;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp; row < p.rows;
       row += static_cast<int64_t>(gridDim.x) * kWarps) {
    const float weight = p.weights[row * p.stride_w];
    const Row s = row_of(student, row), t = row_of(teacher, row), grad = row_of(gradient, row);
    const int lead = lead_of(keeps_gradient ? grad : s);
    const bool vectors = fits_lead(s, lead) && fits_lead(t, lead);
    float of_row = 0.0f;
    for (int64_t chunk = lane; chunk * kChunk < width + lead; chunk += 32) {
      const Span span = span_of(chunk, lead, width);
      float x[kChunk] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f}, y[kChunk];
      if (weight != 0.0f) {
        load_chunk(s, span, vectors, 0.0f, x);
        load_chunk(t, span, vectors, 0.0f, y);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          const float difference = x[i] - y[i];
          of_row += difference * difference;
          x[i] = 2.0f * weight * difference;
        }
      }
      // A pad row is not read, its gradient is 0.
      if (keeps_gradient) store_chunk(grad, span, vectors, x);
    }
    sum += weight * of_row;
  }
  sum = warp_sum(sum);
  if (lane == 0) of_warp[warp] = sum;
  sync_block();
  if (warp == 0) {
    sum = warp_sum(lane < kWarps ? of_warp[lane] : 0.0f);
    if (lane == 0) p.partials[static_cast<int64_t>(state) * gridDim.x + blockIdx.x] = sum;
  }
}

// The same on every GPU: the order of the additions must not depend on where it runs.
int64_t blocks_for(int64_t rows) {
  return std::max<int64_t>(1, std::min<int64_t>(kMaxBlocks, (rows + kWarps - 1) / kWarps));
}

}  // namespace

int64_t hidden_mse_workspace(int64_t states, int64_t rows) { return states * blocks_for(rows); }

void hidden_mse(const HiddenMse& args, const Launch& launch) {
  require(args.states > 0, "there are no states");
  require(args.rows >= 0, "rows must not be negative");
  require(args.loss != nullptr && (args.weights != nullptr || args.rows == 0),
          "loss or weights are missing");
  const int64_t blocks = blocks_for(args.rows);
  require_workspace(launch, hidden_mse_workspace(args.states, args.rows));
  for (int64_t first = 0; first < args.states; first += kStates) {
    const int64_t count = std::min<int64_t>(kStates, args.states - first);
    HiddenParams p{};
    for (int64_t k = 0; k < count && args.rows > 0; ++k) {
      p.student[k] = args.student[first + k];
      p.teacher[k] = args.teacher[first + k];
      require_rows("student", p.student[k], p.student[k].width);
      require_rows("teacher", p.teacher[k], p.student[k].width);
      if (args.grad == nullptr) continue;
      p.grad[k] = args.grad[first + k];
      require_rows("grad", p.grad[k], p.student[k].width);
    }
    p.weights = args.weights;
    p.stride_w = args.stride_w;
    p.rows = args.rows;
    p.partials = launch.workspace + first * blocks;
    launch_kernel("hidden_mse_kernel", hidden_mse_kernel,
                  dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(count)), kThreads,
                  kWarps * 4, launch.stream, p);
  }
  sum_partials(launch.workspace, args.states * blocks, args.loss, launch.stream);
}

}  // namespace bertkd::cuda
