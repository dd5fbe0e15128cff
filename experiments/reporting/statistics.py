"""95 % intervals of an accuracy."""

import math
from collections.abc import Sequence

Z = 1.959963984540054  # the normal quantile at 0.975


def student_t(values: Sequence[float]) -> tuple[float, float]:
    """mean -/+ t s / sqrt(n), s the standard deviation over n >= 2 values; covers the mean over seeds.

    Source: Student 1908. It can leave [0, 1]: that is what so few seeds say.
    """
    from scipy.special import stdtrit

    n = len(values)
    if n < 2:
        raise ValueError(f"Student's interval needs at least 2 values, got {n}")
    mean = math.fsum(values) / n
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(stdtrit(n - 1, 0.975)) * deviation / math.sqrt(n)
    return mean - half, mean + half


def wilson(share: float, n: int) -> tuple[float, float]:
    """The score interval of a share of n independent examples; covers sampling of the examples, not of the seed.

    (p + z^2/2n -/+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n). Source: Wilson 1927.
    """
    if n < 1:
        raise ValueError("Wilson's interval needs at least 1 example")
    centre = share + Z * Z / (2 * n)
    half = Z * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    return (centre - half) / (1 + Z * Z / n), (centre + half) / (1 + Z * Z / n)
