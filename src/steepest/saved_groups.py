"""Compare how a state dict groups the parameters with how the optimizer does, and name both sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from steepest.migrations import Source, recognize
from steepest.rule import Group

__all__ = ["check_group_count", "check_group_size"]

_MOST_GROUPS, _MOST_NAMES = 8, 3
_SAME_GROUPS = "with the same groups, in their order"


def check_group_count(groups: Sequence[Group], loaded: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if a state dict has another number of groups; the message begins as torch's."""
    saved = loaded["param_groups"]
    if len(saved) == len(groups):
        return
    sources = [_source(each, loaded["state"], groups[0]) for each in saved]
    theirs = [_label(each, source) for each, source in zip(saved, sources, strict=True)]
    ours = [_label(each, None) for each in groups]
    raise ValueError(
        "loaded state dict has a different number of parameter groups: saved with "
        f"{len(saved)} group{'s' * (len(saved) != 1)} ({_listed(theirs)}), this optimizer has "
        f"{len(ours)} ({_listed(ours)}); nothing was loaded{_advice(groups, saved, sources)}"
    )


def check_group_size(index: int, ours: Group, theirs: Group, source: Source | None = None) -> None:
    """Raise ``ValueError`` if a group has another number of parameters; the message begins as torch's."""
    count, here = len(theirs["params"]), len(ours["params"])
    if count == here:
        return
    words = (
        "loaded state dict contains a parameter group that doesn't match the size of optimizer's group: "
        f"group {index} ({_label(theirs, source)}) was saved with {count} parameter{'s' * (count != 1)}, "
        f"this optimizer's has {here}"
    )
    saved_names, names = theirs.get("param_names"), ours.get("param_names")
    if saved_names and names:
        for what, some, others in (("saved", saved_names, names), ("here", names, saved_names)):
            if only := [repr(name) for name in some if name not in set(others)]:
                words += f"; only {what}: {', '.join(_abridged(only, _MOST_NAMES))}"
    raise ValueError(words)


def _source(group: Group, states: Mapping[Any, Mapping[str, Any]], ours: Group) -> Source | None:
    """Return the other library's optimizer that a group was saved by, if it is one and known."""
    if "rule" in group:
        return None
    return recognize(group, [states[key] for key in group["params"] if states.get(key)], ours)


def _label(group: Group, source: Source | None) -> str:
    if "rule" in group:
        return str(group.get("name", group["rule"]))
    return "another optimizer's" if source is None else source.name


def _listed(labels: Sequence[str]) -> str:
    return "; ".join(_abridged(labels, _MOST_GROUPS))


def _abridged(words: Sequence[str], most: int) -> list[str]:
    return [*words[:most], *["…"] * (len(words) > most)]


def _advice(groups: Sequence[Group], saved: Sequence[Group], sources: Sequence[Source | None]) -> str:
    """Return a sentence that says which optimizer loads the groups, or nothing where none is known."""
    if saved and all("rule" in group for group in saved):
        rules = dict.fromkeys(group["rule"] for group in saved)
        if rules.keys() == {group["rule"] for group in groups}:
            return f". Make the optimizer {_SAME_GROUPS}"
        named = " and ".join(map(repr, rules))
        return f". Make the optimizer with the rule{'s' * (len(rules) > 1)} of the saved one, {named}"
    peer = sources[0].peer if sources and sources[0] is not None else ""
    if not peer or any(source is not sources[0] for source in sources):
        return ""
    if len(saved) == 1:
        return f". Load it into steepest.{peer}(model.parameters())"
    return f". Load it into steepest.{peer} {_SAME_GROUPS}"
