"""Kernels, PyTorch references and number formats for Step-3.7-Flash, free of any serving engine."""
