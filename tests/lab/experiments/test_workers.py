"""Several processes on one experiment, in SQLite and in PostgreSQL; a worker that is killed."""

from __future__ import annotations

import getpass
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url

from processes import Fork
from steepest.lab import LabError
from steepest.lab.experiments import run, storage
from steepest.lab.records import Record

from . import worker_job
from .test_resume import outcome


def _postgres(program: str) -> str | None:
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)]))


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """The URL of a server that lives as long as the tests, on a socket of its own."""
    pytest.importorskip("psycopg")
    initdb, server = _postgres("initdb"), _postgres("postgres")
    if initdb is None or server is None:
        pytest.skip("PostgreSQL is not installed")
    # The server does not run as root, and another user cannot enter pytest's folders.
    user = "postgres" if os.geteuid() == 0 else getpass.getuser()
    prefix = [] if os.geteuid() else ["runuser", "-u", user, "--"]
    home = Path(tempfile.mkdtemp(prefix="steepest-postgres-"))
    if prefix:
        if shutil.which("runuser") is None:
            pytest.skip("PostgreSQL does not run as root, and there is no runuser")
        shutil.chown(home, user)
    data = str(home / "data")
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": home}
    options = ["-D", data, "-U", user, "-A", "trust", "--no-sync", "--no-instructions", "-E", "UTF8"]
    subprocess.run([*prefix, initdb, *options], check=True, **quiet)
    settings = ["-c", "listen_addresses=", "-c", f"unix_socket_directories={home}", "-c", "fsync=off"]
    process = subprocess.Popen([*prefix, server, "-D", data, *settings], **quiet)
    url = f"postgresql+psycopg://{user}@/postgres?host={home}"
    try:
        wait_for_server(url)
        yield url
    finally:
        pid = int((home / "data" / "postmaster.pid").read_text().split()[0])
        os.kill(pid, signal.SIGQUIT)  # at once, as nobody needs the data
        process.wait(20)
        shutil.rmtree(home)


def wait_for_server(url: str) -> None:
    import time

    import psycopg

    for _ in range(100):
        try:
            psycopg.connect(url.replace("+psycopg", "")).close()
        except psycopg.OperationalError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError("the server does not answer")


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> str:
    if request.param == "sqlite":
        return ""
    address = request.getfixturevalue("postgres")
    database = f"test_{abs(hash(request.node.name))}"
    import psycopg

    with psycopg.connect(address.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {database}")  # type: ignore[call-overload]
    return str(address.replace("/postgres?", f"/{database}?"))


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((storage, "HEARTBEAT_SECONDS"), (storage, "GRACE_SECONDS"), (run, "_WAIT_SECONDS")):
        monkeypatch.setattr(module, name, getattr(module, name))  # `work` sets them; this restores them


class Worker:
    """Another process, for one experiment after the other."""

    def __init__(self) -> None:
        self.fork = Fork("lab.experiments.worker_job")

    def begin(self, directory: Path, url: str, hang: str = "", plan: int = 0) -> None:
        if not self.fork.process.is_alive():
            self.fork = Fork("lab.experiments.worker_job")
        self.fork.connection.send((directory, url, hang, plan))

    def said(self) -> Any:
        return self.fork.connection.recv()

    def kill(self) -> None:
        self.fork.kill()


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.kill()


def key(record: Record) -> list[Any]:
    return [record.phase, record.seed, record.searched.get("lr")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """The records of one process."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in (
            (storage, "HEARTBEAT_SECONDS"),
            (storage, "GRACE_SECONDS"),
            (run, "_WAIT_SECONDS"),
        ):
            patch.setattr(module, name, getattr(module, name))
        return worker_job.work(
            tmp_path_factory.mktemp("alone"), None, worker_job.Tell(), worker_job.make_task(0)
        ).records


def assert_each_once(begun: list[Any], records: list[Record]) -> None:
    """Every trial was begun once, and recorded."""
    assert sorted(begun, key=str) == sorted(map(key, records), key=str)


def test_two_processes_share_the_trials(
    worker: Worker, url: str, tmp_path: Path, alone: list[Record]
) -> None:
    worker.begin(tmp_path, url)
    theirs = [worker.said()]
    tell = worker_job.Tell()
    result = worker_job.work(tmp_path, url, tell)
    theirs += iter(worker.said, "done")
    assert tell.begun
    assert_each_once(theirs + tell.begun, result.records)
    assert len(result.records) == 6 + 2 + 2
    assert sorted(outcome(result.records), key=str) == sorted(outcome(alone), key=str)


def test_the_trial_of_a_killed_worker_is_run_again(
    worker: Worker, url: str, tmp_path: Path, alone: list[Record]
) -> None:
    worker.begin(tmp_path, url, hang="trial")
    done, killed = iter(worker.said, "hangs")
    worker.kill()
    tell = worker_job.Tell()
    result = worker_job.work(tmp_path, url, tell)
    assert killed in tell.begun
    assert done not in tell.begun
    assert sorted(outcome(result.records), key=str) == sorted(outcome(alone), key=str)


def test_a_worker_killed_within_the_lock_leaves_it_to_the_next(
    worker: Worker, url: str, tmp_path: Path, alone: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed when the next one says that it waits for it, which it does only in another's lock."""

    class KillsWorker(io.StringIO):
        def write(self, text: str) -> int:
            worker.kill()
            return super().write(text)

    said = KillsWorker()
    monkeypatch.setattr(sys, "stderr", said)
    monkeypatch.setattr(storage, "_PATIENCE_SECONDS", 0.5)
    worker.begin(tmp_path, url, hang="lock")
    (done,) = iter(worker.said, "hangs")
    os.kill(worker.fork.process.pid, signal.SIGSTOP)  # as Ctrl-Z would
    tell = worker_job.Tell()
    result = worker_job.work(tmp_path, url, tell)
    worker.kill()
    (line,) = said.getvalue().splitlines()
    assert line.startswith("waiting for the process that has locked ")
    assert (make_url(url).database if url else str(tmp_path / "study.db")) in line
    assert ["search", 0, worker_job.CELLS[1]] in tell.begun
    assert done not in tell.begun
    assert sorted(outcome(result.records), key=str) == sorted(outcome(alone), key=str)


@pytest.mark.parametrize("error", [None, LabError("of the block")])
def test_a_database_lost_within_the_lock_is_one_line(
    postgres: str, tmp_path: Path, error: Exception | None
) -> None:
    import psycopg

    shared = storage.Storage(tmp_path, "shared", postgres)

    def lose() -> None:
        with shared.lock():
            with psycopg.connect(postgres.replace("+psycopg", ""), autocommit=True) as connection:
                connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid != pg_backend_pid()"
                )
            if error:
                raise error

    with pytest.raises(LabError, match=r"cannot use the storage .*connection") as raised:
        lose()
    assert "\n" not in str(raised.value)
    with shared.lock():
        pass
