// Paged decode attention for heads of 80, all element types; the design is in attention_decode.cuh.
//
// On sm_90 (by NVRTC 13.0 or 13.5, the larger), for a cache of 16 bits / int8 / fp8:
//   registers 135 / 126 / 118, dynamic shared memory 49408 / 24832 / 24832 bytes, 128 threads: 3 / 4 / 4 blocks an SM
//   in flight, 3 units a warp: 99 / 60 / 60 KB an SM, where 4.3 TB/s at 800 ns want 26 KB
// 32 heads on 8 KV heads, batch 32 x 8k, splits of 512 (4096 blocks) on an H200:
//   0.67 / 0.35 / 0.34 GB of keys, values and scales: 156 / 82 / 78 us at 4.3 TB/s; 177 / 93 / 89 us expected (88%)
//   2.7 GFLOP, 11 with the empty rows of tiles: 14 us at 780 TFLOP/s, hidden behind the loads
#include "attention_decode.cuh"

LLMCTL_ATTENTION_ALL(LLMCTL_ATTENTION_DECODE, 80)
