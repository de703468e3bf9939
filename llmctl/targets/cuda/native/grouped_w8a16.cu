// y = x @ dequantize(w[e]).T for the expert e of each slot, 8-bit codes; see grouped.cuh and gemm_stream.cuh.
//
// grouped_w8a16_<T>_g<columns a group>_m<slots a block>; launches from targets/cuda/experts.py: plan_grouped.
#include "grouped.cuh"

LLMCTL_GROUPED(grouped_w8a16, f16, 8, 32, 8)
LLMCTL_GROUPED(grouped_w8a16, f16, 8, 64, 8)
LLMCTL_GROUPED(grouped_w8a16, f16, 8, 32, 16)
LLMCTL_GROUPED(grouped_w8a16, f16, 8, 64, 16)
LLMCTL_GROUPED(grouped_w8a16, bf16, 8, 32, 8)
LLMCTL_GROUPED(grouped_w8a16, bf16, 8, 64, 8)
LLMCTL_GROUPED(grouped_w8a16, bf16, 8, 32, 16)
LLMCTL_GROUPED(grouped_w8a16, bf16, 8, 64, 16)
