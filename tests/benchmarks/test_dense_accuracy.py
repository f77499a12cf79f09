"""The first table of docs/numerics.md on FP8 weights, at a size that takes a second."""

import pytest

from benchmarks.dense_accuracy import DISTRIBUTIONS, errors

BF16_RMS = 2.0**-8 / 3**0.5
"""Mean-square error of one rounding to bf16, relative, at its largest (mantissas near 1)."""
E4M3_RMS = 2.0**-4 / 3**0.5
"""The same of e4m3."""


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_what_the_kernel_adds_and_what_fp8_costs(distribution: str) -> None:
    found = errors(distribution, columns=512, rows=128, tokens=4)
    assert 0 < found.kernel < BF16_RMS
    # Not all mantissas are near 1, where a rounding is largest: half of it at the least.
    assert E4M3_RMS / 2 < found.rows < E4M3_RMS
    assert found.rows < 1.2 * found.blocks  # scales per block are hardly better
