"""How many distinct experts some tokens are expected to use, under uniform or skewed routing."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import numpy as np

_POINTS = 128  # of the quadrature: the chances below are exact to 1e-9 with half of them


@cache
def chances(num_experts: int, top_k: int, skew: float = 0.0) -> tuple[float, ...]:
    """The chance that each expert is among a token's top-k, the most popular expert first.

    A token draws its experts one after another without replacement, with probabilities
    proportional to 1 / rank ** skew; 0 is uniform, 1 Zipf's law. Such a draw takes the first
    top_k of independent exponential clocks that run at those rates, so that the chance of one
    expert is the integral over its own time t of the chance that fewer than top_k others ring
    before t, a Poisson-binomial one.

    Raises:
        ValueError: top_k is not between 1 and num_experts, or skew is negative.
    """
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k is {top_k}, expected 1 to the {num_experts} experts")
    if skew < 0:
        raise ValueError(f"skew is {skew}, expected 0 (uniform) or more")
    if skew == 0 or top_k == num_experts:
        return (top_k / num_experts,) * num_experts
    rates = np.arange(1, num_experts + 1, dtype=float) ** -skew
    times, weights = _quadrature(rates, top_k)
    rung = -np.expm1(-np.outer(times, rates))  # [time, expert]: rings before that time
    # fewer[time, left out, n]: n of all experts but one have rung, for n below top_k.
    fewer = np.zeros((len(times), num_experts, top_k))
    fewer[..., 0] = 1
    for expert in range(num_experts):
        chance = rung[:, expert, None, None]
        kept = fewer[:, expert].copy()
        fewer[..., 1:] = fewer[..., 1:] * (1 - chance) + fewer[..., :-1] * chance
        fewer[..., :1] *= 1 - chance
        fewer[:, expert] = kept
    density = rates * np.exp(-np.outer(times, rates)) * fewer.sum(-1)
    return tuple(float(chance) for chance in weights @ density)


def _quadrature(rates: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Times and weights up to where `top_k` clocks have rung for certain."""
    end = 1.0
    # 12 standard deviations (a sum of n chances has at most sqrt n) past top_k, if so many are.
    enough = min(top_k + 12 * top_k**0.5, 0.999 * len(rates))
    while -np.expm1(-rates * end).sum() < enough:
        end *= 1.5
    # In the cube root of the time: the popular experts' chances are decided near 0.
    points, weights = np.polynomial.legendre.leggauss(_POINTS)
    root = (points + 1) / 2 * end ** (1 / 3)
    return root**3, weights / 2 * end ** (1 / 3) * 3 * root**2


def distinct(tokens: int, of: Iterable[float]) -> float:
    """Experts, of those with these chances for each token, that `tokens` tokens use at least once.

    Tokens are taken to choose independently of each other.
    """
    return sum(1 - (1 - chance) ** tokens for chance in of)
