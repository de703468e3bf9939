// Paged decode attention for heads of 96, all element types; the design is in attention_decode.cuh.
//
// On sm_90 (by NVRTC 13.0 or 13.5, the larger), for a cache of 16 bits / int8 / fp8:
//   registers 148 / 128 / 125, dynamic shared memory 58112 / 33536 / 33536 bytes, 128 threads: 3 / 4 / 4 blocks an SM
//   in flight, 3 units a warp: 117 / 84 / 84 KB an SM, where 4.3 TB/s at 800 ns want 26 KB
// 32 heads on 8 KV heads, batch 32 x 8k, splits of 512 (4096 blocks) on an H200:
//   0.81 / 0.42 / 0.40 GB of keys, values and scales: 187 / 98 / 94 us at 4.3 TB/s; 213 / 111 / 106 us expected (88%)
//   3.2 GFLOP, 13 with the empty rows of tiles: 17 us at 780 TFLOP/s, hidden behind the loads
#include "attention_decode.cuh"

LLMCTL_ATTENTION_ALL(LLMCTL_ATTENTION_DECODE, 96)
