from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import steepest
from steepest.lab import LabError
from steepest.lab.bench.groups import select_groups
from steepest.lab.bench.peers import REDUNDANT
from steepest.lab.bench.sections import steps

from .fakes import config


def test_every_optimizer_is_measured_eager_and_compiled() -> None:
    cases = [case for group in select_groups() for case in group.cases if case.ours]
    for name in set(steepest.list_optimizers()) - {"orthogonalized"}:
        assert {case.how for case in cases if case.rule == name} == {"eager", "compiled"}, name


def test_on_cuda_every_optimizer_is_also_replayed_as_a_graph() -> None:
    cases = [e for g in select_groups(device="cuda") for e in g.cases if e.ours]
    labels = {how: [e.label for e in cases if e.how == how] for how in ("eager", "compiled", "graph")}
    assert labels["eager"] == labels["compiled"] == labels["graph"]
    for without in (select_groups(), select_groups(device="cuda", compiled=False)):
        assert not any(e.how == "graph" for g in without for e in g.cases)


def test_a_note_lists_the_omitted_peers() -> None:
    def notes(subset: str, full: bool, peers: bool = True) -> list[str]:
        chosen = [g for g in select_groups(full=full, peers=peers) if g.subset == subset]
        return steps._omitted_notes(chosen, replace(config(*chosen), full=full))

    (note,) = notes("attention", full=False)
    assert note.endswith("heavyball's PSGDKron.")
    assert notes("attention", full=True) == notes("hidden", full=False) == []
    assert notes("attention", full=False, peers=False) == []


def test_psgd_in_bfloat16_needs_full_or_bfloat16_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    def labels(**options: Any) -> set[str]:
        return {e.label for g in select_groups(["quad"], peers=False, **options) for e in g.cases}

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert labels(full=False) == {"quad"}
    for options in ({"full": True}, {"full": False, "device": "cuda"}):
        assert labels(**options) == {"quad", "quad bfloat16"}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert labels(full=False) == {"quad", "quad bfloat16"}


def test_keys_are_unique_within_a_group() -> None:
    for group in select_groups():
        assert len({case.key for case in group.cases}) == len(group.cases)


def test_steepests_cases_come_first_in_a_group() -> None:
    for group in select_groups():
        own = [case.ours for case in group.cases]
        assert own == sorted(own, reverse=True)
        assert own[0]
        assert {e.rule for e in group.cases if not e.ours} <= {e.rule for e in group.cases if e.ours}


def test_named_optimizers_are_measured_with_their_peers_only() -> None:
    (group,) = select_groups(["lion"])
    assert {case.rule for case in group.cases} == {"lion"}
    assert {case.source for case in group.cases} >= {"steepest", "lion_pytorch", "optimi"}
    (alone,) = select_groups(["lion"], eager=False, peers=False)
    assert [case.how for case in alone.cases] == ["compiled"]


def test_peers_of_other_rules_are_omitted() -> None:
    for group in select_groups(["quad"]):
        assert {case.source for case in group.cases} == {"steepest", "quad_torch"}


@pytest.mark.parametrize(
    ("optimizers", "options", "message"),
    [
        (["lino"], {}, r"'lino'.*lion"),
        (["orthogonalized"], {}, "base class"),
        (["lion"], {"eager": False, "compiled": False}, "neither"),
    ],
)
def test_invalid_selections_are_rejected(
    optimizers: list[str], options: dict[str, bool], message: str
) -> None:
    with pytest.raises(LabError, match=message):
        select_groups(optimizers, **options)


def test_redundant_peers_need_full() -> None:
    both = [{(g.name, e.label) for g in select_groups(full=full) for e in g.cases} for full in (True, False)]
    assert both[0] - both[1] == REDUNDANT
