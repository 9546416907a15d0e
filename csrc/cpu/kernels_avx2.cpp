// Empty where the processor is no x86: the file may then be compiled without its flags.
#if defined(__x86_64__)
#define BERTKD_ISA avx2

#include "attention_mse.inc"
#include "exp2.inc"
#include "hidden_mse.inc"
#include "relation_kl.inc"
#include "self_attention.inc"
#include "softmax_kl.inc"

namespace bertkd {

const Kernels kKernelsAvx2 = {
    "avx2",
    avx2::run_relation_kl,
    avx2::run_attention_mse,
    avx2::run_self_attention,
    avx2::run_hidden_mse,
    avx2::run_softmax_kl,
    avx2::run_exp2,
};

}  // namespace bertkd
#endif
