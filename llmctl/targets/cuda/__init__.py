"""The CUDA target: kernels, what launches them, how weights lie for them."""
