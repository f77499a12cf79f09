"""`step37 doctor`: what is here, which kernels would run, whether a checkpoint is whole."""
