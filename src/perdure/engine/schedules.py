"""Learning-rate schedules: pure functions ``(step, total steps) -> factor`` on the base learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int, int], float]


def constant(step: int, total: int) -> float:  # noqa: ARG001
    """Return 1 at every step."""
    return 1.0


def poly(power: float = 0.9) -> Schedule:
    """Polynomial decay ``(1 - step/total) ** power`` (DeepLab)."""
    return lambda step, total: (1.0 - step / total) ** power


def warmup_poly(length: float = 0.2, start: float = 0.001, power: float = 0.9) -> Schedule:
    """Linear warm-up from ``start``, multiplied by polynomial decay.

    Args:
        length: A number of steps where it is a whole number (int), else a share of all steps.
        start: Factor of the first step.
        power: Of the decay.
    """
    decay = poly(power)

    def factor(step: int, total: int) -> float:
        ramp = step / (length if isinstance(length, int) else length * total)
        return decay(step, total) * (start * (1.0 - ramp) + ramp if ramp < 1.0 else 1.0)

    return factor


def cosine(floor: float = 0.0) -> Schedule:
    """Half a cosine from 1 down to ``floor``."""
    return lambda step, total: floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * step / total))


def stairs(first: float, every: float, factor: float) -> Schedule:
    """Multiply by ``factor`` after the share ``first`` of the steps, and again after every further share ``every``.

    0.07, 0.06 and 0.3 over 100 epochs are epochs 7, 13, 19, ...: what CCSI's plateau scheduler did, which took
    rising accuracy for failure (spec CCSI 4.8).
    """

    def rate(step: int, total: int) -> float:
        # 1e-9: shares such as 0.07 are no binary fractions, and a stair must not come a step late
        past = (step / total - first) / every
        return factor ** (math.floor(past + 1e-9) + 1) if past > -1e-9 else 1.0

    return rate


def by_name(name: str, warmup: float = 0.2, steps: tuple[float, float, float] = (0.07, 0.06, 0.3)) -> Schedule:
    """Schedule of a recipe: ``constant``, ``poly``, ``warmup_poly``, ``cosine`` or ``stairs``.

    A share of steps warms up from 0.001 (STAR), a number of steps from 1e-6 (CLIP-CISS).
    """
    return {
        "constant": constant,
        "poly": poly(),
        "warmup_poly": warmup_poly(warmup, 1e-6 if isinstance(warmup, int) else 0.001),
        "cosine": cosine(),
        "stairs": stairs(*steps),
    }[name]
