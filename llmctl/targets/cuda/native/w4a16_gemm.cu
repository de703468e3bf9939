// y = tail(x @ dequantize(w).T) for 17 and more rows of x and 4-bit codes, on tensor cores. See gemm_tile.cuh.
//
// w4a16_gemm_<T>_t<tokens a block>; launches from targets/cuda/gemm.py: plan_tile. Dynamic shared memory of a half:
// 4 stages of 8960 bytes for 32 tokens, 3 of 13056 for 64.
//
// Of a chunk of 32 x 32 weights a warp makes, for 64 tokens: 32 mma, 9 16-byte shared loads, 45 instructions of
// dequantisation. mma.sync reaches about 60% of the wgmma rate: 32 mma take an SM's quarter about 200 clocks, the loads
// 144 (four quarters share one port), so arithmetic binds, at about half of 780 TFLOP/s; groups of 32 add 64 fp32 FMAs.
// x is read once for every 128 rows: M K 2 bytes x N / 128 from L2, twice the codes' bytes at M = 64. Registers allow
// two or three halves an SM. On an H200, Llama-3-8B, bytes at 4.3 TB/s against arithmetic at 390 TFLOP/s:
//            M = 32              M = 64              M = 128
//   qkv      3.1 /  4.1 us       3.1 /  8.3 us        3.1 / 16.5 us
//   gate/up  14.3 / 19.3         14.3 / 38.5          14.3 / 77
//   down     7.2 /  9.6          7.2 / 19.3           7.2 / 38.5
// A dense bf16 product reads 235 MB for gate/up: 55 us up to M = 180.
#include "gemm_tile.cuh"

LLMCTL_TILE_GEMM(w4a16_gemm, f16, 4, 32)
LLMCTL_TILE_GEMM(w4a16_gemm, f16, 4, 64)
LLMCTL_TILE_GEMM(w4a16_gemm, bf16, 4, 32)
LLMCTL_TILE_GEMM(w4a16_gemm, bf16, 4, 64)
