"""Several processes on one experiment, in SQLite and in PostgreSQL; a worker that is killed."""

from __future__ import annotations

import getpass
import multiprocessing
import os
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

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
        os.kill(pid, 2)
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


# Each worker is forked from a process that has only imported the lab, once for all tests, and Dynamo, which
# torch imports with the first optimizer.
WORKERS = multiprocessing.get_context("forkserver")
WORKERS.set_forkserver_preload(["steepest.lab", "torch._dynamo"])


def start(directory: Path, url: str, *, hang: bool = False) -> tuple[BaseProcess, Connection]:
    ours, theirs = WORKERS.Pipe(duplex=False)
    process = WORKERS.Process(target=worker_job.main, args=(directory, url, hang, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


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


def test_two_processes_share_the_trials(url: str, tmp_path: Path, alone: list[Record]) -> None:
    other, told = start(tmp_path, url)
    theirs = [told.recv()]
    tell = worker_job.Tell()
    result = worker_job.work(tmp_path, url, tell)
    other.join(60)
    assert other.exitcode == 0
    while told.poll():
        try:
            theirs.append(told.recv())
        except EOFError:
            break
    assert tell.begun
    assert Counter(map(str, theirs + tell.begun)) == Counter(str(key(record)) for record in result.records)
    assert len(result.records) == 6 + 2 + 2
    assert sorted(outcome(result.records), key=str) == sorted(outcome(alone), key=str)


def test_the_trial_of_a_killed_worker_is_run_again(url: str, tmp_path: Path, alone: list[Record]) -> None:
    other, told = start(tmp_path, url, hang=True)
    done, killed, hangs = (told.recv() for _ in range(3))
    assert hangs == "hangs"
    other.kill()
    other.join(60)
    tell = worker_job.Tell()
    result = worker_job.work(tmp_path, url, tell, grace=2)
    assert killed in tell.begun
    assert done not in tell.begun
    assert sorted(outcome(result.records), key=str) == sorted(outcome(alone), key=str)
