// y = tail(x @ (book[code] * scale).T) for 1..16 rows of x and 4-bit codes of a code book (NF4, FP4). See gemm_stream.cuh.
//
// book4a16_stream_<T>_g<columns a group>_m<rows>; launches from targets/cuda/gemm.py: plan_stream. Bytes, layout and
// dynamic shared memory are those of w4a16_stream.cu without zeros; the book is 16 values in eight registers.
//
// Instructions, a step of 128 x 32 weights: 25 for eight codes (20 byte permutes), 400 in all, where integers take 180.
// They go to the integer pipe, which serves half of the 440 issue slots in which an SM of an H200 receives the step's
// bytes: on paper arithmetic binds there, at about 55% of the bandwidth. Not measured on a GPU yet.
#include "gemm_stream.cuh"

LLMCTL_BOOK_STREAM(book4a16_stream, f16, 32, 8)
LLMCTL_BOOK_STREAM(book4a16_stream, f16, 64, 8)
LLMCTL_BOOK_STREAM(book4a16_stream, f16, 128, 8)
LLMCTL_BOOK_STREAM(book4a16_stream, f16, 32, 16)
LLMCTL_BOOK_STREAM(book4a16_stream, f16, 64, 16)
LLMCTL_BOOK_STREAM(book4a16_stream, f16, 128, 16)
LLMCTL_BOOK_STREAM(book4a16_stream, bf16, 32, 8)
LLMCTL_BOOK_STREAM(book4a16_stream, bf16, 64, 8)
LLMCTL_BOOK_STREAM(book4a16_stream, bf16, 128, 8)
LLMCTL_BOOK_STREAM(book4a16_stream, bf16, 32, 16)
LLMCTL_BOOK_STREAM(book4a16_stream, bf16, 64, 16)
LLMCTL_BOOK_STREAM(book4a16_stream, bf16, 128, 16)
