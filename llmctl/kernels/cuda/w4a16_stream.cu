// y = tail(x @ dequantize(w).T) for 1..16 rows of x and 4-bit codes: the decode-time linear. See gemm_stream.cuh.
#include "gemm_stream.cuh"

LLMCTL_STREAM(w4a16_stream, f16, 4, 32, 8)
LLMCTL_STREAM(w4a16_stream, f16, 4, 64, 8)
LLMCTL_STREAM(w4a16_stream, f16, 4, 128, 8)
LLMCTL_STREAM(w4a16_stream, f16, 4, 32, 16)
LLMCTL_STREAM(w4a16_stream, f16, 4, 64, 16)
LLMCTL_STREAM(w4a16_stream, f16, 4, 128, 16)
LLMCTL_STREAM(w4a16_stream, bf16, 4, 32, 8)
LLMCTL_STREAM(w4a16_stream, bf16, 4, 64, 8)
LLMCTL_STREAM(w4a16_stream, bf16, 4, 128, 8)
LLMCTL_STREAM(w4a16_stream, bf16, 4, 32, 16)
LLMCTL_STREAM(w4a16_stream, bf16, 4, 64, 16)
LLMCTL_STREAM(w4a16_stream, bf16, 4, 128, 16)
