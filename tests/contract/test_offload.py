"""State on the host: the same steps, computed on the CPU with copies that come and go.

Where there is no accelerator the CPU plays one: its parameters count as away, and copies land as late as
they may, so that a wait that is missing shows.
"""

from __future__ import annotations

import copy
import gc
import math
import types
import weakref
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest.compile.available import compiler_available
from steepest.engine import compiled, cpu_offload

from .cases import CASES, LOW_BIT, RULES, Case, by_id, spread, with_dtypes
from .recording import configure
from .released import holder, ordinary_run, released_run
from .training import identical, make_params, set_gradients, snapshot, steps, train, values

STEPPED_ON_HOST = [case for case in CASES if case.rule.scope != "matrix"]
MATRIX = [case for case in RULES if case.rule.scope == "matrix"]
OPTIONS: dict[str, Any] = {"rounding": "stochastic", "weight_decay": 0.125, "seed": 5}


class LateLanes:
    """Copies that are made when somebody waits for them, and not before."""

    made: ClassVar[list[LateLanes]] = []

    def __init__(self, device: torch.device) -> None:
        self.sent: list[tuple[Tensor, Tensor]] = []
        self.finished = False
        self.buffers: weakref.WeakSet[Tensor] = weakref.WeakSet()
        self.most = 0
        LateLanes.made.append(self)

    def fetch(self, tensors: Iterable[Tensor]) -> tuple[list[Tensor], Callable[[], None]]:
        tensors = list(tensors)
        copies = [torch.full_like(tensor, math.nan) for tensor in tensors]
        self.buffers.update(copies)
        self.most = max(self.most, len(self.buffers))

        def wait() -> None:
            for mine, theirs in zip(copies, tensors, strict=True):
                mine.copy_(theirs)

        return copies, wait

    def send(self, source: Tensor, target: Tensor) -> None:
        self.sent.append((source.clone(), target))

    def finish(self) -> None:
        for source, target in self.sent:
            target.copy_(source)
        self.finished = True


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> list[LateLanes]:
    configure(monkeypatch, offloaded=lambda group: group["state_device"] == "cpu")
    monkeypatch.setattr(cpu_offload, "Lanes", LateLanes)
    LateLanes.made = []
    return LateLanes.made


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *spread(STEPPED_ON_HOST, [torch.float32, torch.bfloat16, torch.complex64]),
        *(each for each in LOW_BIT if each[0].rule.scope != "matrix"),
    ],
    ids=str,
)
def test_the_steps_are_the_cpu_s(case: Case, dtype: torch.dtype, far: list[LateLanes]):
    params, twins = case.params(dtype), case.params(dtype)
    optimizer = case.make(params, state_device="cpu", **OPTIONS)
    twin = case.make(twins, **OPTIONS)
    ordinary_run(optimizer, params, range(6))
    batches = len(far)
    assert batches >= 6
    assert all(lanes.finished for lanes in far)
    ordinary_run(twin, twins, range(6))
    assert len(far) == batches, "what asks for nothing is stepped where it is"
    assert identical(params, twins)
    assert identical(optimizer.state_dict()["state"], twin.state_dict()["state"])


@pytest.mark.skipif(not compiler_available("cpu"), reason="torch.compile needs a C++ compiler")
def test_compiled_all_share_one_graph(far: list[LateLanes], monkeypatch: pytest.MonkeyPatch):
    params, twins = (make_params(shapes=[(4, 3), (7,), (3, 4)]) for _ in range(2))
    graphs = set()
    run = compiled._code
    monkeypatch.setattr(compiled, "_code", lambda spec, config: graphs.add(spec) or run(spec, config))
    train(Case("adamw").make(params, compile=True, state_device="cpu"), params)
    assert len(graphs) == 1
    train(Case("adamw").make(twins, compile=False), twins)
    assert identical(params, twins)


def test_a_group_compiles_as_a_whole_or_not(far: list[LateLanes], monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(
        "steepest.engine.pipeline.wants_compiling", lambda *given: asked.append(given) or False
    )
    monkeypatch.setattr("steepest.engine.pipeline.PAYS_FROM", 18)
    train(Case("adamw").make(params := make_params(), state_device="cpu"), params, 1)
    assert sum(param.numel() for param in params) == 18
    assert asked == [(None, 18, torch.device("cpu"))]


def test_layouts_and_gradients_of_another_dtype(far: list[LateLanes]):
    def run(**options: Any) -> list[Tensor]:
        params = [
            nn.Parameter(torch.arange(12.0).view(3, 4).t()),
            nn.Parameter(torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last)),
            nn.Parameter(torch.ones(4, 6)[:, ::2]),
            nn.Parameter(torch.ones(0, 3)),
            nn.Parameter(torch.ones(5, dtype=torch.bfloat16)),
        ]
        params[-1].grad_dtype = torch.float32
        optimizer = Case("lion").make(params, **options)
        for step in range(3):
            for param in params[:-1]:
                param.grad = torch.cos(step + param.detach())
            params[-1].grad = torch.linspace(-1, 1, 5) + 0.1 * step
            optimizer.step()
        return values(params)

    assert identical(run(state_device="cpu"), run())


def test_few_parameters_are_on_their_way_at_once(far: list[LateLanes]):
    params = make_params(shapes=[(3,)] * 40)
    train(Case("lion").make(params, state_device="cpu"), params, 1)
    gc.collect()
    assert far[0].most <= 2 * 4


def test_the_copies_of_a_device_with_streams(monkeypatch: pytest.MonkeyPatch):
    """The CPU has streams too, in name; memory is pinned only where there is an accelerator."""
    events: list[str] = []

    class Stream(torch.cpu.Stream):
        def __init__(self, device: torch.device) -> None:
            super().__init__()

        def wait_stream(self, stream: Any) -> None:
            events.append("wait")

    class Event(torch.cpu.Event):
        def synchronize(self) -> None:
            events.append("synchronize")

    device_module = types.SimpleNamespace(
        Stream=Stream, Event=Event, stream=torch.cpu.stream, current_stream=Stream
    )
    empty_like, pinned = torch.empty_like, []

    def unpinned(tensor: Tensor, *, pin_memory: bool = False, **options: Any) -> Tensor:
        if pin_memory:
            pinned.append(tensor.shape)
        return empty_like(tensor, **options)

    params, twins = make_params(), make_params()
    train(Case("lion").make(twins), twins, 2)
    configure(monkeypatch, offloaded=lambda group: group["state_device"] == "cpu")
    monkeypatch.setattr(cpu_offload, "_STREAMED", ("cpu",))
    monkeypatch.setattr(torch, "get_device_module", lambda device: device_module)
    monkeypatch.setattr(torch, "empty_like", unpinned)
    train(Case("lion").make(params, state_device="cpu"), params, 2)
    assert identical(params, twins)
    # Two streams wait at first, each parameter's copies are waited for, and the device waits at the end.
    assert events == 2 * (["wait"] * 2 + ["synchronize"] * 3 + ["wait"] * 2)
    assert pinned == 2 * [shape for param in params for shape in (param.shape, param.grad.shape)]


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_a_bad_gradient_stops_the_whole_step_before_anything_moves(nonfinite: str, far: list[LateLanes]):
    params = make_params()
    optimizer = Case("adamw").make(params, state_device="cpu", nonfinite=nonfinite)
    train(optimizer, params, 2)
    before = snapshot(optimizer, params)
    set_gradients(params, 2)
    params[1].grad[0] = math.nan
    if nonfinite == "raise":
        with pytest.raises(FloatingPointError, match="nothing was changed"):
            optimizer.step()
    else:
        optimizer.step()
        assert optimizer.skipped_steps == 1
    assert identical(values(params), before["params"])
    assert identical(optimizer.state_dict()["state"], before["optimizer"]["state"])


def test_with_gradients_released(far: list[LateLanes]):
    params, twins = make_params(torch.bfloat16), make_params(torch.bfloat16)
    released_run(Case("adamw").make(params, state_device="cpu", **OPTIONS), params, range(4))
    ordinary_run(Case("adamw").make(twins, **OPTIONS), twins, range(4))
    assert identical(params, twins)


def test_an_error_on_the_way_leaves_no_copy_behind(far: list[LateLanes], monkeypatch: pytest.MonkeyPatch):
    calls = []

    def fails(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("steepest.engine.pipeline.run_eager", fails)
    params = make_params()
    set_gradients(params, 0)
    with pytest.raises(torch.OutOfMemoryError):
        Case("lion").make(params, state_device="cpu", compile=False).step()
    gc.collect()
    assert far[0].finished


@pytest.mark.parametrize("case", MATRIX, ids=by_id)
def test_matrix_rules_refuse_it(case: Case):
    with pytest.raises(ValueError, match=f"state_device must be None for '{case.name}', got 'cpu'"):
        case.make(case.params(), state_device="cpu")
    with pytest.raises(ValueError, match="group 1: state_device must be None"):
        steepest.Optimizer(
            [{"params": make_params()}, {"params": case.params(), "rule": case.name, "state_device": "cpu"}],
            rule="lion",
        )


def test_one_optimizer_may_keep_some_groups_on_the_host(far: list[LateLanes]):
    def run(fallback: Any) -> tuple[nn.Module, steepest.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5))
        optimizer = steepest.build(model, "muon", fallback=fallback)
        for _ in range(3):
            model(torch.arange(5)).logsumexp(-1).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer

    ours, optimizer = run({"rule": "adamw", "state_device": "cpu"})
    assert far
    theirs, _ = run("adamw")
    assert identical(list(ours.parameters()), list(theirs.parameters()))
    assert {g["rule"]: g["state_device"] for g in optimizer.param_groups} == {"muon": None, "adamw": "cpu"}


# -- checkpoints


@pytest.mark.parametrize(
    ("case", "devices"), spread(STEPPED_ON_HOST, [(None, "cpu"), ("cpu", None), ("cpu", "cpu")]), ids=str
)
def test_checkpoints_interchange_and_where_state_lives_is_the_run_s_business(
    case: Case, devices: tuple[str | None, str | None], far: list[LateLanes]
):
    saved_by, loaded_by = devices
    params, twins = case.params(torch.bfloat16), case.params(torch.bfloat16)
    optimizer, twin = (
        case.make(params, state_device=saved_by, state_dtype=torch.float32),
        case.make(twins, state_dtype=torch.float32),
    )
    train(optimizer, params, 3)
    train(twin, twins, 3)
    copies = [nn.Parameter(value) for value in values(params)]
    again = case.make(copies, state_device=loaded_by, state_dtype=torch.float32)
    saved = copy.deepcopy(optimizer.state_dict())
    again.load_state_dict(saved)
    assert again.param_groups[0]["state_device"] == loaded_by
    assert identical(saved, optimizer.state_dict()), "what was loaded is not written to"
    steps(again, copies, [3])
    steps(twin, twins, [3])
    assert identical(copies, twins)
    assert identical(again.state_dict()["state"], twin.state_dict()["state"])


def test_loading_never_takes_state_through_the_parameters_device(monkeypatch: pytest.MonkeyPatch):
    params = make_params()
    optimizer = Case("adamw").make(params, state_device="cpu")
    train(optimizer, params)
    saved = optimizer.state_dict()

    def refuse(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("torch casts state to the parameter's device")

    monkeypatch.setattr(torch.optim.Optimizer, "_process_value_according_to_param_policy", refuse)
    again = Case("adamw").make(make_params(), state_device="cpu")
    again.load_state_dict(saved)
    assert identical(again.state_dict(), saved)


def test_a_checkpoint_of_torch_s_adamw_loads():
    params, twins = make_params(), make_params()
    theirs = torch.optim.AdamW(twins, lr=0.1)
    train(theirs, twins)
    ours = steepest.AdamW(params, state_device="cpu")
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["state_device"] == "cpu"
    assert ours.param_groups[0]["lr"] == 0.1
    assert float(ours.state[params[0]]["step"]) == 4
    assert identical(ours.state[params[0]]["exp_avg"], theirs.state[twins[0]]["exp_avg"])


def test_a_checkpoint_with_another_number_of_groups_is_refused():
    params = make_params()
    optimizer = steepest.AdamW(params, state_device="cpu")
    other = steepest.AdamW([{"params": [param]} for param in make_params()])
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(other.state_dict())


# -- on an accelerator


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("case", "dtype"), with_dtypes(STEPPED_ON_HOST, [torch.float32, torch.bfloat16]), ids=str
)
def test_on_a_device_the_steps_are_the_cpu_s(case: Case, dtype: torch.dtype):
    # Sums over a whole tensor are made on the device, in another order than on the CPU.
    exact = case.rule.scope == "element"
    params, twins = case.params(dtype, "cuda"), case.params(dtype)
    optimizer = case.make(params, state_device="cpu", nonfinite="skip", **OPTIONS)
    twin = case.make(twins, nonfinite="skip", **OPTIONS)
    for step in range(6):
        for some in (params, twins):
            set_gradients(twins, step)
            for param, other in zip(some, twins, strict=True):
                param.grad = other.grad.to(param.device)
        if step == 3:
            params[1].grad.fill_(math.nan)
            twins[1].grad.fill_(math.nan)
        optimizer.step()
        twin.step()
    near = [param.detach().cpu() for param in params]
    if exact:
        assert identical(near, values(twins))
    else:
        torch.testing.assert_close(near, values(twins), rtol=1e-2, atol=1e-2)
    assert optimizer.skipped_steps == twin.skipped_steps == 1
    assert all(value.device.type == "cpu" for state in optimizer.state.values() for value in state.values())


@pytest.mark.gpu
@pytest.mark.parametrize("released", [False, True])
def test_the_device_holds_parameters_and_gradients_alone(released: bool):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(8))).cuda()
    twin = copy.deepcopy(model).cpu()
    optimizer = steepest.AdamW(model.parameters(), state_device="cpu", lr=torch.tensor(0.1, device="cuda"))
    other = steepest.AdamW(twin.parameters(), lr=0.1)
    if released:
        steepest.release_gradients(holder(list(model.parameters())), optimizer)
    weights = sum(param.numel() * param.element_size() for param in model.parameters())
    before = torch.cuda.memory_allocated()
    for step in range(3):
        for param, near in zip(model.parameters(), twin.parameters(), strict=True):
            near.grad = torch.sin(near.detach() * (step + 1))
            grad = near.grad.cuda()
            (param * grad).sum().backward()
            del grad
        optimizer.step()
        other.step()
        assert torch.cuda.memory_allocated() <= before + (0 if released else weights) + (1 << 16)
    assert identical([p.detach().cpu() for p in model.parameters()], list(twin.parameters()))
