#include "attention_prefill.cuh"

LLMCTL_ATTENTION_PREFILL_ALL(128)
