// The kernels of one instruction set, as dispatch.cpp calls them: arguments are checked already.
#pragma once

#include "../bertkd.h"

namespace bertkd {

enum class Relation { kPair, kSelf };

struct Kernels {
  const char* name;
  void (*relation_kl)(const Attention&, Relation);
  void (*attention_mse)(const Attention&);
  void (*self_attention)(const SelfAttention&);
  void (*hidden_mse)(const HiddenMse&);
  void (*softmax_kl)(const SoftmaxKl&);
  void (*exp2)(const float*, float*, int64_t);
};

extern const Kernels kKernelsPortable;
#if defined(__x86_64__)
extern const Kernels kKernelsAvx2, kKernelsAvx512;
#endif

// Scratch memory, aligned to a cache line. Throws std::bad_alloc; call it outside parallel regions.
void* allocate(int64_t bytes);
void release(void* memory) noexcept;

}  // namespace bertkd
