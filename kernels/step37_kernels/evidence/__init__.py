"""What can be known of the kernels without a GPU: the machine code of every launch."""
