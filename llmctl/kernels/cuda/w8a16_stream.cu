// y = tail(x @ dequantize(w).T) for 1..16 rows of x and 8-bit codes: the decode-time linear. See gemm_stream.cuh.
#include "gemm_stream.cuh"

LLMCTL_STREAM(w8a16_stream, f16, 8, 32, 8)
LLMCTL_STREAM(w8a16_stream, f16, 8, 64, 8)
LLMCTL_STREAM(w8a16_stream, f16, 8, 32, 16)
LLMCTL_STREAM(w8a16_stream, f16, 8, 64, 16)
LLMCTL_STREAM(w8a16_stream, bf16, 8, 32, 8)
LLMCTL_STREAM(w8a16_stream, bf16, 8, 64, 8)
LLMCTL_STREAM(w8a16_stream, bf16, 8, 32, 16)
LLMCTL_STREAM(w8a16_stream, bf16, 8, 64, 16)
