#include "attention_decode.cuh"
LLMCTL_ATTENTION_DECODE_ALL(128)
