"""Which formats of weights and activations the expert layer has kernels for."""

FORMATS = (
    ("bf16", "same"),
    ("fp8", "same"),
    ("fp8", "fp8"),
    ("nvfp4", "same"),
    ("nvfp4", "fp8"),
    ("nvfp4", "nvfp4"),
)
"""Weights, and `activations` as of `layer.experts`."""


def multiplied_as(activations: str) -> str:
    """The type that is multiplied: "bf16", "fp8" or "nvfp4"."""
    return "bf16" if activations == "same" else activations


def least_arch(weights: str, activations: str) -> int:
    """The first architecture that has the products: 90 for sm_90 and so on.

    bf16 products are had from Ampere on, conversions from e4m3 from Ada on.
    """
    if activations == "nvfp4":
        return 100
    return 89 if "fp8" in (weights, activations) else 80
