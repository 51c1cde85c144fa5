from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import steepest
from steepest.lab import LabError
from steepest.lab.bench.families import families
from steepest.lab.bench.peers import REPEATED
from steepest.lab.bench.sections import steps

from .made_up import setting


def test_every_optimizer_is_measured_eager_and_compiled() -> None:
    entries = [entry for family in families() for entry in family.entries if entry.ours]
    for name in set(steepest.list_optimizers()) - {"orthogonalized"}:
        assert {entry.how for entry in entries if entry.rule == name} == {"eager", "compiled"}, name


def test_on_cuda_each_is_replayed_as_a_graph_too() -> None:
    entries = [e for f in families(device="cuda") for e in f.entries if e.ours]
    labels = {how: [e.label for e in entries if e.how == how] for how in ("eager", "compiled", "graph")}
    assert labels["eager"] == labels["compiled"] == labels["graph"]
    for without in (families(), families(device="cuda", compiled=False)):
        assert not any(e.how == "graph" for f in without for e in f.entries)


def test_what_is_left_out_is_said_where_it_would_be() -> None:
    def said(where: str, full: bool, peers: bool = True) -> list[str]:
        chosen = [f for f in families(full=full, peers=peers) if f.where == where]
        return steps._left_out(chosen, replace(setting(*chosen), full=full))

    (note,) = said("attention", full=False)
    assert note.endswith("heavyball's PSGDKron.")
    assert said("attention", full=True) == said("hidden", full=False) == []
    assert said("attention", full=False, peers=False) == []


def test_psgd_in_bfloat16_is_left_to_who_need_not_emulate_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def labels(**given: Any) -> set[str]:
        return {e.label for f in families(["quad"], peers=False, **given) for e in f.entries}

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert labels(full=False) == {"quad"}
    for given in ({"full": True}, {"full": False, "device": "cuda"}):
        assert labels(**given) == {"quad", "quad bfloat16"}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert labels(full=False) == {"quad", "quad bfloat16"}


def test_keys_tell_a_familys_entries_apart() -> None:
    for family in families():
        assert len({entry.key for entry in family.entries}) == len(family.entries)


def test_ours_come_first_so_that_a_family_has_somebody_to_compare_with() -> None:
    for family in families():
        own = [entry.ours for entry in family.entries]
        assert own == sorted(own, reverse=True)
        assert own[0]
        assert {e.rule for e in family.entries if not e.ours} <= {e.rule for e in family.entries if e.ours}


def test_named_ones_bring_their_peers_and_nobody_else() -> None:
    (family,) = families(["lion"])
    assert {entry.rule for entry in family.entries} == {"lion"}
    assert {entry.source for entry in family.entries} >= {"steepest", "lion_pytorch", "optimi"}
    (alone,) = families(["lion"], eager=False, peers=False)
    assert [entry.how for entry in alone.entries] == ["compiled"]


def test_a_peer_of_another_rule_stays_away() -> None:
    for family in families(["quad"]):
        assert {entry.source for entry in family.entries} == {"steepest", "quad_torch"}


@pytest.mark.parametrize(
    ("given", "options", "said"),
    [
        (["lino"], {}, r"'lino'.*lion"),
        (["orthogonalized"], {}, "base to subclass"),
        (["lion"], {"eager": False, "compiled": False}, "neither"),
    ],
)
def test_what_cannot_be_measured_is_refused(given: list[str], options: dict[str, bool], said: str) -> None:
    with pytest.raises(LabError, match=said):
        families(given, **options)


def test_peers_that_repeat_others_stay_away_unless_in_full() -> None:
    both = [{(f.name, e.label) for f in families(full=full) for e in f.entries} for full in (True, False)]
    assert both[0] - both[1] == REPEATED
