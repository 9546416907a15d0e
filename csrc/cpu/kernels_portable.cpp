#define BERTKD_ISA portable

#include "attention_mse.inc"
#include "exp2.inc"
#include "hidden_mse.inc"
#include "relation_kl.inc"
#include "self_attention.inc"
#include "softmax_kl.inc"

namespace bertkd {

const Kernels kKernelsPortable = {
    "portable",
    portable::run_relation_kl,
    portable::run_attention_mse,
    portable::run_self_attention,
    portable::run_hidden_mse,
    portable::run_softmax_kl,
    portable::run_exp2,
};

}  // namespace bertkd
