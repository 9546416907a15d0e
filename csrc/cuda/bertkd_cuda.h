// The losses on a GPU. Arguments are those of bertkd.h (`threads` is ignored); addresses are the
// device's.
//
// Nothing here synchronises, allocates or uses float atomics: results are bitwise the same on every
// run. Arguments are checked first (std::invalid_argument names the argument); an error of CUDA is
// a std::runtime_error that names the kernel. The current device must be the one that the addresses
// and the stream belong to.
#pragma once

#include "bertkd.h"

namespace bertkd::cuda {

// `stream` is a cudaStream_t. `workspace` has at least as many floats as the op's *_workspace says.
struct Launch {
  void* stream;
  float* workspace;
  int64_t workspace_size;
};

// One thread block owns a head: length <= kMaxLength, widths multiples of 8 from 16 to 128, all
// tensors of one dtype, fp16 or bf16, rows 16-byte aligned.
constexpr int64_t kMaxLength = 128;
constexpr int64_t kMinWidth = 16, kMaxWidth = 128;
void relation_kl(const Attention& args, const Launch& launch);
void self_relation_kl(const Attention& args, const Launch& launch);
int64_t relation_kl_workspace(int64_t batch, int64_t heads);
// Shared memory of a block, to be compared with what the device has.
int64_t relation_kl_shared_bytes(int64_t length, int64_t width_s, int64_t width_t, bool self,
                                 bool backward);

// `grad` may be the student's own memory: a row is read before it is overwritten.
void softmax_kl(const SoftmaxKl& args, const Launch& launch);
int64_t softmax_kl_workspace(int64_t rows);

void hidden_mse(const HiddenMse& args, const Launch& launch);
int64_t hidden_mse_workspace(int64_t states, int64_t rows);

// Shared memory that a block may have on a device.
int64_t shared_limit(int device);

// CUDA versions as 1000 * major + 10 * minor: of the runtime inside this library, and the newest
// the driver serves (0 without a driver).
int runtime_version();
int driver_version();

}  // namespace bertkd::cuda
