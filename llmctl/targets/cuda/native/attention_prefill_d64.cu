// Paged prefill attention for heads of 64, all element types; the design is in attention_prefill.cuh.
//
// On sm_90 (by NVRTC 13.0 or 13.5, the larger), for a cache of 16 bits / int8 / fp8:
//   registers 184 / 193 / 180, dynamic shared memory 36864 / 29184 / 28672 bytes, 128 threads: 2 / 2 / 2 blocks an SM
// A prompt of 8k, 32 heads on 8 KV heads, on an H200 (16-bit cache):
//   275 GFLOP (causal half): 0.35 ms at 780 TFLOP/s; mma.sync reaches some 60% of that, so 0.59 ms at best and
//   0.78 ms expected (45%)
//   0.08 GB of q, out, keys and values from memory: 20 us; 2.1 GB of tiles from L2
#include "attention_prefill.cuh"

LLMCTL_ATTENTION_ALL(LLMCTL_ATTENTION_PREFILL, 64)
