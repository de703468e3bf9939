// Paged decode attention for heads of 64, all element types; the design is in attention_decode.cuh.
//
// On sm_90 (by NVRTC 13.0 or 13.5, the larger), for a cache of 16 bits / int8 / fp8:
//   registers 117 / 107 / 101, dynamic shared memory 40704 / 24320 / 24320 bytes, 128 threads: 4 / 4 / 4 blocks an SM
//   in flight, 3 units a warp: 108 / 60 / 60 KB an SM, where 4.3 TB/s at 800 ns want 26 KB
// 32 heads on 8 KV heads, batch 32 x 8k, splits of 512 (4096 blocks) on an H200:
//   0.54 / 0.29 / 0.27 GB of keys, values and scales: 125 / 66 / 62 us at 4.3 TB/s; 142 / 75 / 71 us expected (88%)
//   2.1 GFLOP, 9 with the empty rows of tiles: 11 us at 780 TFLOP/s, hidden behind the loads
#include "attention_decode.cuh"

LLMCTL_ATTENTION_ALL(LLMCTL_ATTENTION_DECODE, 64)
