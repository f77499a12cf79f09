"""The table of docs/numerics.md, at a size that takes a second."""

from benchmarks.expert_accuracy import errors, rows

BF16_RMS = 2.0**-8 / 3**0.5
"""Mean-square error of one rounding to bf16, relative, at its largest (mantissas near 1)."""


def test_what_the_kernels_add_and_what_the_formats_cost():
    found = errors(hidden_size=256, size=64, tokens=2, count=2)
    for (weights, activations), error in found.items():
        if activations == "same":
            # Intermediate, weighted output and sum are rounded to bf16; errors add in squares.
            assert 0 < error.kernel < 3**0.5 * BF16_RMS, (weights, activations)
        else:  # 3 or fewer bits of mantissa
            assert error.kernel > 2.0**-6
        assert (error.weights == 0) == (weights == "bf16")
        assert error.together <= error.kernel * (1 + error.weights) + error.weights
    assert len(rows(found)) == 6
