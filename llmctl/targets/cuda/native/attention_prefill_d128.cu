// Paged prefill attention for heads of 128, all element types; the design is in attention_prefill.cuh.
//
// On sm_90 (by NVRTC 13.0 or 13.5, the larger), for a cache of 16 bits / int8 / fp8:
//   registers 255 / 255 / 255, dynamic shared memory 69632 / 53760 / 53248 bytes, 128 threads: 2 / 2 / 2 blocks an SM
// A prompt of 8k, 32 heads on 8 KV heads, on an H200 (16-bit cache):
//   550 GFLOP (causal half): 0.70 ms at 780 TFLOP/s; mma.sync reaches some 60% of that, so 1.17 ms at best and
//   1.57 ms expected (45%)
//   0.17 GB of q, out, keys and values from memory: 39 us; 4.3 GB of tiles from L2
#include "attention_prefill.cuh"

LLMCTL_ATTENTION_ALL(LLMCTL_ATTENTION_PREFILL, 128)
