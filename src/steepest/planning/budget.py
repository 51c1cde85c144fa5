"""Choose the best-ranked rule and state format of each tensor with which a model fits into a budget."""

from __future__ import annotations

import heapq
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch

from steepest.explain import byte_words, starred
from steepest.hyperparameters import COMMON_OPTIONS, StateDtype
from steepest.planning.memory import Plan, PlanRow
from steepest.registry import optimizer_class
from steepest.routing.build import build
from steepest.routing.options import Options, as_options
from steepest.rule import find_rule

__all__ = ["FORMATS", "Choice", "choose", "descend", "parse_bytes"]

FORMATS: tuple[StateDtype, ...] = (None, torch.bfloat16, "int8")
"""The formats of state among which a budget chooses by default, from the best to the last resort."""

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b\s*", re.IGNORECASE)
# Mixtures that are planned before the one with the least state is taken.
_MOST_PLANS = 64
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
# Arguments of build() that are no options of a group.
_BUILD = [
    name
    for name, each in inspect.signature(build).parameters.items()
    if each.kind is each.KEYWORD_ONLY and name not in ("lr", "fallback", "fallback_lr", "memory")
]


def parse_bytes(budget: int | str) -> int:
    """Return a number of bytes, given as such or with a unit of 1000s or, with an i, of 1024s.

    >>> parse_bytes("22GB"), parse_bytes("1.5 GiB"), parse_bytes(10**6)
    (22000000000, 1610612736, 1000000)
    """
    if isinstance(budget, int) and not isinstance(budget, bool) and budget > 0:
        return budget
    found = _SIZE.fullmatch(budget) if isinstance(budget, str) else None
    count = 0
    if found is not None:
        number, unit, binary = found.groups()
        count = int(float(number) * (1024 if binary else 1000) ** _POWERS[unit.lower()])
    if count < 1:
        raise ValueError(
            f"budget must be a number of bytes > 0, or a string such as '22GB' or '800 MiB', got {budget!r}"
        )
    return count


@dataclass(frozen=True)
class Choice:
    """A rank of one tensor.

    Attributes:
        options: the rule with its options, and the state's format.
        state_bytes: of the tensor.
        temporary_bytes: of a step of all tensors of its shape with this rule and format.
        hidden: whether the tensor is one that rules for the matrices of hidden layers take.
    """

    options: Options
    state_bytes: int
    temporary_bytes: int = 0
    hidden: bool = False

    @property
    def words(self) -> str:
        """The rule and the format."""
        form = self.options["state_dtype"]
        stored = "the parameter's dtype" if form is None else str(form).removeprefix("torch.")
        return f"{self.options['rule']!r} in {stored}"


def choose(
    planned: Callable[[Mapping[str, Any]], Plan],
    rows_of: Callable[[Mapping[str, Any]], list[tuple[PlanRow, int]]],
    ranked: Sequence[str | Mapping[str, Any]],
    formats: Sequence[StateDtype],
    limit: int,
    options: Mapping[str, Any],
) -> Plan:
    """Return the plan of the best-ranked optimizer that fits into ``limit`` bytes; see :func:`plan`.

    Args:
        planned: makes a plan of arguments of :func:`steepest.build`.
        rows_of: makes the rows alone, each with the temporaries of the tensors of its shape.
        ranked: rules, or their options including ``"rule"``.
        formats: of the state.
        limit: bytes.
        options: further arguments of :func:`steepest.build`.
    """
    for what, value, example in (
        ("rules", ranked, "['muon', 'lion']"),
        ("state_dtypes", formats, "[None, torch.bfloat16, 'int8']"),
    ):
        if isinstance(value, (str, Mapping, torch.dtype)) or not isinstance(value, Iterable):
            raise TypeError(f"{what} must be a list, such as {example}, got {value!r}")
    formats = tuple(formats)
    rules = [_entry(f"rules[{at}]", each) for at, each in enumerate(ranked)]
    if not rules or not formats:
        raise ValueError("rules and state_dtypes must have at least one entry each")
    given = dict(options)
    told = "fallback" in given
    rest = _entry("fallback", given.pop("fallback", "adamw"))
    if "fallback_lr" in given:
        rest["lr"] = given.pop("fallback_lr")
    shared = {name: given.pop(name) for name in (*_BUILD, *COMMON_OPTIONS) if name in given}
    rules[0] = {**given, **rules[0]}

    base = rows_of(_arguments(rules, rest, formats[0], shared, {}))
    levels = _levels(rows_of, rules, rest, told, formats, shared, [row for row, _ in base])
    size = {row.name: row.numel for row, _ in base}
    fixed = sum(row.parameter_bytes + row.gradient_bytes for row, _ in base)
    fixed += sum(row.state_bytes - row.host_bytes for row, _ in base if row.name not in levels)
    floor = max((held for row, held in base if row.name not in levels), default=0)

    def made(ranks: Mapping[str, int]) -> Plan:
        chosen = {name: levels[name][rank] for name, rank in ranks.items()}
        found = planned(_arguments(rules, rest, formats[0], shared, chosen))
        rows = [_moved(row, levels.get(row.name, ()), ranks.get(row.name, 0)) for row in found.rows]
        return replace(found, rows=tuple(rows), budget=limit)

    needs = {each.temporary_bytes for own in levels.values() for each in own}
    bounds = sorted({max(floor, each) for each in needs}) or [floor]
    heap: list[tuple[int, int, int, int, dict[str, int]]] = []

    def search(bound: int, room: int) -> None:
        if (ranks := descend(levels, size, room, bound)) is not None:
            cost = sum(size[name] * rank for name, rank in ranks.items())
            state = sum(levels[name][rank].state_bytes for name, rank in ranks.items())
            heapq.heappush(heap, (cost, state, bound, room, ranks))

    for bound in bounds:
        search(bound, limit - fixed - bound)
    for _ in range(_MOST_PLANS):
        if not heap:
            break
        _, state, bound, room, ranks = heapq.heappop(heap)
        result = made(ranks)
        if result.total_bytes <= limit:
            return result
        # Temporaries of a mixture may exceed the largest of its parts, and owners may change.
        search(bound, min(room - (result.total_bytes - limit), state - 1))
    smallest = min((made(each) for each in _least(levels, bounds)), key=lambda each: each.total_bytes)
    if smallest.total_bytes <= limit:
        return smallest
    raise ValueError(
        f"found nothing that fits into {limit:,} bytes: the least found with these rules and state_dtypes "
        f"takes {smallest.total_bytes:,} bytes ({byte_words(smallest.total_bytes)}), of which parameters "
        f"{byte_words(smallest.parameter_bytes)}, gradients {byte_words(smallest.gradient_bytes)}, state "
        f"{byte_words(smallest.state_bytes - smallest.host_bytes)}, temporaries "
        f"{byte_words(smallest.temporary_bytes)}"
    )


def _entry(what: str, value: str | Mapping[str, Any]) -> Options:
    options = as_options(what, value)
    if "rule" not in options:
        raise ValueError(f"{what} names no rule: {options!r}")
    return {**options, "rule": optimizer_class(options["rule"]).rule.name}


def _levels(
    rows_of: Callable[[Mapping[str, Any]], list[tuple[PlanRow, int]]],
    rules: Sequence[Options],
    rest: Options,
    told: bool,
    formats: Sequence[StateDtype],
    shared: Mapping[str, Any],
    base: Sequence[PlanRow],
) -> dict[str, list[Choice]]:
    """Return the choices of each tensor that has any, from the best to the last resort."""
    has_fallback = any(find_rule(each["rule"]).hidden_only for each in rules)
    by_rule: list[dict[str, list[Choice]]] = []
    for entry in [*rules, *[rest] * has_fallback]:
        own: dict[str, list[Choice]] = {}
        for form in [entry["state_dtype"]] if "state_dtype" in entry else formats:
            chosen = {**entry, "state_dtype": form}
            for row, held in rows_of(_arguments([entry], rest, form, shared, {})):
                if row.rule == entry["rule"] and not row.frozen:
                    each = Choice(chosen, row.state_bytes - row.host_bytes, held)
                    own.setdefault(row.name, []).append(each)
        by_rule.append(own)
    last = by_rule.pop() if has_fallback else {}
    levels = {}
    for row in base:
        takes = [own[row.name] for own in by_rule if row.name in own]
        hidden = [find_rule(each[0].options["rule"]).hidden_only for each in takes]
        if not any(hidden) and row.name in last and (told or not takes):
            takes.insert(0, last[row.name])
        if takes:
            levels[row.name] = [replace(each, hidden=any(hidden)) for own in takes for each in own]
    return levels


def descend(
    levels: Mapping[str, Sequence[Choice]], size: Mapping[str, int], room: int, bound: float
) -> dict[str, int] | None:
    """Return ranks with which the state fits into ``room`` bytes, at a small sum of ``size`` × rank; or None.

    Tensors go down, one move at a time, by the most bytes saved for each element and rank. This is the greedy
    solution of the linear relaxation, which the last move exceeds; then they go up where there is room.

    Args:
        levels: the choices of each tensor by its name.
        size: their elements.
        room: bytes.
        bound: on the temporaries of choices that may be taken.
    """
    allowed = {
        name: [rank for rank, each in enumerate(own) if each.temporary_bytes <= bound]
        for name, own in levels.items()
    }
    if not all(allowed.values()):
        return None
    ranks = {name: own[0] for name, own in allowed.items()}
    used = sum(levels[name][rank].state_bytes for name, rank in ranks.items())
    order = {name: at for at, name in enumerate(levels)}

    def move(name: str) -> tuple[float, int, str, int] | None:
        """Return the move that saves the most for its cost, for a heap."""
        now = ranks[name]
        kept = levels[name][now].state_bytes
        moves = [
            ((kept - levels[name][rank].state_bytes) / (max(1, size[name]) * (rank - now)), rank)
            for rank in allowed[name]
            if rank > now and levels[name][rank].state_bytes < kept
        ]
        best = max(moves, default=None)
        return None if best is None else (-best[0], order[name], name, best[1])

    heap = [each for name in levels if (each := move(name)) is not None]
    heapq.heapify(heap)
    while used > room:
        if not heap:
            return None
        _, _, name, rank = heapq.heappop(heap)
        used += levels[name][rank].state_bytes - levels[name][ranks[name]].state_bytes
        ranks[name] = rank
        if (further := move(name)) is not None:
            heapq.heappush(heap, further)
    for name in sorted(ranks, key=lambda name: (-size[name] * ranks[name], order[name])):
        for rank in allowed[name]:
            more = levels[name][rank].state_bytes - levels[name][ranks[name]].state_bytes
            if rank < ranks[name] and used + more <= room:
                used, ranks[name] = used + more, rank
                break
    return ranks


def _least(levels: Mapping[str, Sequence[Choice]], bounds: Sequence[int]) -> list[dict[str, int]]:
    """Return for each bound on temporaries the ranks with the fewest bytes of state."""
    found = []
    for bound in bounds:
        fewest = {
            name: min(
                (each.state_bytes, each.temporary_bytes, rank)
                for rank, each in enumerate(own)
                if each.temporary_bytes <= bound
            )[2]
            for name, own in levels.items()
            if any(each.temporary_bytes <= bound for each in own)
        }
        if len(fewest) == len(levels):
            found.append(fewest)
    return found or [{}]


def _arguments(
    rules: Sequence[Options],
    rest: Options,
    form: StateDtype,
    shared: Mapping[str, Any],
    chosen: Mapping[str, Choice],
) -> dict[str, Any]:
    """Return arguments of build(), with an override for every choice that is not the default."""
    used = [each.options for each in chosen.values()]

    def is_used(entry: Options) -> bool:
        return any(entry.items() <= each.items() for each in used)

    main = next((each for each in rules if is_used(each)), rules[0])
    # Where the user gave several rules for all tensors, the best of those used is the fallback.
    general = [each for each in rules if not find_rule(each["rule"]).hidden_only and is_used(each)]
    fallback = rest if is_used(rest) or not general else general[0]
    arguments: dict[str, Any] = {"state_dtype": form, **main}
    if find_rule(main["rule"]).hidden_only:
        arguments["fallback"] = fallback
    table = {**_overrides(main, fallback, form, chosen), **(shared.get("overrides") or {})}
    return {**arguments, **shared, **({"overrides": table} if table else {})}


def _overrides(
    main: Options, fallback: Options, form: StateDtype, chosen: Mapping[str, Choice]
) -> dict[str, Options]:
    """Return overrides for the tensors whose choice is not the one that build() makes by itself.

    Tensors whose names differ only in numbers share a pattern, and the few that differ follow by name.
    """
    takes_all = not find_rule(main["rule"]).hidden_only
    together: dict[str, list[str]] = {}
    usual: dict[str, Options] = {}
    for name, each in chosen.items():
        together.setdefault(starred(name), []).append(name)
        usual[name] = {"state_dtype": form, **(main if each.hidden or takes_all else fallback)}
    table: dict[str, Options] = {}
    for pattern, names in together.items():
        most = max((chosen[name].options for name in names), key=[chosen[n].options for n in names].count)
        rest = [name for name in names if chosen[name].options != most]
        # Options of both are merged, so that the later ones must set all of the earlier ones.
        merges = all(most.keys() <= chosen[name].options.keys() for name in rest)
        own = [name for name in chosen if fnmatchcase(name, pattern)] == names
        if len(names) > 1 and own and merges and most != usual[names[0]]:
            table[pattern] = dict(most)
            names = rest
        else:
            names = [name for name in names if chosen[name].options != usual[name]]
        table |= {name: dict(chosen[name].options) for name in names}
    return table


def _moved(row: PlanRow, own: Sequence[Choice], rank: int) -> PlanRow:
    if rank == 0:
        return row
    saved = own[0].state_bytes - own[rank].state_bytes
    words = f"choice {rank + 1} of {len(own)}, {own[rank].words}, instead of {own[0].words}"
    return replace(row, moved=f"{words}, saves {byte_words(saved)} each")
