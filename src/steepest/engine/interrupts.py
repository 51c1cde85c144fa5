"""Hold back Ctrl-C while a step writes, so that all parameters and state belong to one step."""

from __future__ import annotations

# The signal module's own functions, without the enumerations that make them 20 times slower.
import _signal as signal  # type: ignore[import-not-found]
import threading
from signal import SIGINT, default_int_handler
from types import FrameType, TracebackType

__all__ = ["HeldInterrupts"]


class HeldInterrupts:
    """A context that raises ``KeyboardInterrupt`` at its end instead of in the middle, or at a second Ctrl-C.

    It stands in for Python's own handler alone, which is there in the main thread of scripts and notebooks.
    A program that handles SIGINT itself, or steps in another thread, keeps what it has.
    """

    __slots__ = ("_came", "_holds")

    def __enter__(self) -> None:
        """Begin to hold."""
        self._came = False
        self._holds = (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(SIGINT) is default_int_handler
        )
        if self._holds:
            signal.signal(SIGINT, self._note)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put Python's handler back, and raise what was held."""
        if self._holds:
            signal.signal(SIGINT, default_int_handler)
            if self._came and not isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt from error

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._came:
            raise KeyboardInterrupt
        self._came = True
