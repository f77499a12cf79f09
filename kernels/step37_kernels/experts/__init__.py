"""The expert layer's Triton kernels: one file per weight and activation format, policy apart."""
