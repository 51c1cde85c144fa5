"""Many small cases in one test: pytest spends five milliseconds on a test, as long as such a case takes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest

__all__ = ["for_each"]


def for_each(names: str | tuple[str, ...], values: Iterable[Any]) -> Callable[[Callable[..., None]], Any]:
    """Run a test with each of the values, as ``pytest.mark.parametrize`` does, but as a single test.

    All run, and the failure names those that failed. Fixtures of the test are the same for all of them.
    A case that skips fails: pytest would skip all that come after it, so filter the values instead.
    """
    given = [
        {names: value} if isinstance(names, str) else dict(zip(names, value, strict=True)) for value in values
    ]
    assert given

    def decorate(test: Callable[..., None]) -> Any:
        @functools.wraps(test)
        def run(*self: Any, **fixtures: Any) -> None:
            failed: list[tuple[dict[str, Any], BaseException]] = []
            for each in given:
                try:
                    test(*self, **fixtures, **each)
                except (Exception, pytest.fail.Exception, pytest.skip.Exception) as error:
                    failed.append((each, error))
            if failed:
                which = "\n".join(f"with {each}: {type(error).__name__}: {error}" for each, error in failed)
                raise AssertionError(f"{len(failed)} of {len(given)} fail\n{which}") from failed[0][1]

        signature = inspect.signature(test)
        left = [each for name, each in signature.parameters.items() if name not in given[0]]
        run.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]
        return run

    return decorate
