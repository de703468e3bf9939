// y = x @ dequantize(w[e]).T for the expert e of each slot, 4-bit codes; see grouped.cuh and gemm_stream.cuh.
//
// grouped_w4a16_<T>_g<columns a group>_m<slots a block>; launches from targets/cuda/experts.py: plan_grouped. Dynamic
// shared memory as w4a16_stream's. Bytes: those of the chosen experts, once for every block of slots: at batch 1 of
// Qwen3-30B-A3B (8 of 128 experts, gate and up 1536 x 2048, down 2048 x 768, groups of 128) 20 MB a layer, 4.6 us at
// 4.3 TB/s, in 384 and 512 blocks.
#include "grouped.cuh"

LLMCTL_GROUPED(grouped_w4a16, f16, 4, 32, 8)
LLMCTL_GROUPED(grouped_w4a16, f16, 4, 64, 8)
LLMCTL_GROUPED(grouped_w4a16, f16, 4, 128, 8)
LLMCTL_GROUPED(grouped_w4a16, f16, 4, 32, 16)
LLMCTL_GROUPED(grouped_w4a16, f16, 4, 64, 16)
LLMCTL_GROUPED(grouped_w4a16, f16, 4, 128, 16)
LLMCTL_GROUPED(grouped_w4a16, bf16, 4, 32, 8)
LLMCTL_GROUPED(grouped_w4a16, bf16, 4, 64, 8)
LLMCTL_GROUPED(grouped_w4a16, bf16, 4, 128, 8)
LLMCTL_GROUPED(grouped_w4a16, bf16, 4, 32, 16)
LLMCTL_GROUPED(grouped_w4a16, bf16, 4, 64, 16)
LLMCTL_GROUPED(grouped_w4a16, bf16, 4, 128, 16)
