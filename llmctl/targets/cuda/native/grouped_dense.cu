// y = x @ w[e].T for the expert e of each slot, dense weights; see grouped.cuh.
//
// grouped_dense_<T>_m<slots a block>; launches from targets/cuda/experts.py: plan_grouped. w T [experts, n, k]; k % 8
// == 0. Dynamic shared memory: 4 bytes for each of 36 x 8 (16) sums of a warp. Bytes: 2 a weight of the chosen
// experts, once for every block of slots, from global memory straight to fragments, 128 bytes a lane under way.
#include "grouped.cuh"

#define LLMCTL_GROUPED_DENSE(T, ROWS)                                                                                 \
    LLMCTL_KERNEL(llmctl::gemm::kStreamThreads, 2)                                                                    \
    grouped_dense_##T##_m##ROWS(const llmctl::T* x, const int* chosen, const int* order, const int* blocks,          \
                                const llmctl::T* w, llmctl::T* y, int n, int k, int share, int activation) {          \
        LLMCTL_DYNAMIC_SHARED(shared);                                                                                \
        llmctl::grouped::dense<llmctl::T, ROWS / 8>(x, chosen, order, blocks, w, y, n, k, share, activation, shared); \
    }

LLMCTL_GROUPED_DENSE(f16, 8)
LLMCTL_GROUPED_DENSE(f16, 16)
LLMCTL_GROUPED_DENSE(bf16, 8)
LLMCTL_GROUPED_DENSE(bf16, 16)
