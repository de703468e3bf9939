// Paged prefill attention for heads of 80, all element types; the design is in attention_prefill.cuh.
//
// On sm_90 (by NVRTC 13.0 or 13.5, the larger), for a cache of 16 bits / int8 / fp8:
//   registers 206 / 213 / 202, dynamic shared memory 45056 / 33280 / 32768 bytes, 128 threads: 2 / 2 / 2 blocks an SM
// A prompt of 8k, 32 heads on 8 KV heads, on an H200 (16-bit cache):
//   344 GFLOP (causal half): 0.44 ms at 780 TFLOP/s; mma.sync reaches some 60% of that, so 0.73 ms at best and
//   0.98 ms expected (45%)
//   0.10 GB of q, out, keys and values from memory: 24 us; 2.7 GB of tiles from L2
#include "attention_prefill.cuh"

LLMCTL_ATTENTION_ALL(LLMCTL_ATTENTION_PREFILL, 80)
