// y = x @ dequantize(w[e]).T for the expert e of each slot, 4-bit codes of a code book (NF4, FP4); see grouped.cuh,
// gemm_stream.cuh and dequant.cuh.
//
// grouped_book4a16_<T>_g<columns a group>_m<slots a block>; launches from targets/cuda/experts.py: plan_grouped.
#include "grouped.cuh"

LLMCTL_BOOK_GROUPED(grouped_book4a16, f16, 32, 8)
LLMCTL_BOOK_GROUPED(grouped_book4a16, f16, 64, 8)
LLMCTL_BOOK_GROUPED(grouped_book4a16, f16, 128, 8)
LLMCTL_BOOK_GROUPED(grouped_book4a16, f16, 32, 16)
LLMCTL_BOOK_GROUPED(grouped_book4a16, f16, 64, 16)
LLMCTL_BOOK_GROUPED(grouped_book4a16, f16, 128, 16)
LLMCTL_BOOK_GROUPED(grouped_book4a16, bf16, 32, 8)
LLMCTL_BOOK_GROUPED(grouped_book4a16, bf16, 64, 8)
LLMCTL_BOOK_GROUPED(grouped_book4a16, bf16, 128, 8)
LLMCTL_BOOK_GROUPED(grouped_book4a16, bf16, 32, 16)
LLMCTL_BOOK_GROUPED(grouped_book4a16, bf16, 64, 16)
LLMCTL_BOOK_GROUPED(grouped_book4a16, bf16, 128, 16)
