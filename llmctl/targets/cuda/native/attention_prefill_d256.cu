// Paged prefill attention for heads of 256, all element types; the design is in attention_prefill.cuh.
//
// On sm_90 (by NVRTC 13.0 or 13.5, the larger), for a cache of 16 bits / int8 / fp8:
//   registers 251 / 240 / 217, dynamic shared memory 101376 / 69120 / 68608 bytes, 128 threads: 2 / 2 / 2 blocks an SM
// A prompt of 8k, 32 heads on 8 KV heads, on an H200 (16-bit cache):
//   1100 GFLOP (causal half): 1.41 ms at 780 TFLOP/s; mma.sync reaches some 60% of that, so 2.35 ms at best and
//   3.13 ms expected (45%)
//   0.34 GB of q, out, keys and values from memory: 78 us; 17.2 GB of tiles from L2 bound it as well:
//   blocks of 128 rows would need 33 KB more shared memory than an SM of sm_86, sm_89 or sm_120 has
#include "attention_prefill.cuh"

LLMCTL_ATTENTION_ALL(LLMCTL_ATTENTION_PREFILL, 256)
