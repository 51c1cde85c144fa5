"""Two ranks equal one process that does the passes of both, bit for bit."""

import pytest
import torch
import torch.distributed as dist

import steepest
from processes import run_processes
from steepest.ternary import flip_stats

from .models import assert_same, loss_of, small_model, snapshot

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")


WORLD = 2


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Each rank's results of every job; the same processes do all jobs, since starting takes seconds."""
    return run_processes("ternary.ddp_job", WORLD, tmp_path_factory.mktemp("ddp"))


def one_process(kind, rounds, bad=False, world=WORLD):
    model = small_model()
    options = {"threshold": 3, "votes": kind, "zero_pull": 0.02}
    optimizer = steepest.build(model, "sgd", lr=0.01, nonfinite="skip", ternary=options)
    for step in range(4):
        # DDP sums a rank's passes, then averages over ranks.
        for rank in range(world):
            for micro in range(rounds):
                loss = loss_of(model, (step * rounds + micro) * world + rank) / rounds / world
                if bad and step == 1 and rank == 1:
                    loss = loss * float("nan")
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return snapshot(model), optimizer


@pytest.mark.parametrize("kind", ["sign", "magnitude"])
def test_two_ranks_equal_one_process(kind, ranks):
    weights, optimizer = one_process(kind, rounds=1)
    for saved in (done[kind] for done in ranks):
        assert_same(saved["model"], weights)
        for index, state in optimizer.state_dict()["state"].items():
            assert_same(state, saved["optimizer"]["state"][index])
    assert flip_stats(optimizer).total_flips > 0


def test_with_several_passes_each_and_a_step_that_only_one_must_skip(ranks):
    weights, optimizer = one_process("sign", rounds=2, bad=True)
    assert optimizer.skipped_steps == 1
    for saved in (done["several passes, one bad"] for done in ranks):
        for name in weights:
            if name.endswith("packed"):
                assert torch.equal(saved["model"][name], weights[name])
        assert saved["optimizer"]["param_groups"][0]["skipped_steps"] == 1


def test_ranks_skip_together_and_a_retried_step_counts_votes_once(ranks):
    found = {}
    first, second = (done["apart"] for done in ranks)
    for fault, (one, counted) in first.items():
        other, others = second[fault]
        # Parameters do not move, and replicas of T stay alike.
        assert_same(one, other)
        found[fault] = one, counted, others
    one, counted, others = found["none"]
    assert counted["flips"] == others["flips"] > 0
    again, counted, others = found["retry"]
    assert counted["raised"]
    assert others["raised"]
    assert_same(again, one)
    # Only the second rank has a gradient that is not finite.
    skipped, counted, others = found["skip"]
    assert counted == others
    assert counted["skipped"] == 1
    assert int(skipped["taken"]) == 3
    # With nonfinite='raise', the second rank raises and the first skips the step.
    raised, counted, others = found["raise"]
    assert (counted["raised"], others["raised"]) == (False, True)
    assert (counted["skipped"], others["skipped"]) == (1, 0)
    assert_same(raised, skipped)
    # Both know the width of the votes' sum, though only one has seen their kind.
    _, counted, others = found["changed"]
    assert counted["flips"] == others["flips"] > 0
