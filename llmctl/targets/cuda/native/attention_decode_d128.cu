// Paged decode attention for heads of 128, all element types; the design is in attention_decode.cuh.
//
// On sm_90 (by NVRTC 13.0 or 13.5, the larger), for a cache of 16 bits / int8 / fp8:
//   registers 168 / 151 / 139, dynamic shared memory 75520 / 42752 / 42752 bytes, 128 threads: 3 / 3 / 3 blocks an SM
//   in flight, 3 units a warp: 153 / 81 / 81 KB an SM, where 4.3 TB/s at 800 ns want 26 KB
// 32 heads on 8 KV heads, batch 32 x 8k, splits of 512 (4096 blocks) on an H200:
//   1.07 / 0.55 / 0.54 GB of keys, values and scales: 250 / 129 / 125 us at 4.3 TB/s; 284 / 146 / 142 us expected (88%)
//   4.3 GFLOP, 17 with the empty rows of tiles: 22 us at 780 TFLOP/s, hidden behind the loads
#include "attention_decode.cuh"

LLMCTL_ATTENTION_ALL(LLMCTL_ATTENTION_DECODE, 128)
