"""Student's t-distribution: quantiles for intervals, p-values for tests. Its own, since scipy is no requirement."""

from __future__ import annotations

import functools
import math
from statistics import NormalDist

import numpy as np


def student_p(t: float, degrees: int) -> float:
    """P(|T| ≥ |t|) for Student's t, at least the precision of a float64."""
    whole = degrees + t * t
    p = _incomplete_beta(degrees / 2, 0.5, degrees / whole, t * t / whole) if math.isfinite(t) else 0.0
    return min(1.0, max(p, float(np.finfo(np.float64).eps)))


def _incomplete_beta(a: float, b: float, x: float, rest: float) -> float:
    """The regularised incomplete beta function, by its continued fraction (Lentz's method); `rest` is 1 - x."""
    if x <= 0.0 or rest <= 0.0:
        return 0.0 if x <= 0.0 else 1.0
    # The fraction converges quickly below the mean; above it the symmetric one does.
    if x > (a + 1) / (a + b + 2):
        return 1.0 - _incomplete_beta(b, a, rest, x)
    # A difference would lose the digits of x or of the rest, whichever is near 0.
    logs = (math.log(x) if x < 0.5 else math.log1p(-rest), math.log(rest) if rest < 0.5 else math.log1p(-x))
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * logs[0] + b * logs[1]
    tiny = 1e-300
    c, d = 1.0, 1.0 / max(1.0 - (a + b) * x / (a + 1), tiny)
    fraction = d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        change = 1.0
        for term in (even, odd):
            d = 1.0 / (1.0 + term * d or tiny)
            c = 1.0 + term / c or tiny
            change = c * d
            fraction *= change
        if abs(change - 1.0) < 1e-15:
            break
    return math.exp(log_front) * fraction / a


@functools.lru_cache(maxsize=1024)
def student_quantile(confidence: float, degrees: int) -> float:
    """x with P(|t| ≤ x) = `confidence` for Student's t."""
    if degrees > 500:  # the expansion's error is below 1e-6 here
        z = NormalDist().inv_cdf(0.5 + confidence / 2)
        return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    # With t = √n·tan θ the density is proportional to cos(θ)^(n-1) on (-π/2, π/2).
    angles = np.linspace(0.0, math.pi / 2, 200_001)
    density = np.cos(angles) ** (degrees - 1)
    area = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(degrees) * math.tan(float(np.interp(confidence, area / area[-1], angles)))
