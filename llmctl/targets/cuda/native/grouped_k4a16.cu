// y = x @ (code * scale + minimum)[e].T for the expert e of each slot, 4-bit codes in groups of 16 or 32 columns; see
// grouped.cuh and k4a16_stream.cu.
//
// grouped_k4a16_<T>_g<columns a group>_m<slots a block>; launches from targets/cuda/experts.py: plan_grouped.
#include "grouped.cuh"

LLMCTL_MINIMUM_GROUPED(grouped_k4a16, f16, 4, 16, 8)
LLMCTL_MINIMUM_GROUPED(grouped_k4a16, f16, 4, 32, 8)
LLMCTL_MINIMUM_GROUPED(grouped_k4a16, f16, 4, 16, 16)
LLMCTL_MINIMUM_GROUPED(grouped_k4a16, f16, 4, 32, 16)
LLMCTL_MINIMUM_GROUPED(grouped_k4a16, bf16, 4, 16, 8)
LLMCTL_MINIMUM_GROUPED(grouped_k4a16, bf16, 4, 32, 8)
LLMCTL_MINIMUM_GROUPED(grouped_k4a16, bf16, 4, 16, 16)
LLMCTL_MINIMUM_GROUPED(grouped_k4a16, bf16, 4, 32, 16)
