"""Adam-mini on shards: whole rows are stepped where they are, heads by their owners, as in one process."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

import steepest

from . import matrix_runs
from .ranks import LAYOUTS, run_on_ranks

SHAPES = [(8, 6), (8, 3), (8, 5)]
OPTIONS: dict[str, dict[str, Any]] = {
    "rows": {"distributed": None},
    "heads": {"blocks": ((2, 3), (2, 1))},
    "tensor": {"blocks": "tensor"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_on_shards_are_those_of_one_process(layout: str):
    makes = {
        name: partial(steepest.create, "adam_mini", lr=0.05, weight_decay=0.1, **options)
        for name, options in OPTIONS.items()
    }
    whole = {name: matrix_runs.alone(make, shapes=SHAPES) for name, make in makes.items()}

    def work(rank: int) -> None:
        for name, make in makes.items():
            params, optimizer = matrix_runs.sharded(make, layout, shapes=SHAPES)
            for param, theirs in zip(params, whole[name][0], strict=True):
                torch.testing.assert_close(param.full_tensor(), theirs, msg=f"{name} on rank {rank}")
                own, known = (
                    o.state[p]["block_rms"] for o, p in ((optimizer, param), (whole[name][1], theirs))
                )
                own = own.full_tensor() if isinstance(own, DTensor) else own
                torch.testing.assert_close(own, known, msg=f"{name}, state on rank {rank}")

    run_on_ranks(work)


@pytest.mark.parametrize(("options", "travel"), [("rows", False), ("heads", True)])
def test_only_heads_travel_where_rows_are_cut(options: str, travel: bool):
    def work(rank: int) -> None:
        make = partial(steepest.create, "adam_mini", lr=0.05, **OPTIONS[options])
        params, optimizer = matrix_runs.sharded(make, "FSDP", shapes=SHAPES)
        sharding = optimizer._collector.sharding(optimizer.param_groups, optimizer._user_functions)
        units = [unit for param in params for unit in sharding.of(param) or ()]
        assert units
        assert {unit.is_gathered or unit.is_scattered for unit in units} == {travel}

    run_on_ranks(work)
