// y = x @ (float8(code) * scale).T of w[e] for the expert e of each slot, float8 (e4m3) codes; see grouped.cuh and
// gemm_stream.cuh.
//
// grouped_fp8a16_<T>_g<columns a group>_m<slots a block>; launches from targets/cuda/experts.py: plan_grouped.
#include "grouped.cuh"

LLMCTL_FLOAT8_GROUPED(grouped_fp8a16, f16, 32, 8)
LLMCTL_FLOAT8_GROUPED(grouped_fp8a16, f16, 64, 8)
LLMCTL_FLOAT8_GROUPED(grouped_fp8a16, f16, 32, 16)
LLMCTL_FLOAT8_GROUPED(grouped_fp8a16, f16, 64, 16)
LLMCTL_FLOAT8_GROUPED(grouped_fp8a16, bf16, 32, 8)
LLMCTL_FLOAT8_GROUPED(grouped_fp8a16, bf16, 64, 8)
LLMCTL_FLOAT8_GROUPED(grouped_fp8a16, bf16, 32, 16)
LLMCTL_FLOAT8_GROUPED(grouped_fp8a16, bf16, 64, 16)
