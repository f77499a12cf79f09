"""Attention's Triton kernels over a paged cache: prologue, decode, extend; policy apart."""
