"""Users' matrix functions at the owner, and what happens where a matrix cannot be computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.nn import Parameter

import steepest
from steepest.rules.muon import MuonRule

from .matrix_runs import EXACT, alone, assert_equal, sharded, wholes
from .ranks import LAYOUTS, WORLD, placed, run_on_ranks

# -- a user's own matrix function


class Own(steepest.OrthogonalizedOptimizer):
    """Signs, from the whole matrix; decays by its own code."""

    fails_on: int | None = None
    seen: list[tuple[Any, Any]]

    def orthogonalize(self, p: Any, grad: torch.Tensor, **options: Any) -> torch.Tensor:
        if self.fails_on == dist.get_rank() if dist.is_initialized() else False:
            raise ArithmeticError("no")
        assert grad.shape == p.shape
        return grad.sign() * grad.abs().max()


class OwnDecay(Own):
    def _apply_weight_decay_inplace(self, p: Any, grad: Any, lr: Any, weight_decay: float) -> None:
        p.mul_(1 - lr * weight_decay)


@pytest.mark.parametrize("cls", [Own, OwnDecay])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_user_s_function_sees_the_whole_matrix(layout: str, cls: Any):
    def make(params: Any) -> Any:
        return cls(params, lr=0.1, weight_decay=0.5, use_nesterov=True)

    whole, _ = alone(make)
    run_on_ranks(lambda rank: assert_equal(sharded(make, layout)[0], whole))


@pytest.mark.parametrize("cls", [Own, OwnDecay])
@pytest.mark.parametrize("bad", [0, 3])
def test_if_a_user_s_function_raises_on_one_process_nothing_changes_on_any(bad: int, cls: Any):
    def work(rank: int) -> str:
        params, optimizer = sharded(lambda params: cls(params, lr=0.1, bucket_bytes=2000), "FSDP", steps=1)
        optimizer.fails_on = bad
        before = [
            each.to_local().clone()
            for param in params
            for each in (param.detach(), optimizer.state[param]["momentum_buffer"])
        ]
        with pytest.raises((ArithmeticError, RuntimeError)) as raised:
            optimizer.step()
        after = [
            each.to_local()
            for param in params
            for each in (param.detach(), optimizer.state[param]["momentum_buffer"])
        ]
        assert all(map(torch.equal, before, after))
        optimizer.fails_on = None
        optimizer.step()  # nobody waits for anybody
        return f"{type(raised.value).__name__}: {raised.value}"

    said = run_on_ranks(work)
    assert said[bad] == "ArithmeticError: no"
    for rank in set(range(WORLD)) - {bad}:
        assert f"RuntimeError: rank {bad} failed to compute the direction of parameter 'w" in said[rank]
        assert said[rank].endswith("nothing was changed")


@pytest.fixture
def rank_1_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Muon run out of memory on one process."""
    real = MuonRule.transform

    def failing(self: Any, u: torch.Tensor, **given: Any) -> Any:
        if dist.is_initialized() and dist.get_rank() == 1:
            raise MemoryError("none left")
        return real(self, u, **given)

    monkeypatch.setattr(MuonRule, "transform", failing)


@pytest.mark.usefixtures("rank_1_fails")
def test_if_a_rule_fails_on_one_process_all_raise():
    def work(rank: int) -> str:
        with pytest.raises((MemoryError, RuntimeError)) as raised:
            sharded(lambda params: steepest.Muon(params, **EXACT), "HSDP", steps=1)
        return f"{type(raised.value).__name__}: {raised.value}"

    said = run_on_ranks(work)
    assert said[1] == "MemoryError: none left"
    for rank in (0, 2, 3):
        assert "RuntimeError: rank 1 failed to compute the direction of parameter 'w" in said[rank]


@pytest.fixture
def poisoned() -> Any:
    """Let memory that nobody has written hold NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned", "rank_1_fails")
def test_what_fails_where_nothing_travels_is_left_as_it_was():
    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (WORLD,))
        (whole,) = wholes(-1, [(8, 4, 3)])
        param = Parameter(placed(whole, mesh, [Shard(0)]))
        param.grad = torch.ones_like(param)
        before = param.to_local().clone()
        optimizer = steepest.Muon([param], view="batch", **EXACT)
        if rank == 1:
            with pytest.raises(MemoryError):
                optimizer.step()
        else:
            optimizer.step()
        assert torch.equal(param.to_local(), before) == (rank == 1)

    run_on_ranks(work)


def test_a_user_s_function_that_fails_where_nothing_travels_is_an_error_on_all():
    def work(rank: int) -> str:
        params, optimizer = sharded(lambda params: Own(params, lr=0.1), "FSDP", steps=1, shapes=[(1, 6)])
        before = params[0].to_local().clone()
        optimizer.fails_on = 0  # the only process that holds any of the matrix
        with pytest.raises((ArithmeticError, RuntimeError)) as raised:
            optimizer.step()
        assert torch.equal(params[0].to_local(), before)
        return f"{type(raised.value).__name__}: {raised.value}"

    said = run_on_ranks(work)
    assert said[0] == "ArithmeticError: no"
    for each in said[1:]:
        assert each.startswith("RuntimeError: rank 0 failed to compute the direction of parameter 'w0'")


def test_a_user_s_function_that_fails_in_one_replica_is_an_error_in_all():
    def work(rank: int) -> str:
        # One matrix: each of two replicas computes it by itself.
        params, optimizer = sharded(lambda params: Own(params, lr=0.1), "HSDP", steps=1, shapes=[(8, 6)])
        before = params[0].to_local().clone()
        optimizer.fails_on = 0
        with pytest.raises((ArithmeticError, RuntimeError)) as raised:
            optimizer.step()
        assert torch.equal(params[0].to_local(), before)
        return f"{type(raised.value).__name__}: {raised.value}"

    said = run_on_ranks(work)
    assert said[0] == "ArithmeticError: no"
    assert "rank 0 failed to compute the direction of parameter 'w0'" in said[1]
    assert all(each.startswith("RuntimeError: a process of other replicas failed") for each in said[2:])


@pytest.mark.usefixtures("poisoned")
def test_the_state_of_a_matrix_without_elements_is_as_in_one_process():
    shapes = [(5, 0), (8, 6)]

    def make(params: Any) -> Any:
        return steepest.NorMuon(params, **EXACT)

    whole, other = alone(make, shapes=shapes)

    def work(rank: int) -> None:
        params, optimizer = sharded(make, "FSDP", shapes=shapes)
        assert_equal(params, whole)
        for own, theirs in zip(params, whole, strict=True):
            name = "second_momentum"
            assert torch.equal(optimizer.state[own][name], other.state[theirs][name])

    run_on_ranks(work)
