// y = tail(x @ dequantize(w).T) for 1..16 rows of x and 8-bit codes. See gemm_stream.cuh.
//
// w8a16_stream_<T>_g<columns a group>_m<rows>; g64 serves 64 and above. Launches: targets/cuda/gemm.py: plan_stream.
// Dynamic shared memory: 4 stages of 2048 bytes of codes (64 columns) and 96 a group, for each warp.
//
// Bytes: 1 a weight, and 96 for every 32 rows of a group. A step of 64 x 32 weights costs an f16 kernel about 64 byte
// permutes, 64 packed subtractions and 8 mma; a bf16 one 64 + 32 permutes and 64 float subtractions.
// On an H200 at 4.3 TB/s, Llama-3-8B: qkv 5.9 us, o 3.9, gate/up 27.3 (117 MB), down 13.7.
#include "gemm_stream.cuh"

LLMCTL_STREAM(w8a16_stream, f16, 8, 32, 8)
LLMCTL_STREAM(w8a16_stream, f16, 8, 64, 8)
LLMCTL_STREAM(w8a16_stream, f16, 8, 32, 16)
LLMCTL_STREAM(w8a16_stream, f16, 8, 64, 16)
LLMCTL_STREAM(w8a16_stream, bf16, 8, 32, 8)
LLMCTL_STREAM(w8a16_stream, bf16, 8, 64, 8)
LLMCTL_STREAM(w8a16_stream, bf16, 8, 32, 16)
LLMCTL_STREAM(w8a16_stream, bf16, 8, 64, 16)
