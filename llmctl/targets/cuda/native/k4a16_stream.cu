// y = tail(x @ (code * scale + minimum).T) for 1..16 rows of x and 4-bit codes in groups of 16 or 32 columns, with
// minimums or without: GGUF's Q2_K, Q3_K, Q4_K and Q4_1. See gemm_stream.cuh and, for the order of columns,
// dequant.cuh.
//
// k4a16_stream_<T>_g<columns a group>_m<rows>; launches from targets/cuda/gemm.py: plan_stream. Dynamic shared memory:
// 4 stages of 2048 bytes of codes and 128 a group, for each warp.
//
// Bytes: 0.5 a weight, 2 a row and group, and as much for minimums: with those
// 6 bits a weight in groups of 16, 5 of 32. Instructions for 8 rows, a group of 16: 2 mma and one for
// the sum of x, 16 fp32 FMAs. Not measured on a GPU yet.
#include "gemm_stream.cuh"

LLMCTL_MINIMUM_STREAM(k4a16_stream, f16, 4, 16, 8)
LLMCTL_MINIMUM_STREAM(k4a16_stream, f16, 4, 32, 8)
LLMCTL_MINIMUM_STREAM(k4a16_stream, f16, 4, 16, 16)
LLMCTL_MINIMUM_STREAM(k4a16_stream, f16, 4, 32, 16)
LLMCTL_MINIMUM_STREAM(k4a16_stream, bf16, 4, 16, 8)
LLMCTL_MINIMUM_STREAM(k4a16_stream, bf16, 4, 32, 8)
LLMCTL_MINIMUM_STREAM(k4a16_stream, bf16, 4, 16, 16)
LLMCTL_MINIMUM_STREAM(k4a16_stream, bf16, 4, 32, 16)
