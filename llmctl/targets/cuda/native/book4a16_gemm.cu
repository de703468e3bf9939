// y = tail(x @ (book[code] * scale).T) for 17 and more rows of x and 4-bit codes of a code book (NF4, FP4), on tensor
// cores. See gemm_tile.cuh.
//
// book4a16_gemm_<T>_t<tokens a block>; launches from targets/cuda/gemm.py: plan_tile. Dynamic shared memory as
// w4a16_gemm.cu; of a chunk of 32 x 32 weights 100 instructions of dequantisation where that has 45.
#include "gemm_tile.cuh"

LLMCTL_BOOK_GEMM(book4a16_gemm, f16, 32)
LLMCTL_BOOK_GEMM(book4a16_gemm, f16, 64)
LLMCTL_BOOK_GEMM(book4a16_gemm, bf16, 32)
LLMCTL_BOOK_GEMM(book4a16_gemm, bf16, 64)
