"""Further processes that share an experiment's trials."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import LabError
from ..progress import Callback

if TYPE_CHECKING:
    import torch

    from ..records import Experiment, Record

_WORKER = "STEEPEST_WORKER"
_STOP_SECONDS = 10
INTERRUPTED = 130


def is_worker() -> bool:
    """Return whether another process of this command started this one."""
    return _WORKER in os.environ


def end_with_parent() -> None:
    """Interrupt this worker once the process that started it has ended, however that happened."""
    # A shell's background job has been told to ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def wait() -> None:
        os.read(0, 1)  # nobody writes: the pipe ends with the process that holds its other end
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=wait, daemon=True).start()


def count_workers(number: int | None, device: torch.device, threads: int) -> int:
    """Set the threads of this process and return how many processes shall share the trials."""
    if not 1 <= threads <= 4096 or (number is not None and number < 1):
        raise LabError("--threads and --workers must be at least 1, and --threads at most 4096")
    import torch

    torch.set_num_threads(threads)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return number or (1 if device.type != "cpu" else max(1, cores // threads))


class Workers(Callback):
    """Runs the same command in further processes while an experiment runs.

    They start once the experiment is planned and its steps are timed, and end with it. `number` counts this
    process too.
    """

    def __init__(self, arguments: Sequence[str], number: int) -> None:
        self._arguments = [argument for argument in arguments if argument != "--fresh"]
        self._number = number
        self._others: list[subprocess.Popen[bytes]] = []

    def on_start(self, experiment: Experiment, records: Sequence[Record]) -> None:
        """Start the processes."""
        for _ in range(self._number - 1):
            self._others.append(
                subprocess.Popen(
                    [sys.executable, "-m", "steepest.lab", *self._arguments],
                    env={**os.environ, _WORKER: "1"},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    # It would say that it was interrupted; `on_end` tells of failures.
                    stderr=subprocess.DEVNULL,
                    # Ctrl-C reaches this process alone, which stops the others in turn.
                    start_new_session=True,
                )
            )

    def on_end(self) -> None:
        """Stop the processes; a trial that one of them has begun is given up."""
        for other in self._others:
            # What one stopped here exits with depends on where it was, for example in an import.
            if other.poll() not in (None, 0, INTERRUPTED):
                print(
                    f"a worker failed with status {other.returncode}; --workers 1 shows why", file=sys.stderr
                )
            assert other.stdin is not None
            other.stdin.close()
            other.send_signal(signal.SIGINT)
        for other in self._others:
            try:
                other.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                other.kill()
        self._others.clear()
