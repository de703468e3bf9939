"""The CPU target: weights packed for native C++ kernels, a Graph bound to them, one native call a step."""
