"""How many cases are tried: a fixed few hundred in the suite, as many as ``STEEPEST_FUZZ`` says otherwise.

A case is one hypothesis example: one run of the state machine, or one constructor, group or state dict.
``make fuzz`` sets the variable; its seeds are random, and a failure prints the blob that reproduces it.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

__all__ = ["cases", "machine"]

_COUNT = int(os.environ.get("STEEPEST_FUZZ", "0"))
_QUIET = list(HealthCheck)


def cases(share: float, *, few: int) -> settings:
    """Settings of a test that takes ``share`` of the fuzzed cases, and ``few`` in the suite.

    In the suite the examples are the same in every run, and nothing is shrunk: ``make fuzz`` does that.
    """
    if not _COUNT:
        return settings(
            max_examples=few,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=_QUIET,
        )
    return settings(
        max_examples=round(share * _COUNT),
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=_QUIET,
        phases=[Phase.explicit, Phase.generate, *[Phase.shrink] * (os.environ.get("STEEPEST_SHRINK") != "0")],
    )


def machine(share: float, *, few: int, steps: int) -> settings:
    """The same for a state machine, whose cases are runs of at most ``steps`` actions."""
    return settings(cases(share, few=few), stateful_step_count=steps)
