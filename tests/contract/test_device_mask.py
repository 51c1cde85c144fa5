"""``nonfinite="skip"`` on an accelerator, where only the device knows whether the step is taken.

The path runs here on the CPU: the check gives a tensor in place of a bool, and counting takes the
parameters to be elsewhere. Reading a device's number on the host is an error, as a sync would be there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from steepest.compile.available import compiler_available
from steepest.engine import grad_check, pipeline
from steepest.engine.collect import Collector, ParamBatch

from .cases import CASES, LOW_BIT, RULES, Case, able, by_id, deterministic, one_of_each, reach, spread
from .recording import configure
from .training import identical, make_params, set_gradients, snapshot, values

GOOD, BAD = True, False
STEPS = [GOOD, GOOD, BAD, GOOD, GOOD, BAD, BAD, GOOD, BAD, GOOD]
MEASURED = 5  # by this step every variant has measured what it measures


class _NoSync(TorchDispatchMode):
    """Reading a number on the host is an error, but for those of a tensor's own that live there."""

    def __init__(self, allowed: list[Tensor]) -> None:
        super().__init__()
        self.allowed = {tensor.data_ptr() for tensor in allowed}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].data_ptr() not in self.allowed:
            raise AssertionError("the host waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    check = grad_check.check_gradients

    def check_on_device(batches: list[ParamBatch]) -> bool | Tensor:
        finite = check(batches)
        watched = any(batch.config.group["nonfinite"] == "skip" for batch in batches)
        return torch.tensor(finite) if watched else finite

    monkeypatch.setattr(grad_check, "check_gradients", check_on_device)
    configure(monkeypatch, counts_on_device=lambda group: group["nonfinite"] == "skip")


def _single(case: Case, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    names = case.tensor_state
    return [state[name] for state in optimizer.state.values() for name in names if name in state]


def _spoil(params: list[Parameter], step: int) -> None:
    set_gradients(params, step)
    if STEPS[step] is BAD:
        params[step % len(params)].grad.view(-1)[0] = torch.nan if step % 2 else torch.inf


def _host_run(case: Case, params: list[Parameter], **options: Any) -> Any:
    optimizer = case.make(params, nonfinite="skip", compile=False, **options)
    for step in range(len(STEPS)):
        _spoil(params, step)
        optimizer.step()
    return optimizer


def _device_run(case: Case, params: list[Parameter], **options: Any) -> Any:
    optimizer = case.make(params, nonfinite="skip", **options)
    for step in range(len(STEPS)):
        _spoil(params, step)
        before = values(params)
        quiet = step >= MEASURED and "quiet steps" not in case.cannot
        quiet = quiet and not options["compile"]  # torch.compile refuses dispatch modes
        _step(case, optimizer, quiet=quiet)
        if STEPS[step] is BAD:
            assert identical(values(params), before)
    return optimizer


def _step(case: Case, optimizer: Any, *, quiet: bool) -> None:
    if not quiet:
        optimizer.step()
        return
    # The check is the CPU's here and reads its own answer, so it is made beforehand.
    finite = grad_check.check_gradients(
        Collector().batches_of("a test", optimizer.param_groups, optimizer.state)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grad_check, "check_gradients", lambda _: finite)
        with _NoSync(_single(case, optimizer)):
            optimizer.step()


def _equal_runs(case: Case, make: Callable[[], list[Parameter]], **options: Any) -> None:
    params, twins = make(), make()
    compile_, options = options.pop("compile", False), {"weight_decay": 0.125, **options}
    twin = _host_run(case, twins, **options)
    optimizer = _device_run(case, params, compile=compile_, **options)
    assert identical(params, twins)
    assert identical(optimizer.state_dict()["state"], twin.state_dict()["state"])
    assert isinstance(optimizer.param_groups[0]["skipped_steps"], Tensor)
    assert optimizer.skipped_steps == twin.skipped_steps == STEPS.count(BAD)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*spread(CASES, [torch.float32, torch.bfloat16, torch.complex64]), *LOW_BIT],
    ids=str,
)
@pytest.mark.usefixtures("on_device")
def test_eagerly_it_equals_the_host_s_decision(case: Case, dtype: torch.dtype):
    _equal_runs(case, lambda: case.params(dtype), rounding="stochastic")


@pytest.mark.skipif(not compiler_available("cpu"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("case", one_of_each(filter(deterministic, able(RULES, "compile")), reach), ids=by_id)
@pytest.mark.usefixtures("on_device")
def test_compiled_it_equals_the_host_s_decision(case: Case):
    _equal_runs(case, lambda: case.params(shapes=[(4, 3)]), compile=True)


@pytest.mark.parametrize("case", CASES, ids=by_id)
@pytest.mark.usefixtures("on_device")
def test_a_bad_first_step_changes_nothing_that_matters(case: Case):
    """State may exist after it, but as it begins: training goes on as if the step had not been."""
    params, twins = case.params(torch.bfloat16), case.params(torch.bfloat16)
    optimizer = case.make(params, nonfinite="skip", rounding="stochastic")
    set_gradients(params, 50)
    params[0].grad.fill_(torch.nan)
    before = values(params)
    optimizer.step()
    assert identical(values(params), before)
    assert optimizer.skipped_steps == 1
    begun = {
        p: {**s, **{name: 0 * s[name] for name in case.factors(optimizer, p)}}
        for p, s in optimizer.state.items()
    }
    assert all(not torch.count_nonzero(v) for state in begun.values() for v in state.values())
    twin = case.make(twins, rounding="stochastic")
    for step in range(3):
        for some, some_params in ((optimizer, params), (twin, twins)):
            set_gradients(some_params, step)
            some.step()
    assert identical(params, twins)
    assert identical(optimizer.state_dict()["state"], twin.state_dict()["state"])


@pytest.mark.parametrize("case", RULES, ids=by_id)
@pytest.mark.usefixtures("on_device")
def test_the_count_on_the_device_survives_checkpoints(case: Case):
    params = case.params()
    optimizer = case.make([{"params": params[:1]}, {"params": params[1:]}], nonfinite="skip")
    for step in range(7):
        _spoil(params, step)
        optimizer.step()
    again = case.make([{"params": params[:1]}, {"params": params[1:]}], nonfinite="skip")
    again.load_state_dict(optimizer.state_dict())
    assert identical(snapshot(again, params), snapshot(optimizer, params))
    _spoil(params, 8)
    again.step()
    assert again.skipped_steps == 4
    assert optimizer.skipped_steps == 3


@pytest.mark.usefixtures("on_device")
def test_a_group_that_ignores_is_stepped_with_the_others_or_not_at_all():
    params, twins = make_params(), make_params()

    def groups(some: list[Parameter]) -> list[dict[str, Any]]:
        return [{"params": some[:1], "nonfinite": "ignore"}, {"params": some[1:]}]

    optimizer = Case("adamw").make(groups(params), nonfinite="skip")
    set_gradients(params, 0)
    params[1].grad.fill_(torch.inf)
    optimizer.step()
    assert identical(params, twins)
    assert optimizer.skipped_steps == 1
    assert {float(state["step"]) for state in optimizer.state.values()} == {0.0}


def test_the_patches_reach_the_path(on_device: Iterator[None], monkeypatch: pytest.MonkeyPatch):
    """Or everything above would compare the host's path with itself."""
    masks, members = [], []
    run = pipeline._run

    def spy(batch: ParamBatch, finite: Tensor | None, compiled: bool) -> None:
        masks.append(finite)
        members.extend(dataclasses.replace(member) for member in batch.members)
        run(batch, finite, compiled)

    monkeypatch.setattr(pipeline, "_run", spy)
    params = make_params()
    optimizer = Case("adamw").make(params, nonfinite="skip", compile=False)
    for step in range(3):
        _spoil(params, step)
        optimizer.step()
    assert [mask.item() for mask in masks] == STEPS[:3]
    assert all(isinstance(member.step, Tensor) for member in members)
    assert all(isinstance(scalar, Tensor) for member in members for scalar in member.scalars.values())
