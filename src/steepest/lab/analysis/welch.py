"""The test that decides whether two optimizers differ."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

SIGNIFICANT = 0.01


def welch(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the two-sided p-value of Welch's t-test; NaN for fewer than two values on a side.

    Example:
        >>> round(welch([1.0, 2.0, 3.0], [2.0, 3.0, 4.0]), 4)
        0.2879
    """
    if min(len(a), len(b)) < 2:
        return math.nan
    from scipy import stats  # takes longer to import than the rest of a command

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns of equal values, which are a result like any other
        return float(stats.ttest_ind(a, b, equal_var=False).pvalue)
