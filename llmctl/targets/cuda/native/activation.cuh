// The activation functions of the graph (targets/reference/kernels.py: ACTIVATIONS), in fp32.
// For elementwise kernels and for the epilogues of linears.
#pragma once
#include "device.cuh"

namespace llmctl {
namespace activation {

struct silu {
    LLMCTL_METHOD float operator()(float v) const { return v / (1.0f + expf(-v)); }
};
struct gelu {
    LLMCTL_METHOD float operator()(float v) const { return 0.5f * v * (1.0f + erff(v * 0.70710678f)); }
};
struct gelu_tanh {
    LLMCTL_METHOD float operator()(float v) const {
        return 0.5f * v * (1.0f + tanhf(0.79788456f * (v + 0.044715f * v * v * v)));
    }
};
struct relu {
    LLMCTL_METHOD float operator()(float v) const { return fmaxf(v, 0.0f); }
};

}  // namespace activation
}  // namespace llmctl
