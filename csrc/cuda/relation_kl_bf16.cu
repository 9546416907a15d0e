// relation_kl for bf16 inputs.
#include "relation_kl.cuh"

namespace bertkd::cuda::relation {

template void launch_relation<BF16>(const Params&, void*);

}  // namespace bertkd::cuda::relation
