"""A plan's state is what the optimizer has after its first step: every rule, dtype, option and layout."""

from __future__ import annotations

import copy
import itertools
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.nn import Parameter

import steepest
from contract.cases import CASES, Case, by_id
from distributed.ranks import LAYOUTS, placed, run_on_ranks
from routing.zoo import MODELS
from steepest.model_shapes import model_shapes
from steepest.ternary import ternarize
from steepest.views import rows

OPTIONS: list[dict[str, Any]] = [
    {},
    {"state_dtype": torch.bfloat16},
    {"state_dtype": torch.float32},
    {"state_dtype": "int8"},
    {"master": "split8"},
    {"master": "split16", "state_dtype": "int8"},
    {"capturable": True},
    {"state_device": "cpu"},
]
# The wide and the narrow dtypes go the same ways as their kin, but for these options.
COMBINATIONS = [
    *itertools.product([torch.float32, torch.bfloat16], OPTIONS),
    *[(torch.float16, each) for each in ({}, {"master": "split8"})],
    *[(torch.float64, each) for each in ({}, {"state_dtype": torch.float32}, {"state_dtype": "int8"})],
]
# A rule's other options are tried with these alone.
FEW = [COMBINATIONS[0], (torch.bfloat16, {"master": "split16", "state_dtype": "int8"}), (torch.float16, {})]
FIRST_OF_RULES = list({case.rule: case for case in reversed(CASES)}.values())


@pytest.fixture
def bytes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the temporaries, whose bound takes most of a plan's time."""
    monkeypatch.setattr("steepest.planning.memory.temporary_bytes", lambda *args: (0, 0))


class Net(nn.Module):
    """Tensors of the kinds that state depends on: coded in one byte and not, fused, batched, vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.wide = nn.Linear(64, 64)
        self.conv = nn.Conv2d(4, 6, 2, groups=2, bias=False)
        self.head = nn.Linear(3, 2)


def step(model: nn.Module, rule: str, **options: Any) -> steepest.Optimizer:
    """Build an optimizer, and take one step with all gradients."""
    optimizer = steepest.build(model, rule, compile=False, **options)
    generator = torch.Generator().manual_seed(0)
    for param in model.parameters():
        if param.requires_grad:
            local = param.to_local() if hasattr(param, "to_local") else param
            grad = torch.zeros_like(param)
            (grad.to_local() if hasattr(grad, "to_local") else grad).copy_(
                torch.randn(local.shape, generator=generator).to(param.dtype)
            )
            param.grad = grad
    optimizer.step()
    return optimizer


def row_bytes(optimizer: steepest.Optimizer) -> list[int]:
    return [
        sum(
            (each.to_local() if hasattr(each, "to_local") else each).nbytes
            for each in optimizer.state.get(param, {}).values()
            if isinstance(each, torch.Tensor)
        )
        for group in optimizer.param_groups
        for param in group["params"]
    ]


def assert_exact(model: nn.Module, rule: str, **options: Any) -> steepest.Plan:
    plan = steepest.plan(model, rule, compile=False, **options)
    assert not any(hasattr(param, "grad") and param.grad is not None for param in model.parameters())
    optimizer = step(model, rule, **options)
    assert plan.state_bytes == optimizer.state_bytes()
    assert [row.state_bytes for row in plan.rows] == row_bytes(optimizer)
    model.zero_grad()
    return plan


@pytest.mark.usefixtures("bytes_alone")
@pytest.mark.parametrize("case", [case for case in CASES if case.name != "orthogonalized"], ids=by_id)
def test_every_rule_dtype_and_option(case: Case):
    own = {name: value for name, value in case.options.items() if name != "leak"}
    tried = 0
    combinations = COMBINATIONS if case in FIRST_OF_RULES else FEW
    for dtype, each in combinations:
        # By an override, since Simba's option memory has the name of an argument of build().
        options = (
            {"overrides": {"*": {"rule": case.rule.name, **own}}, **each}
            if "memory" in own
            else {**own, **each}
        )
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 1, bias=False)).to(dtype)
        try:
            optimizer = step(model, case.rule.name, **options)
        except ValueError as error:
            with pytest.raises(ValueError, match=re.escape(str(error))):
                steepest.plan(model, case.rule.name, compile=False, **options)
            continue
        plan = steepest.plan(model, case.rule.name, compile=False, **options)
        assert plan.state_bytes == optimizer.state_bytes(), (dtype, each)
        tried += 1
    assert tried >= len(combinations) * 2 // 3


def test_what_build_refuses_is_not_planned():
    """A rule that calls a method of its own class, and mistakes."""
    mistakes: list[tuple[str, dict[str, Any]]] = [
        ("orthogonalized", {}),
        ("muon", {"momentun": 0.9}),
        ("lion", {"overrides": {"no": "adamw"}}),
        ("lion", {"memory": "most"}),
        ("loin", {}),
        ("lion", {"betas": (1.0, 0.5)}),
    ]
    for rule, options in mistakes:
        with pytest.raises((TypeError, ValueError)) as expected:
            steepest.build(Net(), rule, **options)
        with pytest.raises(expected.type, match=re.escape(str(expected.value))):
            steepest.plan(Net(), rule, **options)


@pytest.mark.usefixtures("bytes_alone")
@pytest.mark.parametrize("rule", ["adamw", "muon", "procrustes"])
@pytest.mark.parametrize("name", MODELS)
def test_models_of_the_kinds_that_people_train(name: str, rule: str):
    model = MODELS[name]()
    plan = assert_exact(model, rule)
    named = dict(model.named_parameters())
    assert {row.name for row in plan.rows} == set(named)
    assert plan.parameter_bytes == sum(param.nbytes for param in named.values())
    assert plan.gradient_bytes == sum(param.nbytes for param in named.values() if param.requires_grad)
    yardstick = torch.optim.AdamW(param for param in model.parameters() if param.requires_grad)
    for param in model.parameters():
        param.grad = torch.zeros_like(param) if param.requires_grad else None
    yardstick.step()
    entries = [entry for state in yardstick.state.values() for entry in state.values()]
    assert plan.adamw_bytes == sum(entry.nbytes for entry in entries)


@pytest.mark.usefixtures("bytes_alone")
@pytest.mark.parametrize(
    "options",
    [
        {"rule": "muon", "view": "batch"},
        {"rule": "muon", "views": {"wide.weight": rows(16, 48)}, "fallback": "lion"},
        {"rule": "procrustes", "views": {"wide.weight": rows(16, 48)}, "max_size_dense": 5},
        {"rule": "quad", "dtype": torch.bfloat16, "update_probability": 0.5},
        {"rule": "lion", "overrides": {"*.bias": {"rule": "adamw", "amsgrad": True}, "embed*": "signgsd"}},
        {"rule": "muon", "fallback": {"rule": "adamw", "state_dtype": torch.bfloat16}, "decay_vectors": True},
        {"rule": "sgd", "momentum": 0.0},
    ],
    ids=str,
)
def test_views_overrides_and_fallbacks(options: dict[str, Any]):
    given = dict(options)
    assert_exact(Net(), given.pop("rule"), **given)


@pytest.mark.usefixtures("bytes_alone")
def test_frozen_tied_and_transposed():
    model = MODELS["gpt"]()
    model.blocks[0].requires_grad_(False)
    model.blocks[1].proj.weight.data = model.blocks[1].proj.weight.data.t()
    plan = assert_exact(model, "muon")
    assert {row.state_bytes for row in plan.rows if row.frozen} == {0}
    assert {row.gradient_bytes for row in plan.rows if row.frozen} == {0}
    assert sum(row.name == "wte.weight" for row in plan.rows) == 1
    assert "lm_head.weight" not in {row.name for row in plan.rows}


@pytest.mark.usefixtures("bytes_alone")
def test_a_model_on_the_meta_device_is_planned_as_it_would_be_materialized():
    with torch.device("meta"):
        meta = MODELS["llama"]()
    assert steepest.plan(meta, "procrustes").rows == steepest.plan(MODELS["llama"](), "procrustes").rows
    assert all(param.is_meta and param.grad is None for param in meta.parameters())


@pytest.mark.usefixtures("bytes_alone")
def test_planning_leaves_the_model_as_it_is():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    ternarize(model)
    optimizer = steepest.build(model, "lion", ternary={"threshold": 2})
    handle, before = model[0].vote_buffer, {name: id(each) for name, each in model.named_parameters()}
    steepest.plan(model, "muon")
    assert model[0].vote_buffer is handle
    assert {name: id(each) for name, each in model.named_parameters()} == before
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    assert optimizer.state[model[0].votes]["step"] == 1


@pytest.mark.usefixtures("bytes_alone")
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("accumulator", [torch.int8, torch.int16])
@pytest.mark.parametrize("bits", [1, 2])
def test_ternary_models(bits: int, accumulator: torch.dtype, frozen: bool):
    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
        ternarize(model, bits=bits)
        model[0].votes.requires_grad_(not frozen)
        return model

    model, options = make(), {"ternary": {"accumulator": accumulator}}
    with torch.device("meta"):
        assert steepest.plan(make(), "muon", **options) == steepest.plan(model, "muon", **options)
    plan = steepest.plan(model, "muon", **options)
    optimizer = steepest.build(model, "muon", **options)
    model(torch.ones(2, 12)).sum().backward()
    optimizer.step()
    assert plan.state_bytes == optimizer.state_bytes()
    row = next(row for row in plan.rows if row.name == "2.packed")
    layer = model[2]
    assert row.parameter_bytes == layer.packed.nbytes + layer.votes.nbytes
    assert row.gradient_bytes == 16 * 8 + layer.votes.nbytes


@pytest.mark.usefixtures("bytes_alone")
def test_rows_of_accumulators_on_several_processes():
    # Ranks are threads, which share a generator.
    torch.manual_seed(0)
    common = nn.Sequential(nn.Linear(12, 14), nn.ReLU(), nn.Linear(14, 2))
    ternarize(common)

    def work(rank: int) -> list[int]:
        model = copy.deepcopy(common)
        options: dict[str, Any] = {"ternary": {"distributed": "rows"}, "compile": False}
        plan = steepest.plan(model, "lion", **options)
        optimizer = steepest.build(model, "lion", **options)
        model(torch.ones(2, 12)).sum().backward()
        optimizer.step()
        assert plan.state_bytes == optimizer.state_bytes()
        return [row.state_bytes for row in plan.rows if row.name == "0.packed"]

    # Four rows for each but the last, of twelve bytes, and a count of steps.
    assert run_on_ranks(work) == [[56], [56], [56], [32]]


# -- names and shapes


@pytest.mark.usefixtures("bytes_alone")
@pytest.mark.parametrize("rule", ["muon", "procrustes"])
@pytest.mark.parametrize("name", ["gpt", "llama", "resnet", "vit", "moe", "mlp"])
def test_shapes_are_planned_as_their_model(name: str, rule: str):
    model = MODELS[name]()
    shapes = {key: tuple(param.shape) for key, param in model.named_parameters()}
    plan, whole = steepest.plan(shapes, rule), steepest.plan(model, rule)
    found, expected = ({row.name: (row.rule, row.state_bytes) for row in each.rows} for each in (plan, whole))
    assert found == expected


@pytest.mark.usefixtures("bytes_alone")
@pytest.mark.parametrize("name", ["tiny", "resnet18", "vit-s16", "gpt2-124m", "llama-1b"])
def test_the_hidden_matrices_of_known_models(name: str):
    """But for the first layers of vision models, which are convolutions of no block."""
    known = model_shapes(name)
    plan = steepest.plan([(each.name, each.shape) for each in known.tensors], "muon")
    stems = {"conv1.weight", "patch_embed.proj.weight"}
    assert {row.name for row in plan.rows if row.rule == "muon"} - stems == {
        each.name for each in known.hidden()
    }


@pytest.mark.usefixtures("bytes_alone")
def test_a_dense_side_of_psgd_takes_the_bytes_of_its_square():
    (row,) = steepest.plan({"0.weight": (256, 256)}, "procrustes").rows
    # Momentum, two factors; two bounds, the scale and the step count.
    assert row.state_bytes == 4 * 256**2 + 4 * (256**2 + 256**2) + 3 * 4 + 8
    assert round(row.bytes_per_parameter) == 12


# -- shards


WHOLE = {
    "a.weight": (16, 12),
    "b.weight": (16, 12),
    "c.weight": (8, 6),
    "wide.weight": (64, 64),
    "norm.weight": (8,),
    "head.weight": (4, 4),
}


class Sharded(nn.Module):
    """Parameters that a mesh holds."""

    def __init__(self, mesh: Any, placements: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in WHOLE.items():
            layer = nn.Linear(1, 1, bias=False) if len(shape) == 2 else nn.LayerNorm(1, bias=False)
            whole = torch.randn(shape, generator=generator)
            layer.weight = Parameter(placed(whole, mesh, placements))
            self.add_module(name.partition(".")[0], layer)


@pytest.mark.usefixtures("bytes_alone")
@pytest.mark.parametrize(
    ("layout", "rule", "options"),
    [
        *[(name, "procrustes", {}) for name in ("FSDP", "HSDP", "FSDP x TP, rows", "TP beside replicas")],
        *[(name, "muon", {}) for name in ("rows twice", "replicated")],
        ("FSDP", "lion", {"state_dtype": "int8"}),
        ("columns", "lion", {"state_dtype": "int8"}),
        ("HSDP", "soap", {}),
        ("HSDP", "soap", {"distributed": "everywhere"}),
        ("replicated", "soap", {"distributed": "owners"}),
        ("FSDP x TP, columns", "muon", {"fallback": "signgsd"}),
    ],
    ids=str,
)
def test_shards_take_what_a_process_has(layout: str, rule: str, options: dict[str, Any]):
    shape, placements = LAYOUTS[layout]

    def work(rank: int) -> dict[str, int]:
        model = Sharded(init_device_mesh("cpu", shape), placements)
        plan = steepest.plan(model, rule, **options)
        optimizer = steepest.build(model, rule, compile=False, **options)
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
        assert plan.state_bytes == optimizer.state_bytes()
        assert [row.state_bytes for row in plan.rows] == row_bytes(optimizer)
        assert plan.parameter_bytes == sum(p.to_local().nbytes for p in model.parameters())
        return {row.name: row.state_bytes for row in plan.rows}

    found = run_on_ranks(work)
    assert not dist.is_initialized()
    for rank in (0, 3):
        # On paper, without any processes.
        paper = steepest.plan(WHOLE, rule, mesh=shape, placements=placements, rank=rank, **options)
        assert {row.name: row.state_bytes for row in paper.rows} == found[rank]


@pytest.mark.usefixtures("bytes_alone")
def test_the_shards_of_all_ranks_are_the_whole():
    shapes = {"0.fc.weight": (64, 32), "1.fc.weight": (48, 32), "head.weight": (7, 32)}
    for rule in ("adamw", "muon"):
        whole = steepest.plan(shapes, rule)
        plans = [
            steepest.plan(shapes, rule, mesh=(4,), placements=(Shard(0),), rank=rank) for rank in range(4)
        ]
        assert sum(plan.parameter_bytes for plan in plans) == whole.parameter_bytes
        # Every rank counts the steps of all tensors that have counts.
        counts = 8 * sum(row.rule == "adamw" for row in whole.rows)
        assert sum(plan.state_bytes - counts for plan in plans) == whole.state_bytes - counts
    replicated = steepest.plan(shapes, "muon", mesh=(2,), placements=(Replicate(),))
    assert replicated.state_bytes == steepest.plan(shapes, "muon").state_bytes
