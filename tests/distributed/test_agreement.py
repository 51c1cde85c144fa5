"""All processes take a step, or none does: whatever is wrong with one of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn import Parameter

import steepest
from steepest.distributed import agreement
from steepest.distributed.agreement import agree, groups_of, host_reads
from steepest.engine import grad_check
from steepest.engine.collect import Collector

from .ranks import LAYOUTS, WORLD, placed, run_on_ranks


def make(mesh: Any, placements: Any, **options: Any) -> tuple[list[Any], Any]:
    params = [Parameter(placed(torch.ones(8, 4), mesh, placements)) for _ in range(2)]
    params.append(Parameter(torch.ones(3)))  # a norm that tensor parallelism leaves alone
    for param in params:
        param.grad = torch.ones_like(param)
    named = zip(("a", "b", "norm"), params, strict=True)
    return params, steepest.Lion(list(named), lr=0.5, weight_decay=0.0, **options)


def attempt(optimizer: Any) -> str:
    try:
        optimizer.step()
    except (RuntimeError, FloatingPointError) as error:
        return f"{type(error).__name__}: {error}"
    return "stepped"


def local(param: Any) -> torch.Tensor:
    return param.detach().to_local() if isinstance(param, DTensor) else param.detach()


def untouched(params: list[Any], optimizer: Any) -> bool:
    return all(local(param).eq(1).all() for param in params) and not any(optimizer.state.values())


@pytest.mark.parametrize("layout", ["FSDP", "HSDP", "FSDP x TP, columns", "replicated"])
def test_one_nan_makes_all_skip(layout: str):
    def work(rank: int) -> None:
        mesh_shape, placements = LAYOUTS[layout]
        params, optimizer = make(init_device_mesh("cpu", mesh_shape), placements, nonfinite="skip")
        if rank == 2:
            local(params[1].grad)[0, 0] = float("nan")
        optimizer.step()
        assert untouched(params, optimizer)
        assert optimizer.skipped_steps == 1
        params[1].grad = torch.ones_like(params[1])
        optimizer.step()
        assert all(local(param).eq(0.5).all() for param in params)
        assert optimizer.skipped_steps == 1

    run_on_ranks(work)


def test_one_infinite_element_makes_all_raise():
    def work(rank: int) -> str:
        mesh_shape, placements = LAYOUTS["FSDP x TP, rows"]
        params, optimizer = make(init_device_mesh("cpu", mesh_shape), placements, nonfinite="raise")
        if rank == 1:
            params[2].grad[0] = float("inf")
        said = attempt(optimizer)
        assert untouched(params, optimizer)
        return said

    said = run_on_ranks(work)
    assert "FloatingPointError: the gradient of parameter 'norm' has 1 infinite or NaN" in said[1]
    assert all("FloatingPointError: a gradient has" in said[rank] for rank in (0, 2, 3))


@pytest.mark.parametrize("missing", [["b"], ["a", "b", "norm"]], ids=["one", "all"])
def test_a_gradient_in_some_processes_only_raises_in_all(missing: list[str]):
    def work(rank: int) -> str:
        mesh_shape, placements = LAYOUTS["HSDP"]
        params, optimizer = make(init_device_mesh("cpu", mesh_shape), placements, nonfinite="skip")
        if rank == 3:
            for name in missing:
                params[["a", "b", "norm"].index(name)].grad = None
        said = attempt(optimizer)
        assert untouched(params, optimizer)
        return said

    more = " (and 2 more)" if len(missing) > 1 else ""
    text = f"parameter '{missing[0]}'{more} has a gradient on 3 of 4 processes; nothing was changed"
    assert run_on_ranks(work) == [f"RuntimeError: {text}"] * WORLD


def test_no_gradient_anywhere_is_no_error():
    def work(rank: int) -> None:
        params, optimizer = make(init_device_mesh("cpu", (4,)), [Shard(0)], nonfinite="skip")
        optimizer.zero_grad()
        optimizer.step()
        assert untouched(params, optimizer)

    run_on_ranks(work)


@pytest.mark.parametrize("change", [{"lr": 0.25}, {"weight_decay": 0.5}, {"betas": (0.5, 0.5)}], ids=str)
def test_other_options_in_one_process_raise_in_all(change: dict[str, Any]):
    def work(rank: int) -> str:
        params, optimizer = make(init_device_mesh("cpu", (4,)), [Shard(0)], nonfinite="raise")
        if rank == 1:
            optimizer.param_groups[0].update(change)
        said = attempt(optimizer)
        assert untouched(params, optimizer)
        return said

    said = run_on_ranks(work)
    assert (
        said == ["RuntimeError: the processes have different parameters or options; nothing was changed"] * 4
    )


def test_meshes_within_one_another_and_beside_one_another():
    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        pairs = [(mesh, mesh["dp"]), (mesh["dp"], mesh["tp"]), (mesh["tp"], mesh["dp"])]
        for meshes in pairs:
            params = [
                Parameter(placed(torch.ones(4, 4), each, [Shard(0)] * each.ndim)) for each in meshes
            ]  # fmt: skip
            optimizer = steepest.Lion(params, nonfinite="skip")
            for param in params:
                param.grad = torch.ones_like(param)
            if rank == 3:
                local(params[1].grad)[0, 0] = float("nan")
            optimizer.step()
            assert untouched(params, optimizer)
            assert optimizer.skipped_steps == 1
            if rank == 2:
                params[0].grad = None
            said = attempt(optimizer)
            assert "has a gradient on 3 of 4 processes" in said, said

    run_on_ranks(work)


def test_a_sum_that_overflows_is_found_after_it_was_made():
    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (4,))
        param = Parameter(placed(torch.ones(6), mesh, [Replicate()]))
        optimizer = steepest.SGD([param], nonfinite="skip")
        param.grad = DTensor.from_local(torch.full((6,), 3e38), mesh, [Partial()])
        optimizer.step()
        assert untouched([param], optimizer)
        assert optimizer.skipped_steps == 1

    run_on_ranks(work)


@pytest.mark.parametrize(("nonfinite", "sent"), [("ignore", 0), ("skip", 1), ("raise", 1)])
def test_what_is_sent(nonfinite: str, sent: int, monkeypatch: pytest.MonkeyPatch):
    calls: list[int] = []
    real = agreement._all_reduce
    monkeypatch.setattr(agreement, "_all_reduce", lambda *a: (calls.append(len(a[1])), real(*a))[1])

    def work(rank: int) -> None:
        _, optimizer = make(init_device_mesh("cpu", (4,)), [Shard(0)], nonfinite=nonfinite)
        for _ in range(2):
            optimizer.step()

    run_on_ranks(work)
    assert calls == [7] * (sent * 2 * WORLD)


# -- processes with other parameters, or with none that are sharded


def stage(rank: int, mesh: Any, **options: Any) -> tuple[list[Any], Any]:
    """The parameter of one of two pipeline stages, each on two ranks, with ones for a gradient."""
    shape = (8, 4) if rank < 2 else (6,)
    param = Parameter(placed(torch.ones(shape), mesh["dp"], [Shard(0)]))
    param.grad = torch.ones_like(param)
    return [param], steepest.Lion([(f"w{rank // 2}", param)], lr=0.5, weight_decay=0.0, **options)


@pytest.mark.parametrize("together", [None, "all"], ids=str)
def test_pipeline_stages_skip_together_if_they_are_told_to(together: str | None):
    def work(rank: int) -> int:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
        params, optimizer = stage(rank, mesh, nonfinite="skip", agree=together)
        if rank == 3:
            local(params[0].grad)[0] = float("nan")
        optimizer.step()
        skipped = optimizer.skipped_steps
        assert untouched(params, optimizer) == bool(skipped)
        params[0].grad = torch.ones_like(params[0])
        optimizer.step()
        assert optimizer.skipped_steps == skipped
        return skipped

    assert run_on_ranks(work) == ([1, 1, 1, 1] if together else [0, 0, 1, 1])


def test_an_error_within_one_pipeline_stage_is_raised_in_all():
    def work(rank: int) -> list[str]:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
        params, optimizer = stage(rank, mesh, nonfinite="skip", agree="all")
        if rank == 3:
            params[0].grad = None
        said = [attempt(optimizer)]
        params[0].grad = torch.ones_like(params[0])
        optimizer.param_groups[0]["lr"] += rank
        said.append(attempt(optimizer))
        assert untouched(params, optimizer)
        return said

    other = "RuntimeError: processes that hold other parameters than this one disagree"
    own = "RuntimeError: the processes have different parameters or options"
    said = run_on_ranks(work)
    assert all(missing.startswith(other) for missing, _ in said[:2])
    assert all("'w1' has a gradient on 1 of 2 processes" in missing for missing, _ in said[2:])
    assert all(differ.startswith(own) for _, differ in said)


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_whole_tensors_of_pipeline_stages_agree_over_the_default_group(nonfinite: str):
    def work(rank: int) -> str:
        param = Parameter(torch.ones(rank + 1))
        optimizer = steepest.Lion([("w", param)], lr=0.5, nonfinite=nonfinite, agree="all")
        # A stage without any gradient takes part.
        param.grad = None if rank == 0 else torch.full_like(param, float("inf") if rank == 1 else 1.0)
        said = attempt(optimizer)
        assert untouched([param], optimizer)
        return f"{said} {optimizer.skipped_steps}"

    said = run_on_ranks(work)
    if nonfinite == "skip":
        assert said == ["stepped 1"] * WORLD
    else:
        assert "gradient of parameter 'w' has 2 infinite" in said[1]
        assert all("on another process" in said[rank] for rank in (0, 2, 3))


@pytest.mark.parametrize("nonfinite", ["ignore", "skip"])
def test_stages_that_need_not_communicate_agree_with_those_that_must(
    nonfinite: str, monkeypatch: pytest.MonkeyPatch
):
    sent: dict[int, list[Any]] = {rank: [] for rank in range(WORLD)}
    real = agreement.agree

    def counted(groups: Any, *rest: Any) -> torch.Tensor:
        own = sent[torch.distributed.get_rank()]
        own += [group for group in groups if group is None]
        # A process that takes part once too often would wait.
        assert len(own) <= 2
        return real(groups, *rest)

    monkeypatch.setattr(grad_check, "agree", counted)

    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))["dp"]
        if rank < 2:
            # The matrix travels, and its gradient is a sum.
            param = Parameter(placed(torch.ones(4, 4), mesh, [Shard(0)]))
            optimizer: Any = steepest.Muon([("a", param)], lr=0.5, nonfinite=nonfinite, agree="all")
            param.grad = DTensor.from_local(torch.eye(4), mesh, [Partial()], run_check=False)
        else:
            param = Parameter(torch.ones(4))
            optimizer = steepest.Lion([("b", param)], lr=0.5, nonfinite=nonfinite, agree="all")
            param.grad = torch.ones_like(param)
        optimizer.step()
        # What follows meets nothing that is left over.
        torch.distributed.all_reduce(total := torch.ones(()))
        assert total == WORLD

    run_on_ranks(work)
    assert {len(own) for own in sent.values()} == {2}


def test_agreeing_with_all_is_nothing_in_one_process():
    param = Parameter(torch.ones(2))
    optimizer = steepest.Lion([param], lr=0.5, weight_decay=0.0, nonfinite="skip", agree="all")
    for value in (float("nan"), 1.0):
        param.grad = torch.full_like(param, value)
        optimizer.step()
    assert (param.tolist(), optimizer.skipped_steps) == ([0.5, 0.5], 1)


def test_whole_tensors_with_owners_agree_over_the_default_group():
    def work(rank: int) -> list[str]:
        param = Parameter(torch.ones(2, 2))
        optimizer = steepest.Lion([("w", param)], lr=0.5, nonfinite="skip")
        optimizer.param_groups[0]["distributed"] = "owners"
        param.grad = torch.full_like(param, float("nan") if rank == 1 else 1.0)
        said = [f"{attempt(optimizer)} {optimizer.skipped_steps}"]
        param.grad = None if rank == 3 else torch.ones_like(param)
        said.append(attempt(optimizer))
        assert untouched([param], optimizer)
        return said

    missing = "RuntimeError: parameter 'w' has a gradient on 3 of 4 processes; nothing was changed"
    assert run_on_ranks(work) == [["stepped 1", missing]] * WORLD


def test_before_an_exchange_processes_agree_whatever_nonfinite_says():
    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (4,))
        for sharded in (True, False):
            params, optimizer = make(mesh, [Shard(0)])
            if not sharded:
                optimizer.param_groups[0]["params"] = params = params[2:]
                optimizer.param_groups[0]["param_names"] = ["norm"]
            local(params[-1].grad)[0] = float("nan")  # nobody looks at it
            for change, error in [
                ({}, None),
                ({"lr": 0.25}, "different parameters or options"),
                ({"lr": 0.5}, None),
            ]:
                if rank == 2:
                    optimizer.param_groups[0].update(change)
                batches = Collector().batches_of("a test", optimizer.param_groups, optimizer.state)
                if error is None:
                    assert grad_check.check_together(batches, optimizer.param_groups, exchanging=True) is True
                else:
                    with pytest.raises(RuntimeError, match=error):
                        grad_check.check_together(batches, optimizer.param_groups, exchanging=True)
                # Without an exchange nothing is compared.
                assert grad_check.check_together(batches, optimizer.param_groups) is True

    run_on_ranks(work)


def test_numbers_are_compared_over_meshes_process_groups_and_the_default_group():
    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        device = torch.device("cpu")
        pair = mesh["tp"].get_group()

        def found(over: list[Any], same: int, worst: int) -> list[int]:
            return agree(groups_of(over), [same], [worst], device).tolist()

        for over in (
            [],
            [mesh],
            [mesh, pair],
            [mesh["dp"], pair],
            [torch.distributed.group.WORLD, mesh["dp"]],
        ):
            assert found(over, 7, rank) == [0, 3]
            assert found(over, rank // 3, -rank) == [1, 0]
        assert found([pair], rank // 2, rank) == [0, rank | 1]
        assert found([mesh["dp"]], rank // 2, rank) == [1, rank | 2]

    run_on_ranks(work)


# -- an accelerator, whose numbers the host does not always read


def test_when_the_host_reads():
    def steps(device_type: str, **options: Any) -> list[int]:
        return [age for age in range(250) if host_reads(device_type, age, **{"raises": False, **options})]

    assert steps("cuda") == [0, 1, 2, 100, 200]
    assert steps("cuda", capturing=True) == [0, 1, 2]
    assert steps("cpu") == steps("cuda", raises=True) == list(range(250))


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host decides on the CPU as it does on an accelerator."""
    monkeypatch.setattr(grad_check, "host_reads", lambda _, age, **other: host_reads("cuda", age, **other))


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("pending", [False, True], ids=["laid out", "to be summed"])
def test_a_flag_that_the_host_does_not_read_makes_all_skip(pending: bool):
    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (4,))
        params, optimizer = make(mesh, [Shard(0)], nonfinite="skip")
        for step in range(8):
            given = torch.full((8, 4), float("nan") if (step, rank) in [(5, 1), (6, 3)] else 0.25)
            parts = DTensor.from_local(given, mesh, [Partial()])
            for param in params[:2]:
                param.grad = parts if pending else DTensor.from_local(given[:2], mesh, [Shard(0)])
            optimizer.param_groups[0]["lr"] = 2.0**-step  # a schedule does not make the host read
            optimizer.step()
            skipped = optimizer.param_groups[0]["skipped_steps"]
            assert int(skipped) == max(0, min(step - 4, 2))
            assert isinstance(skipped, torch.Tensor) == (step > 2)
        expected = 1 - sum(2.0**-step for step in (0, 1, 2, 3, 4, 7))
        assert all(local(param).eq(expected).all() for param in params)

    run_on_ranks(work)


@pytest.mark.usefixtures("unread")
def test_a_flag_that_the_host_does_not_read_masks_matrices_that_travel():
    """Good steps are those of the same optimizer without the bad ones in between."""

    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (4,))
        start = torch.linspace(-1, 1, 48).view(8, 6)
        ends = []
        for bad in ([], [4, 6]):
            param = Parameter(placed(start.clone(), mesh, [Shard(0)]))
            optimizer = steepest.Muon([("w", param)], lr=0.1, nonfinite="skip")
            for step in range(8):
                if step in (4, 6) and not bad:
                    continue
                grad = torch.sin(start * (step + 2))
                param.grad = placed(grad, mesh, [Shard(0)])
                if step in bad and rank == 1:
                    local(param.grad)[0, 0] = float("inf")
                optimizer.step()
            assert optimizer.skipped_steps == len(bad)
            ends.append((local(param), local(optimizer.state[param]["momentum_buffer"])))
        assert all(map(torch.equal, *ends))

    run_on_ranks(work)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("change", ["lr", "option", "gradient"])
def test_a_process_that_departs_raises_and_the_others_skip(change: str):
    def work(rank: int) -> str:
        params, optimizer = make(init_device_mesh("cpu", (4,)), [Shard(0)], nonfinite="skip")
        optimizer.param_groups[0]["lr"] = 0.0
        for _ in range(4):
            optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.5
        if rank == 1:
            if change == "gradient":
                params[1].grad = None
            else:
                optimizer.param_groups[0].update({"lr": 0.25} if change == "lr" else {"maximize": True})
        said = attempt(optimizer)
        assert all(local(param).eq(1).all() for param in params)
        if said == "stepped":
            assert optimizer.skipped_steps == 1
        return said

    said = run_on_ranks(work)
    assert [said[rank] for rank in (0, 2, 3)] == ["stepped"] * 3
    assert said[1].startswith(
        {
            "lr": "stepped",  # read in one of a hundred steps
            "option": "RuntimeError: the processes have different parameters or options",
            "gradient": "RuntimeError: only some processes have gradients of the same parameters: unlike in "
            "the last step, parameter 'b' has no gradient in this process",
        }[change]
    )


@pytest.mark.usefixtures("unread")
def test_where_nothing_is_skipped_there_is_no_mask():
    def work(rank: int) -> None:
        _, optimizer = make(init_device_mesh("cpu", (2,)), [Shard(0)])
        collector = Collector()
        for _ in range(5):
            batches = collector.batches_of("a test", optimizer.param_groups, optimizer.state)
            may = grad_check.check_together(
                batches, optimizer.param_groups, exchanging=True, history=collector.history
            )
            assert may is True

    run_on_ranks(work, 2)


@pytest.mark.usefixtures("unread")
def test_another_learning_rate_is_found_after_a_hundred_steps():
    def work(rank: int) -> None:
        _, optimizer = make(init_device_mesh("cpu", (2,)), [Shard(0)], nonfinite="skip")
        for _ in range(3):
            optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.5 + rank
        for _ in range(97):
            assert attempt(optimizer) == "stepped"
        assert attempt(optimizer).startswith("RuntimeError: the processes have different parameters or")
        assert optimizer.skipped_steps == 97

    run_on_ranks(work, 2)
