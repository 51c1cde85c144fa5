from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from steepest.lab.defaults import InteractionFormat
from steepest.lab.errors import LabError
from steepest.lab.tasks.sasrec.interactions import core_of, from_events, read_interactions

# Users and items with their times, not sorted; ann's jam and pie have the same time.
EVENTS = [("ann", "jam", 5), ("bob", "tea", 9), ("ann", "pie", 5), ("ann", "tea", 2), ("bob", "jam", 1)]
EVENTS += [("bob", "fig", 3), ("ann", "fig", 7)]
ANN, BOB = ["tea", "jam", "pie", "fig"], ["jam", "fig", "tea"]

FORMATS: dict[InteractionFormat, tuple[str, str]] = {
    "recbole": (
        "beauty.inter",
        "item_id:token\trating:float\tuser_id:token\ttimestamp:float\n"
        + "".join(f"{i}\t5.0\t{u}\t{t}\n" for u, i, t in EVENTS),
    ),
    "movielens": ("ratings.dat", "".join(f"{u}::{i}::4::{t}\n" for u, i, t in EVENTS)),
    "amazon-2014": ("ratings_Beauty.csv", "".join(f"{u},{i},5.0,{t}\n" for u, i, t in EVENTS)),
    "amazon-2018": ("All_Beauty.csv", "".join(f"{i},{u},5.0,{t}\n" for u, i, t in EVENTS)),
    "plain": ("beauty.txt", "".join(f"{u} {i}\n" for u, i, t in sorted(EVENTS, key=lambda e: e[2]))),
}
NAMED = [format for format in FORMATS if format != "amazon-2018"]


def sequences(path: Path, format: InteractionFormat | None = None, core: int = 1) -> list[list[int]]:
    data = read_interactions(path, format, core=core)
    return [part.tolist() for part in data.items.split(data.lengths.tolist())]


def write(directory: Path, format: InteractionFormat, text: str | None = None) -> Path:
    path = directory / FORMATS[format][0]
    path.write_text(FORMATS[format][1] if text is None else text)
    return path


@pytest.mark.parametrize("format", FORMATS)
def test_each_format_gives_the_same_sequences(format: InteractionFormat, tmp_path: Path) -> None:
    ids = {name: number for number, name in enumerate(dict.fromkeys(ANN + BOB), start=1)}
    expected = [[ids[name] for name in user] for user in (ANN, BOB)]
    if format == "plain":  # it has no times, so bob, whose first event is the earliest, comes first
        ids = {name: number for number, name in enumerate(dict.fromkeys(BOB + ANN), start=1)}
        expected = [[ids[name] for name in user] for user in (BOB, ANN)]
    path = write(tmp_path, format)
    assert sequences(path, format) == expected
    if format in NAMED:
        assert sequences(path) == expected


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("damage", ["short", "time"])
def test_a_malformed_line_is_named(format: InteractionFormat, damage: str, tmp_path: Path) -> None:
    lines = FORMATS[format][1].splitlines()
    lines[3] = lines[3][: len(lines[3]) // 3] if damage == "short" or format == "plain" else lines[3] + "x"
    with pytest.raises(LabError, match=rf"{FORMATS[format][0]}:4: expected \d fields"):
        read_interactions(write(tmp_path, format, "\n".join(lines) + "\n"), format)


def test_requests_that_cannot_be_served(tmp_path: Path) -> None:
    with pytest.raises(LabError, match=r"amazon-2014.*amazon-2018"):
        read_interactions(write(tmp_path, "amazon-2018"))
    with pytest.raises(LabError, match=r"cannot read .*ratings\.dat"):
        read_interactions(tmp_path / "ratings.dat")
    with pytest.raises(LabError, match=r":1: the header has no timestamp"):
        read_interactions(write(tmp_path, "recbole", "user_id:token\titem_id:token\n"))
    with pytest.raises(LabError, match="no interactions are left in the 5-core of 7"):
        read_interactions(write(tmp_path, "movielens"))
    with pytest.raises(LabError, match="no interactions are left"):
        read_interactions(write(tmp_path, "plain", ""))
    with pytest.raises(LabError, match="every user needs at least 3 items"):
        from_events([("ann", "tea", 0), ("ann", "jam", 1)], core=1)


def test_the_core_is_taken_until_nothing_changes() -> None:
    # A square of users 0 and 1 with items 0 and 1, and a chain to it: user 3 has one item; without her,
    # item 2 has one user; without it, user 2 has one item.
    edges = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 1), (2, 2), (3, 2)]
    users, items = np.array(edges).T
    assert core_of(users, items, 1).tolist() == list(range(7))
    assert core_of(users, items, 2).tolist() == [0, 1, 2, 3]
    assert core_of(users, items, 3).tolist() == []
    # A graph with many rounds, against removing one interaction at a time.
    random = np.random.default_rng(0)
    edges = sorted({(int(u), int(i)) for u, i in random.zipf(1.4, (700, 2)) if max(u, i) < 80})
    left = list(edges)
    while poor := [e for e in left if any(sum(e[side] == o[side] for o in left) < 5 for side in (0, 1))]:
        left.remove(poor[0])
    users, items = np.array(edges).T
    assert [edges[place] for place in core_of(users, items, 5)] == left
    assert 20 < len(left) < len(edges) / 2
