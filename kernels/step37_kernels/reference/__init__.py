"""Every operation in plain fp32 PyTorch: what the kernels are measured against."""
