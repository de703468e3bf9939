// y = x @ (code * scale + minimum)[e].T for the expert e of each slot, 8-bit codes in groups of 16 or 32 columns; see
// grouped.cuh and k8a16_stream.cu.
//
// grouped_k8a16_<T>_g<columns a group>_m<slots a block>; launches from targets/cuda/experts.py: plan_grouped.
#include "grouped.cuh"

LLMCTL_MINIMUM_GROUPED(grouped_k8a16, f16, 8, 16, 8)
LLMCTL_MINIMUM_GROUPED(grouped_k8a16, f16, 8, 32, 8)
LLMCTL_MINIMUM_GROUPED(grouped_k8a16, f16, 8, 16, 16)
LLMCTL_MINIMUM_GROUPED(grouped_k8a16, f16, 8, 32, 16)
LLMCTL_MINIMUM_GROUPED(grouped_k8a16, bf16, 8, 16, 8)
LLMCTL_MINIMUM_GROUPED(grouped_k8a16, bf16, 8, 32, 8)
LLMCTL_MINIMUM_GROUPED(grouped_k8a16, bf16, 8, 16, 16)
LLMCTL_MINIMUM_GROUPED(grouped_k8a16, bf16, 8, 32, 16)
