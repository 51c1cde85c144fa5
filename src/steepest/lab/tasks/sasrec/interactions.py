"""Who used which item when: readers, the iterative core, and leave-one-out splits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...defaults import InteractionFormat
from ...errors import LabError

Event = tuple[str, str, float]
"""User, item and time."""

# Separator (None: white space), number of fields, and which of them are user, item and time.
_Layout = tuple[str | None, int, tuple[int, int, int | None]]
_LAYOUTS: dict[InteractionFormat, _Layout] = {
    "movielens": ("::", 4, (0, 1, 3)),
    "amazon-2014": (",", 4, (0, 1, 3)),
    "amazon-2018": (",", 4, (1, 0, 3)),
    "plain": (None, 2, (0, 1, None)),
}

MIN_LENGTH = 3
"""A user needs an item to train on, one to validate and one to test."""


@dataclass(frozen=True)
class Interactions:
    """The sequences of all users, one after the other; ``LabError`` if one has fewer than 3 items."""

    items: Tensor
    """Items 1, …, `count`, int64, each user's in order of time."""
    lengths: Tensor
    """The number of items of each user, int64."""
    count: int
    source: str

    def __post_init__(self) -> None:
        if not len(self.lengths) or int(self.lengths.min()) < MIN_LENGTH:
            raise LabError(f"{self.source}: every user needs at least {MIN_LENGTH} items")

    @property
    def users(self) -> int:
        """The number of users."""
        return len(self.lengths)

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits of a hash of the sequences."""
        return hashlib.sha256(torch.cat((self.items, self.lengths)).numpy().tobytes()).hexdigest()[:12]

    def held_out(self, back: int) -> Tensor:
        """Return each user's item `back` places from the end: 1 for the test, 2 for the validation."""
        return self.items[self.lengths.cumsum(0) - back]

    def histories(self, back: int, width: int) -> Tensor:
        """Return each user's last `width` items before the item `back` places from the end, padded with 0.

        Example:
            >>> data = Interactions(torch.tensor([1, 2, 3, 4, 5, 1, 2]), torch.tensor([4, 3]), 5, "example")
            >>> data.histories(2, 3), data.held_out(2)
            (tensor([[0, 1, 2],
                     [0, 0, 5]]), tensor([3, 1]))
        """
        ends = self.lengths.cumsum(0)
        index = (ends - back).unsqueeze(1) + torch.arange(-width, 0)
        inside = index >= (ends - self.lengths).unsqueeze(1)
        return self.items[index.clamp(min=0)] * inside

    def seen(self, back: int) -> tuple[Tensor, Tensor]:
        """Return all (users, items) before the item `back` places from the end, sorted by user."""
        users = torch.repeat_interleave(torch.arange(self.users), self.lengths)
        places = torch.arange(len(self.items)) - (self.lengths.cumsum(0) - self.lengths)[users]
        before = places < (self.lengths - back)[users]
        return users[before], self.items[before]


def read_interactions(path: Path, format: InteractionFormat | None = None, core: int = 5) -> Interactions:
    """Read a file of interactions.

    Ratings are not read: every interaction counts, as in the SASRec paper. Interactions of one user at the
    same time stay in the file's order.

    Args:
        path: The file.
        format: By default `.inter` is RecBole, `ratings.dat` MovieLens, `ratings_*.csv` Amazon 2014, and any
            other file that is not a CSV is plain `user item`. The two editions of Amazon's CSV differ in the
            order of user and item, which a file does not tell.
        core: Users and items with fewer interactions are dropped, again and again until none is left.

    Raises:
        LabError: the file cannot be read, its name does not tell the format, a line is malformed (with its
            number), or too few interactions are left.
    """
    format = format or _find_format(path)
    try:
        with path.open(encoding="utf-8") as file:
            layout = _recbole_layout(path, next(file, "")) if format == "recbole" else _LAYOUTS[format]
            events = list(_events(path, enumerate(file, 2 if format == "recbole" else 1), *layout))
    except OSError as error:
        raise LabError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError:
        raise LabError(f"{path} is not UTF-8 text") from None
    return from_events(events, core=core, source=path.name)


def from_events(events: Sequence[Event], *, core: int = 5, source: str = "events") -> Interactions:
    """Return the sorted `core`, its items numbered as they first appear; ``LabError`` if it is empty."""
    import pandas as pd  # slow to import, and every command imports the tasks

    users, _ = pd.factorize(np.array([event[0] for event in events], dtype=object))
    items, _ = pd.factorize(np.array([event[1] for event in events], dtype=object))
    kept = core_of(users, items, max(core, 1))
    times = np.array([event[2] for event in events], dtype=np.float64)[kept]
    users, items = users[kept], items[kept]
    if not len(users):
        raise LabError(f"{source}: no interactions are left in the {core}-core of {len(events)}")
    order = np.lexsort((times, users))  # stable
    codes, unique = pd.factorize(items[order])
    lengths = np.unique(users, return_counts=True)[1]
    return Interactions(
        torch.from_numpy(codes + 1).long(), torch.from_numpy(lengths).long(), len(unique), source
    )


def core_of(users: np.ndarray, items: np.ndarray, k: int) -> np.ndarray:
    """Return the positions of the interactions in the k-core: each user and item left has at least k of them.

    `users` and `items` have a code 0, 1, … for each interaction.
    """
    kept = np.arange(len(users))
    while True:
        u, i = users[kept], items[kept]
        enough = (np.bincount(u)[u] >= k) & (np.bincount(i)[i] >= k)
        if enough.all():
            return kept
        kept = kept[enough]


def _find_format(path: Path) -> InteractionFormat:
    if path.suffix == ".inter":
        return "recbole"
    if path.name == "ratings.dat":
        return "movielens"
    if path.suffix == ".csv":
        if path.name.startswith("ratings_"):
            return "amazon-2014"
        raise LabError(f"{path}: say whether it is user,item (amazon-2014) or item,user (amazon-2018)")
    return "plain"


def _recbole_layout(path: Path, header: str) -> _Layout:
    # A header such as user_id:token<TAB>item_id:token<TAB>timestamp:float names and types the columns.
    names = [column.split(":")[0] for column in header.rstrip("\r\n").split("\t")]
    if missing := {"user_id", "item_id", "timestamp"} - set(names):
        raise LabError(f"{path}:1: the header has no {', '.join(sorted(missing))}")
    return "\t", len(names), (names.index("user_id"), names.index("item_id"), names.index("timestamp"))


def _events(
    path: Path,
    lines: Iterable[tuple[int, str]],
    separator: str | None,
    fields: int,
    columns: tuple[int, int, int | None],
) -> Iterator[Event]:
    user, item, time = columns
    for number, line in lines:
        values = line.rstrip("\r\n").split(separator)
        try:
            if len(values) != fields:
                raise ValueError
            yield values[user], values[item], 0.0 if time is None else float(values[time])
        except ValueError:
            raise LabError(
                f"{path}:{number}: expected {fields} fields{', one of them a time' * (time is not None)}, "
                f"got {line.strip()[:60]!r}"
            ) from None
