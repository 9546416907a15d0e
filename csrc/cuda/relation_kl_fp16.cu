// relation_kl for fp16 inputs.
#include "relation_kl.cuh"

namespace bertkd::cuda::relation {

template void launch_relation<F16>(const Params&, void*);

}  // namespace bertkd::cuda::relation
