"""Plans within a budget: what is chosen fits, is close to the best, and is what build() makes."""

from __future__ import annotations

import itertools
import math
import random
import re
from typing import Any

import pytest
import torch
from torch import nn

import steepest
from loops import for_each
from routing.zoo import MODELS
from steepest.planning.budget import Choice, descend, parse_bytes

from .test_plan_bytes import bytes_alone, step

__all__ = ["bytes_alone"]

FORMATS = (None, torch.bfloat16, "int8")
RANKED = ["muon", "lion", "signgsd"]


class Net(nn.Module):
    """Matrices of several sizes, an embedding, an output layer, and vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(80, 64)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 64)) for width in (64, 96, 128)]
        )
        self.lm_head = nn.Linear(64, 80)


@pytest.mark.parametrize(
    ("text", "count"),
    [("22GB", 22 * 10**9), ("1.5 GiB", 3 << 29), ("800mb", 8 * 10**8), ("7 B", 7), ("1TiB", 1 << 40), (5, 5)],
    ids=str,
)
def test_sizes(text: str | int, count: int):
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "bad", ["22", "GB", "-1GB", "1e3 MB", "0GB", "0.0000001B", 0, -5, True, 2.5, None, "2 XB"], ids=repr
)
def test_no_sizes(bad: Any):
    with pytest.raises(ValueError, match=r"budget must be a number of bytes > 0, or a string such as '22GB'"):
        parse_bytes(bad)


def cost(levels: dict[str, list[Choice]], size: dict[str, int], ranks: dict[str, int]) -> int:
    return sum(size[name] * rank for name, rank in ranks.items())


@pytest.mark.parametrize("seed", range(12))
def test_descending_is_at_most_one_move_from_the_best(seed: int):
    """Against all assignments of a few tensors."""
    generator = random.Random(seed)
    size = {f"t{at}": generator.choice([1, 2, 2, 5, 8, 13]) * 10 for at in range(5)}
    levels = {
        name: [Choice({}, int(count * width), 0) for width in generator.sample([8, 4, 4.5, 2, 1, 0, 12], 4)]
        for name, count in size.items()
    }
    every = [dict(zip(size, ranks, strict=True)) for ranks in itertools.product(range(4), repeat=5)]
    sums = {id(r): sum(levels[n][rank].state_bytes for n, rank in r.items()) for r in every}
    least, most = min(sums.values()), sum(own[0].state_bytes for own in levels.values())
    move = 3 * max(size.values())
    exact = 0
    for room in range(least, most + 20, max(1, (most - least) // 12)):
        ranks = descend(levels, size, room, 0)
        assert ranks is not None
        assert sum(levels[name][rank].state_bytes for name, rank in ranks.items()) <= room
        best = min(cost(levels, size, each) for each in every if sums[id(each)] <= room)
        assert best <= cost(levels, size, ranks) <= best + move
        exact += cost(levels, size, ranks) == best
    assert exact >= 4
    assert descend(levels, size, least - 1, 0) is None


def test_choices_whose_temporaries_are_too_large_are_not_taken():
    levels = {"a": [Choice({}, 4, 1000), Choice({}, 4, 10), Choice({}, 2, 0)]}
    assert descend(levels, {"a": 1}, 4, 1000) == {"a": 0}
    assert descend(levels, {"a": 1}, 4, 10) == {"a": 1}
    assert descend(levels, {"a": 1}, 3, 1000) == {"a": 2}
    assert descend(levels, {"a": 1}, 3, -1) is None


@pytest.mark.usefixtures("bytes_alone")
@pytest.mark.parametrize("rules", [RANKED, ["lion", "signgsd"], ["muon", "adamw", "lion"]], ids=str)
@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
def test_build_takes_the_arguments_and_allocates_what_was_planned(rules: list[str], share: float):
    model = Net()
    first = steepest.plan(model, rules=rules, budget="1GB")
    assert not any(row.moved for row in first.rows)
    with pytest.raises(ValueError, match="the least found") as error:
        steepest.plan(model, rules=rules, budget=1)
    least = int(re.search(r"takes ([\d,]+) bytes", str(error.value))[1].replace(",", ""))
    budget = least + int(share * (first.total_bytes - least))
    plan = steepest.plan(model, rules=rules, budget=budget)
    assert least <= plan.total_bytes <= budget == plan.budget
    optimizer = step(model, **plan.arguments)
    assert optimizer.state_bytes() == plan.state_bytes
    found = {row.name: row.rule for row in optimizer.explain().rows}
    assert found == {row.name: row.rule for row in plan.rows}
    assert steepest.plan(model, rules=rules, budget=budget) == plan
    if share == 1.0:
        assert plan == steepest.plan(model, rules=rules, budget=budget)
        assert not any(row.moved for row in plan.rows)
    if share == 0.5:
        assert any(row.moved for row in plan.rows)
        # Nothing that went down would still fit at its first choice.
        best = {row.name: row.state_bytes for row in first.rows}
        for row in plan.rows:
            if row.moved:
                assert plan.total_bytes - row.state_bytes + best[row.name] > budget


@pytest.mark.usefixtures("bytes_alone")
def test_what_is_ranked_first_is_taken_first():
    model = Net()
    plan = steepest.plan(model, rules=RANKED, budget="1GB")
    assert {row.rule for row in plan.rows if row.name.startswith("blocks") and "weight" in row.name} == {
        "muon"
    }
    assert {row.rule for row in plan.rows if not row.name.startswith("blocks")} == {"lion"}
    assert plan.arguments == {"rule": "muon", "state_dtype": None, "fallback": {"rule": "lion"}}
    told = steepest.plan(model, rules=RANKED, fallback="adamw", budget="1GB")
    assert {row.rule for row in told.rows if not row.name.startswith("blocks")} == {"adamw"}
    alone = steepest.plan(model, "muon", budget="1GB", lr=0.5, nesterov=False, overrides={"lm_head.*": "sgd"})
    assert {row.rule for row in alone.rows} == {"muon", "adamw", "sgd"}
    assert alone.arguments["lr"] == 0.5
    own = steepest.plan(model, rules=[{"rule": "adamw", "state_dtype": "int8"}, "lion"], budget="1GB")
    assert {row.state for row in own.rows if row.name == "embed.weight"} == {"int8/64"}


@pytest.mark.usefixtures("bytes_alone")
def test_the_least_is_the_last_resort_for_everything():
    plan = steepest.plan(Net(), rules=RANKED, budget=2 * sum(p.nbytes for p in Net().parameters()))
    assert plan.state_bytes == 0
    assert {row.rule for row in plan.rows} == {"signgsd"}
    assert plan.arguments["rule"] == "signgsd"
    assert all("saves" in row.moved for row in plan.rows)


def test_temporaries_count():
    """Muon's buckets take more than the room: the other rule does, whose chunks are small."""
    shapes = {f"{at}.fc.weight": (512, 512) for at in range(4)} | {"lm_head.weight": (8, 512)}
    whole = steepest.plan(shapes, "muon")
    budget = whole.total_bytes - whole.temporary_bytes // 2
    assert whole.temporary_bytes > whole.state_bytes
    plan = steepest.plan(shapes, rules=["muon", "lion"], state_dtypes=[None], budget=budget)
    assert {row.rule for row in plan.rows} == {"lion"}
    assert plan.total_bytes <= budget


def test_the_temporaries_of_one_large_matrix_do_not_count_for_the_small_ones():
    shapes = {"big.fc.weight": (1024, 1024)} | {f"{at}.fc.weight": (64, 64) for at in range(20)}
    muon = {"rule": "muon", "bucket_bytes": 1 << 16}
    best = steepest.plan(shapes, **muon, overrides={"big.fc.weight": "adamw"})
    plan = steepest.plan(shapes, rules=[muon, "adamw"], state_dtypes=[None], budget=best.total_bytes)
    assert {row.name for row in plan.rows if row.moved} == {"big.fc.weight"}
    assert plan.total_bytes == best.total_bytes
    assert plan.total_bytes < steepest.plan(shapes, "adamw").total_bytes


def test_small_matrices_keep_their_rule_where_one_large_one_needs_too_much():
    shapes = {"big.fc.weight": (512, 512)} | {f"{at}.fc.weight": (64, 64) for at in range(20)}
    best = steepest.plan(shapes, "soap", overrides={"big.fc.weight": "lion"})
    plan = steepest.plan(shapes, rules=["soap", "lion"], state_dtypes=[None], budget=best.total_bytes)
    assert {row.name for row in plan.rows if row.moved} == {"big.fc.weight"}


@pytest.mark.parametrize("rules", [["muon", "adamw"], ["muon", "signgsd"]], ids=str)
def test_against_the_plans_of_all_assignments(rules: list[str]):
    shapes = {"0.fc.weight": (96, 96), "1.fc.weight": (128, 64), "2.fc.weight": (64, 64)}
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    every = []
    for ranks in itertools.product((0, 1), repeat=len(shapes)):
        overrides = {name: rules[rank] for name, rank in zip(shapes, ranks, strict=True)}
        cost = sum(size[name] for name, rank in zip(shapes, ranks, strict=True) if rank)
        every.append((steepest.plan(shapes, rules[1], overrides=overrides).total_bytes, cost))
    for budget, _ in every:
        best = min(cost for total, cost in every if total <= budget)
        plan = steepest.plan(shapes, rules=rules, fallback=rules[1], state_dtypes=[None], budget=budget)
        assert plan.total_bytes <= budget
        cost = sum(row.numel for row in plan.rows if row.rule == rules[1])
        assert best <= cost <= best + max(size.values())


@pytest.mark.usefixtures("bytes_alone")
@pytest.mark.parametrize("name", ["gpt", "moe", "resnet"])
def test_models_of_the_zoo(name: str):
    model = MODELS[name]()
    whole = steepest.plan(model, rules=RANKED, budget="1GB")
    plan = steepest.plan(model, rules=RANKED, budget=whole.total_bytes - whole.state_bytes // 3)
    assert step(model, **plan.arguments).state_bytes() == plan.state_bytes < whole.state_bytes


@for_each(
    ("given", "error", "words"),
    [
        ({"rules": ["lion"]}, TypeError, "rules needs a budget"),
        ({"rule": "lion", "rules": ["lion"], "budget": 9}, TypeError, "give rule or rules"),
        ({"budget": "1GB", "memory": "least"}, TypeError, "memory does not go with a budget"),
        ({"budget": "1GB", "state_dtype": None}, TypeError, "state_dtype does not go with a budget"),
        ({"budget": "1GB", "rules": []}, ValueError, "at least one entry"),
        ({"budget": "1GB", "rules": [{"lr": 1.0}]}, ValueError, "names no rule"),
        ({"budget": "1GB", "momentun": 1.0}, TypeError, "unexpected keyword argument 'momentun'"),
        ({"budget": "1GB", "rules": "muon"}, TypeError, "rules must be a list.*got 'muon'"),
        ({"budget": "1GB", "rules": {"rule": "muon"}}, TypeError, "rules must be a list"),
        ({"budget": "1GB", "state_dtypes": "int8"}, TypeError, "state_dtypes must be a list.*got 'int8'"),
        ({"budget": "1GB", "state_dtypes": torch.bfloat16}, TypeError, "state_dtypes must be a list"),
        ({"mesh": (2,)}, ValueError, "mesh and placements belong together"),
        ({"rank": 1}, ValueError, "needs a mesh"),
        ({"device": "meta"}, ValueError, "where the model will be trained"),
        ({"param_dtype": torch.float32}, ValueError, "param_dtype is for shapes"),
    ],
)
def test_requests_that_make_no_sense(given: dict[str, Any], error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        steepest.plan(Net(), **given)


@pytest.mark.parametrize(
    ("shapes", "error"),
    [
        ({}, ValueError),
        ([("a", (2,)), ("a", (2,))], ValueError),
        ({"a": (2,), "a.b": (2,)}, ValueError),
        ({"a.b": (2,), "a": (2,)}, ValueError),
        ({"a..b": (2,)}, ValueError),
        ({"a": (-2,)}, ValueError),
        ({"a": 2}, TypeError),
        ({"a": "768"}, TypeError),
        ({"a": (3.5, 2)}, TypeError),
        ([("a",)], TypeError),
        ("gpt2", TypeError),
        (None, TypeError),
        (nn.Linear, TypeError),
    ],
    ids=str,
)
def test_shapes_that_are_none(shapes: Any, error: type[Exception]):
    with pytest.raises(error):
        steepest.plan(shapes)


def test_tensors_are_not_printed_in_place_of_shapes():
    with pytest.raises(TypeError, match="'weight' has a tensor, give its shape") as error:
        steepest.plan(nn.Linear(64, 64).state_dict())
    assert len(str(error.value)) < 100


@pytest.mark.usefixtures("bytes_alone")
def test_pairs_may_come_from_a_generator():
    shapes = {"0.weight": (8, 4), "1.weight": (2, 8)}
    assert steepest.plan(iter(shapes.items()), budget="1GB") == steepest.plan(shapes, budget="1GB")
    names = ["lion", "adamw"]
    found = steepest.compare_plans(iter(shapes.items()), names)
    assert found == steepest.compare_plans(shapes, names)


@pytest.mark.usefixtures("bytes_alone")
def test_plans_are_made_in_inference_mode_too():
    model = Net()
    with torch.inference_mode():
        plan = steepest.plan(model, rules=RANKED, budget="1GB")
    assert plan == steepest.plan(model, rules=RANKED, budget="1GB")


@pytest.mark.usefixtures("bytes_alone")
def test_the_comparison_has_adamw_as_its_yardstick():
    shapes = {"wte.weight": (50, 64), "h.0.fc.weight": (256, 256), "h.0.ln.weight": (64,)}
    found = steepest.compare_plans(shapes, {"a": "AdamW", "b": {"rule": "lion", "state_dtype": "int8"}})
    assert found.plans["b"] == steepest.plan(shapes, "lion", state_dtype="int8")
    assert found.plans["a"].state_bytes == found.plans["b"].adamw_bytes + 4 * len(shapes)  # step counts
    for names in ([], ["lion", "lion"]):
        with pytest.raises(ValueError, match="none twice"):
            steepest.compare_plans(shapes, names)
    with pytest.raises(TypeError, match="optimizers must be a list"):
        steepest.compare_plans(shapes, "muon")
    with pytest.raises(TypeError, match="momentun"):
        steepest.compare_plans(shapes, ["muon"], momentun=1)


@pytest.mark.usefixtures("bytes_alone")
def test_the_table_joins_layers_and_says_what_exceeds_adamw():
    shapes = {f"h.{at}.fc.weight": (256, 256) for at in range(30)} | {"lm_head.weight": (8, 256)}
    text = steepest.plan(shapes, "procrustes").table()
    assert "h.*.fc.weight (30)  256×256  procrustes  float32    22.5 MiB         12 B  15.0 MiB" in text
    assert "more state than AdamW's: h.*.fc.weight (30)" in text
    assert len(text.splitlines()) < 12
    assert math.isclose(steepest.plan(shapes, "procrustes").bytes_per_parameter, 12, rel_tol=1e-2)
