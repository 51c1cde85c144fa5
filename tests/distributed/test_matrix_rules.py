"""Matrix rules on DTensors equal one process that has the whole matrices."""

from __future__ import annotations

import threading
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

import steepest
from steepest.distributed.ownership import assign
from steepest.engine import units

from . import matrix_runs
from .ranks import LAYOUTS, placed, run_on_ranks

SHAPES = [(8, 6), (7, 5), (3, 4), (12, 8), (8, 6), (4, 3, 5)]
STEPS = 2
EXACT = {"method": "svd"}
# Every rule with its defaults is in the contract suite.
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "muon": ("muon", EXACT),
    "muon, batch": ("muon", {**EXACT, "view": "batch"}),
    "muon, l2": ("muon", {"ns_dtype": torch.float32, "weight_decay_method": "l2", "maximize": True}),
    "muon, cautious": ("muon", {**EXACT, "weight_decay_method": "cautious", "nonfinite": "skip"}),
    "muon, stochastic": ("muon", {**EXACT, "rounding": "stochastic", "seed": 3}),
    "normuon": ("normuon", {**EXACT}),
    "hyperball, stochastic": (
        "hyperball",
        {**EXACT, "weight_decay": 0.0, "rounding": "stochastic", "seed": 5, "view": "batch"},
    ),
    "quad": ("quad", {}),
    "quad, gradient": ("quad", {"whiten": "gradient", "update_probability": 0.5}),
    "procrustes": ("procrustes", {"max_size_dense": 6}),
    "soap": ("soap", {}),
    "adam_mini": ("adam_mini", {}),
}


def wholes(step: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return matrix_runs.wholes(step, SHAPES, dtype)


def make(case: str, named: list[tuple[str, Any]], **options: Any) -> steepest.Optimizer:
    name, own = RULES[case]
    return steepest.create(name, named, **{"lr": 0.05, "weight_decay": 0.1, **own, **options})


@cache
def in_one_process(case: str, dtype: torch.dtype, **options: Any) -> tuple[list[Any], Any]:
    return matrix_runs.alone(partial(make, case, **options), STEPS, SHAPES, dtype)


def on_mesh(case: str, dtype: torch.dtype, layout: str, **options: Any) -> tuple[list[Any], Any]:
    return matrix_runs.sharded(partial(make, case, **options), layout, STEPS, SHAPES, dtype)


def assert_parts(params: list[Any], optimizer: Any, whole: list[Any], expected: Any) -> None:
    """Parameters and state are this rank's parts of the whole ones."""
    for at, (param, theirs) in enumerate(zip(params, whole, strict=True)):
        assert_same(param.detach(), theirs.detach(), param, f"parameter {at}", optimizer)
        own, known = optimizer.state[param], expected.state[theirs]
        assert own.keys() == known.keys()
        for name, entry in own.items():
            # A factor is empty where another process computes the matrix.
            if isinstance(entry, DTensor) or entry.numel() or not known[name].numel():
                assert_same(entry, known[name], param, f"{name} of {at}", optimizer)


def assert_same(own: Any, whole: torch.Tensor, param: Any, what: str, optimizer: Any) -> None:
    if isinstance(own, DTensor):
        own, whole = own.to_local(), placed(whole, param.device_mesh, param.placements).to_local()
    assert own.dtype == whole.dtype
    if optimizer.param_groups[0].get("method") == "svd":
        assert torch.equal(own, whole), what
    else:
        # Some processors round a product of several matrices otherwise than one of a single matrix.
        loose = 1e-5 if own.dtype == torch.float32 else 1e-2
        torch.testing.assert_close(own, whole, rtol=loose, atol=loose, msg=lambda m: f"{what}: {m}")


WAYS: dict[str, dict[str, Any]] = {
    "": {},
    "in waves": {"bucket_bytes": 1},
    "everywhere": {"distributed": "everywhere"},
    "owners of replicas": {"distributed": "owners"},
}


@pytest.mark.parametrize(
    ("layout", "way", "dtype"),
    [
        *((layout, "", torch.float32) for layout in LAYOUTS),
        ("HSDP", "in waves", torch.bfloat16),
        ("FSDP", "in waves", torch.float32),
        ("HSDP", "everywhere", torch.float32),
        ("FSDP x TP, rows", "everywhere", torch.bfloat16),
        ("replicated", "owners of replicas", torch.float32),
    ],
    ids=str,
)
def test_parameters_and_state_equal_one_process(layout: str, way: str, dtype: torch.dtype):
    whole = {case: in_one_process(case, dtype) for case in RULES}

    def work(rank: int) -> None:
        for case in RULES:
            try:
                assert_parts(*on_mesh(case, dtype, layout, **WAYS[way]), *whole[case])
            except BaseException as error:
                error.add_note(f"{case} on rank {rank}")
                raise

    run_on_ranks(work)


@pytest.mark.parametrize("case", ["muon, stochastic", "quad"])
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_compiled_passes_of_shards_equal_those_of_one_process(case: str):
    whole = in_one_process(case, torch.bfloat16, compile=True)
    for layout in ("FSDP", "FSDP x TP, columns"):
        run_on_ranks(
            lambda rank, layout=layout: assert_parts(
                *on_mesh(case, torch.bfloat16, layout, compile=True), *whole
            )
        )


@pytest.mark.parametrize("case", ["normuon", "hyperball, stochastic", "quad", "soap"])
@pytest.mark.parametrize("layout", ["FSDP", "HSDP", "FSDP x TP, rows", "FSDP x TP, columns"])
def test_a_state_dict_goes_on_with_other_owners(layout: str, case: str, monkeypatch: pytest.MonkeyPatch):
    whole = in_one_process(case, torch.float32)
    of_this_rank = threading.local()

    def other_way_round(loads: Any, ranks: int, known: Any) -> list[int]:
        owners = assign(loads, ranks, known)
        turned = hasattr(of_this_rank, "turned") and not any(owner is not None for owner in known)
        return [ranks - 1 - owner for owner in owners] if turned else owners

    monkeypatch.setattr(units, "assign", other_way_round)

    def work(rank: int) -> None:
        mesh_shape, placements = LAYOUTS[layout]
        mesh = init_device_mesh("cpu", mesh_shape)

        def started(step: int) -> tuple[list[Any], Any]:
            params = [Parameter(placed(each, mesh, placements)) for each in wholes(step, torch.float32)]
            return params, make(case, matrix_runs.named(params))

        def go_on(params: list[Any], optimizer: Any, steps: range) -> None:
            for step in steps:
                for param, grad in zip(params, wholes(step, torch.float32), strict=True):
                    param.grad = placed(grad, mesh, placements)
                optimizer.step()

        params, optimizer = started(-1)
        go_on(params, optimizer, range(STEPS - 1))
        saved = optimizer.state_dict()
        keys = {number: sorted(state) for number, state in saved["state"].items()}
        assert keys == {at: sorted(whole[1].state[param]) for at, param in enumerate(whole[0])}
        again, other = started(-1)
        of_this_rank.turned = True
        with torch.no_grad():
            for one, two in zip(again, params, strict=True):
                one.copy_(two)
        other.load_state_dict(saved)
        go_on(again, other, range(STEPS - 1, STEPS))
        assert_parts(again, other, *whole)
        del of_this_rank.turned
        # The first one still has its factors.
        go_on(params, optimizer, range(STEPS - 1, STEPS))
        assert_parts(params, optimizer, *whole)

    run_on_ranks(work)
