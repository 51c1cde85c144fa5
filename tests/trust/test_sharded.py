"""Sharded tensors: every process verifies and measures its own shards; rules that need more are refused."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import Parameter

import steepest
from contract.cases import Case
from contract.training import gradient
from distributed.ranks import LAYOUTS, placed, run_on_ranks
from steepest import DictCallback, VerificationError, telemetry, verify

CASES = [Case("lion", {"rounding": "stochastic"}), Case("adamw"), Case("simba")]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_element_rules_on_shards(case: Case):
    start = [each.detach() for each in case.params()]

    def work(rank: int) -> None:
        mesh_shape, placements = LAYOUTS["FSDP"]
        mesh = init_device_mesh("cpu", mesh_shape)
        params = [Parameter(placed(each.clone(), mesh, placements)) for each in start]
        optimizer = case.make([(f"w{at}", param) for at, param in enumerate(params)], weight_decay=0.0)

        def step(number: int) -> None:
            for index, param in enumerate(params):
                whole = gradient(start[index], index, number)
                if whole.dim() == 2:
                    whole[3] = 0  # the last process's row need not move
                param.grad = placed(whole, mesh, placements)
            optimizer.step()

        with verify(optimizer) as run, telemetry(optimizer, history := DictCallback()):
            step(0)
            before = params[0].detach().to_local().clone()
            step(1)
        assert run.steps == 2
        change = params[0].detach().to_local() - before
        if change.numel():
            rms = change.double().square().mean().sqrt().item()
            assert history["w0"]["update_rms"][-1] == pytest.approx(rms, rel=1e-6)
        # 4 rows: every process has one. The other processes' shards are untouched, and pass.
        optimizer.register_step_post_hook(lambda *_: params[0].to_local().data.mul_(1 + (rank == 1)))
        run = verify(optimizer)
        run.__enter__()
        if rank == 1:
            with pytest.raises(VerificationError, match="'w0'"):
                step(2)
        else:
            step(2)

    run_on_ranks(work)


def test_rules_that_need_whole_tensors_are_refused():
    def work(rank: int) -> None:
        mesh_shape, placements = LAYOUTS["FSDP"]
        mesh = init_device_mesh("cpu", mesh_shape)
        param = Parameter(placed(torch.ones(4, 3), mesh, placements))
        optimizer = steepest.Muon({"w": param}.items())
        with pytest.raises(ValueError, match=r"'w' is a DTensor, and 'muon' needs more than"):
            verify(optimizer).__enter__()

    run_on_ranks(work)
