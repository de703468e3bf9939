// y = tail(x @ dequantize(w).T) for 1..16 rows of x and 4-bit codes: the decode-time linear. See gemm_stream.cuh.
//
// w4a16_stream_<T>_g<columns a group>_m<rows>; launches from targets/cuda/gemm.py: plan_stream. Dynamic shared memory:
// 4 stages of 2048 bytes of codes and 96 a group, for each warp.
//
// Bytes: 0.5 a weight, and 96 for every 32 rows of a group (4.7% at 128 columns with zeros). In flight, an SM: 3 stages
// x 2144 bytes x 8..20 warps = 51..128 KiB; 4.3 TB/s at 1 us of loaded latency needs 32.
// Instructions, a step of 128 x 32 weights, bf16: 64 lop3, 64 packed subtractions, 48 shifts (16 for f16), 16 mma (32
// for 16 rows), 6 + 4 shared and global loads, 9 copies: about 250 of the 440 issue slots in which an SM receives the
// step's bytes.
// On an H200 at 4.3 TB/s (bytes alone; the ramp of a launch adds 2..3 us), Llama-3-8B, groups of 128:
//   qkv 6144 x 4096      13.2 MB   3.1 us      gate/up 28672 x 4096   61.5 MB  14.3 us
//   o   4096 x 4096       8.8 MB   2.0 us      down    4096 x 14336   30.7 MB   7.2 us
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
