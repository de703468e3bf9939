// Paged decode attention for heads of 256, all element types; the design is in attention_decode.cuh.
//
// On sm_90 (by NVRTC 13.0 or 13.5, the larger), for a cache of 16 bits / int8 / fp8:
//   registers 254 / 223 / 222, dynamic shared memory 76800 / 44032 / 44032 bytes, 64 threads: 3 / 4 / 4 blocks an SM
//   in flight, 3 units a warp: 148 / 102 / 102 KB an SM, where 4.3 TB/s at 800 ns want 26 KB
// 32 heads on 8 KV heads, batch 32 x 8k, splits of 512 (4096 blocks) on an H200:
//   2.15 / 1.09 / 1.07 GB of keys, values and scales: 499 / 254 / 250 us at 4.3 TB/s; 568 / 288 / 284 us expected (88%)
//   8.6 GFLOP, 34 with the empty rows of tiles: 44 us at 780 TFLOP/s, hidden behind the loads
#include "attention_decode.cuh"

LLMCTL_ATTENTION_ALL(LLMCTL_ATTENTION_DECODE, 256)
