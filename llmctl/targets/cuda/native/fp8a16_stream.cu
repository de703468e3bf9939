// y = tail(x @ (float8(code) * scale).T) for 1..16 rows of x and float8 (e4m3) codes. See gemm_stream.cuh.
//
// fp8a16_stream_<T>_g<columns a group>_m<rows>; g64 serves 64 and above. Launches: targets/cuda/gemm.py: plan_stream.
// Bytes, layout and dynamic shared memory are those of w8a16_stream.cu without zeros.
//
// Instructions, two codes: 4 (f16: a permute, a shift, an and, a lop3) or 5 (bf16: a multiplication more), where w8a16's
// have 2 and 5. Not measured on a GPU yet.
#include "gemm_stream.cuh"

LLMCTL_FLOAT8_STREAM(fp8a16_stream, f16, 32, 8)
LLMCTL_FLOAT8_STREAM(fp8a16_stream, f16, 64, 8)
LLMCTL_FLOAT8_STREAM(fp8a16_stream, f16, 32, 16)
LLMCTL_FLOAT8_STREAM(fp8a16_stream, f16, 64, 16)
LLMCTL_FLOAT8_STREAM(fp8a16_stream, bf16, 32, 8)
LLMCTL_FLOAT8_STREAM(fp8a16_stream, bf16, 64, 8)
LLMCTL_FLOAT8_STREAM(fp8a16_stream, bf16, 32, 16)
LLMCTL_FLOAT8_STREAM(fp8a16_stream, bf16, 64, 16)
