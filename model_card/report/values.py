"""Numbers and texts as a page carries them: short, and without what is private."""

import math

import numpy as np

DIGITS = 5  # significant ones: more than a screen shows


def short(value: float | None) -> float | int | None:
    """A number with DIGITS significant digits; None for what is no finite number, which JSON has no sign for."""
    if isinstance(value, int):
        return value
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{DIGITS}g}")


def shorts(values: list | np.ndarray) -> list:
    """`short` of each value. Whole numbers lose their decimal point."""
    found = [short(float(value)) if value is not None else None for value in values]
    return [int(value) if value is not None and value == int(value) else value for value in found]


def is_number(value: object) -> bool:
    """Whether a logged value is a number, and no yes or no."""
    return isinstance(value, int | float) and not isinstance(value, bool)
