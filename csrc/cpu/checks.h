// Argument checks: they look at addresses and sizes only, never at memory, and throw
// std::invalid_argument.
#pragma once

#include "kernels.h"

namespace bertkd {

void check_attention(const char* op, const Attention& args, Relation relation);
void check_self_attention(const SelfAttention& args);
void check_hidden_mse(const HiddenMse& args);
void check_softmax_kl(const SoftmaxKl& args);
void check_memory(const void* data, int64_t bytes);
void check_exp2(const float* x, const float* out, int64_t count);

}  // namespace bertkd
