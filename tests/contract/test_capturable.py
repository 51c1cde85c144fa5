"""``capturable=True``: the same steps with nothing that a CUDA graph would hold fast or could not hold.

The graph is played on the CPU: a step's operations are recorded and done again.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import steepest
from pages import run_python
from steepest.compile import cache
from steepest.compile.available import compiler_available
from steepest.engine import collect, compiled, cuda_graphs, grad_check
from steepest.engine.collect import Collector, ParamBatch
from steepest.engine.grad_check import all_finite
from steepest.engine.step_count import add_step
from steepest.engine.storage import storage_of
from steepest.engine.update import UpdateConfig
from steepest.group_options import count_skipped
from steepest.rule import find_rule

from .cases import CASES, LOW_BIT, RULES, Case, able, by_id, one_of_each, related, spread
from .recording import Apart, Recorded, configure, record_compiled
from .training import gradient, identical, make_params, set_gradients, snapshot, steps, values

# By then every variant has measured what it measures.
WARM = 5
RATES = [0.03, 0.0625, 0.01, 0.2]
DAMPED = Case("sgd", {"momentum": 0.9, "dampening": 0.1})
QUIET = able(CASES, "quiet steps")
# What waits for no device, with its options either.
GRAPHS = [case for case in QUIET if case.rule.host_sync(case.make(case.params()).param_groups[0]) is None]
needs_compiler = pytest.mark.skipif(
    not compiler_available("cpu"), reason="torch.compile needs a C++ compiler"
)


def at_home(case: Case, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """State of single numbers, which lives on the host."""
    return [state[name] for state in optimizer.state.values() for name in case.tensor_state]


def refill(params: list[Parameter], step: int) -> None:
    """Give the gradients, in the memory that they have, this step's values."""
    for index, param in enumerate(params):
        param.grad.copy_(gradient(param, index, step))


def check_replays(case: Case, dtype: torch.dtype, recorders: list[Recorded] | None = None, **options: Any):
    params, twins = case.params(dtype), case.params(dtype)
    lr = torch.tensor(0.05)
    options = {"weight_decay": 0.125, "rounding": "stochastic", **options}
    optimizer = case.make(params, **{"lr": lr, "capturable": True, **options})
    # Eager, whose bits compiled steps have (test_compiled.py): to compile them too would take twice as long.
    twin = case.make(twins, **{"lr": float(lr), **options, "compile": False})
    for some, some_params in ((optimizer, params), (twin, twins)):
        steps(some, some_params, range(WARM))
    refill(params, WARM)
    graph = Recorded(at_home(case, optimizer))
    if recorders is not None:
        recorders.append(graph)
    with graph:
        optimizer.step()
    if recorders is not None:
        recorders.clear()
    steps(twin, twins, [WARM])
    for step, rate in enumerate(RATES, WARM + 1):
        lr.fill_(rate)
        refill(params, step)
        graph.replay()
        for group in twin.param_groups:
            group["lr"] = float(lr)
        steps(twin, twins, [step])
        assert identical(values(params), values(twins)), f"replay {step - WARM}"
    assert identical(optimizer.state_dict()["state"], twin.state_dict()["state"])


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*spread([*CASES, DAMPED], [torch.float32, torch.bfloat16, torch.complex64]), *LOW_BIT],
    ids=str,
)
def test_the_steps_are_the_ordinary_ones(case: Case, dtype: torch.dtype):
    params, twins = case.params(dtype), case.params(dtype)
    options = {"weight_decay": 0.125, "rounding": "stochastic", "compile": False}
    optimizer, twin = case.make(params, capturable=True, **options), case.make(twins, **options)
    for some, some_params in ((optimizer, params), (twin, twins)):
        steps(some, some_params, range(6))
    assert identical(params, twins)
    assert identical(optimizer.state_dict()["state"], twin.state_dict()["state"])


@pytest.mark.parametrize("case", [case for case in CASES if not related(case)], ids=by_id)
def test_parameters_of_unlike_counts_and_places_take_their_own_steps(case: Case):
    """Some have no gradient in some steps, and others stand before them."""
    shapes = [case.shape(shape) for shape in ((4, 3), (4, 3), (2,), (4, 3), (5,), (2,))]
    params, twins = (case.params(torch.bfloat16, shapes=shapes) for _ in range(2))
    options = {"rounding": "stochastic", "compile": False, "bucket_bytes": 1, "seed": 7}
    known = case.rule.defaults()
    options = {name: value for name, value in options.items() if name in known}
    made = [
        case.make([{"params": some[:1]}, {"params": some[1:]}], **options, **more)
        for some, more in ((params, {"capturable": True}), (twins, {}))
    ]
    for optimizer, some in zip(made, (params, twins), strict=True):
        for step in range(6):
            set_gradients(some, step)
            for index in ((), (2,), (0, 3), (1,), (0, 4), ())[step]:
                some[index].grad = None
            optimizer.step()
    assert identical(params, twins)
    assert identical(made[0].state_dict()["state"], made[1].state_dict()["state"])


@pytest.mark.parametrize("name", ["adamw", "muon", "quad"])
def test_a_learning_rate_of_one_element_is_a_number(name: str):
    case = Case(name)
    params, twins = case.params(), case.params()
    lr = torch.tensor([0.05])
    steps(case.make(params, lr=lr, capturable=True, compile=False), params, range(3))
    steps(case.make(twins, lr=float(lr), compile=False), twins, range(3))
    assert identical(params, twins)


def test_a_rule_s_number_may_be_a_tensor_that_does_not_follow_from_the_step(
    monkeypatch: pytest.MonkeyPatch,
):
    own = type(find_rule("adamw")).scalars

    def scalars(rule: Any, step: Any, **hyper: Any) -> dict[str, Any]:
        return own(rule, step, **hyper) | {"correction1": torch.tensor(2.0, dtype=torch.float64)}

    monkeypatch.setattr(type(find_rule("adamw")), "scalars", scalars)
    params, twins = make_params(), make_params()
    steps(steepest.AdamW(params, capturable=True), params, range(3))
    steps(steepest.AdamW(twins), twins, range(3))
    assert identical(params, twins)


@pytest.mark.parametrize("name", ["quad", "procrustes"])
def test_a_stack_s_numbers_round_as_one_number_does(name: str):
    case = Case(name)
    params, twins = (make_params(shapes=[(4, 3)] * 3) for _ in range(2))
    steps(case.make(params, capturable=True), params, range(6))
    steps(case.make(twins), twins, range(6))
    assert identical(params, twins)


@pytest.mark.parametrize("name", ["quad", "procrustes"])
def test_matrices_of_unlike_counts_are_stacked_with_numbers_of_their_own(name: str):
    """Fitted in some steps and balanced in some, which are not the same for all."""
    case = Case(name, {"update_probability": 0.5, "update_flat_steps": 1, "update_decay_steps": 0})
    params, twins = (make_params(shapes=[(4, 3)] * 3) for _ in range(2))
    optimizer, twin = case.make(params, capturable=True), case.make(twins)
    for some, some_params in ((optimizer, params), (twin, twins)):
        for step in range(6):
            set_gradients(some_params, step)
            if step in (1, 4):
                some_params[step % 3].grad = None
            if step == 3:
                some.state[some_params[2]]["step"].fill_(98)
            some.step()
    torch.testing.assert_close(params, twins, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("device", "options", "there"),
    [
        ("cuda", {}, False),
        ("cuda", {"nonfinite": "skip"}, True),
        ("cpu", {"nonfinite": "skip"}, False),
        ("cpu", {"capturable": True}, True),
    ],
)
def test_counts_are_the_device_s_where_it_alone_knows_them(
    device: str, options: dict[str, Any], there: bool, monkeypatch: pytest.MonkeyPatch
):
    params = make_params()
    optimizer = steepest.AdamW(params, **options)
    set_gradients(params, 0)
    group, weight = optimizer.param_groups[0], torch.float32
    rule, storage = find_rule("adamw"), storage_of(find_rule("adamw"), group, params[0], None, {})
    config = UpdateConfig(rule, group, weight, weight, torch.device(device), storage)
    assert config.counts_on_device is there


@pytest.mark.parametrize(
    ("case", "dtype"), [*spread([*QUIET, DAMPED], [torch.float32, torch.bfloat16]), *LOW_BIT], ids=str
)
def test_a_replay_is_the_next_step(case: Case, dtype: torch.dtype):
    check_replays(case, dtype, compile=False)


@needs_compiler
@pytest.mark.parametrize("case", one_of_each(able(RULES, "compile", "quiet steps")), ids=by_id)
def test_a_replay_of_compiled_code_is_the_next_step(case: Case, monkeypatch: pytest.MonkeyPatch):
    check_replays(case, torch.float32, record_compiled(monkeypatch), compile=True)


@needs_compiler
@pytest.mark.parametrize(("name", "dtype"), [("lion", torch.bfloat16), ("simba_leaky", torch.float32)])
def test_a_replay_of_compiled_code_draws_the_next_step_s_noise(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    """Lion's noise rounds, Simba-leaky's is its own; int16 counters beside bfloat16 are not compiled."""
    recorders = record_compiled(monkeypatch)
    check_replays(Case(name), dtype, recorders, state_dtype=torch.float32, compile=True)


def on_meta(case: Case, monkeypatch: pytest.MonkeyPatch, **options: Any) -> steepest.Optimizer:
    """An optimizer of parameters on a device that is not the host and of which no number can be read."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    monkeypatch.setattr(collect, "check_materialized", lambda groups: None)
    params = case.params(torch.bfloat16, device="meta")
    options = {"weight_decay": 0.125, "rounding": "stochastic", "nonfinite": "skip", **options}
    if case.name == "hyperball":
        options["radius"] = 2.0  # else it is read off the weights
    optimizer = case.make(params, compile=False, **options)
    for group in optimizer.param_groups:
        group["lr"] = torch.empty((), device="meta")
    for param in params:
        param.grad = torch.empty_like(param)
        group = optimizer.param_groups[0]
        specs = case.rule.state_specs(group)
        optimizer.state[param].update({name: spec.make(param) for name, spec in specs.items()})
        for name in case.tensor_state:
            optimizer.state[param][name].fill_(WARM)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("case", QUIET, ids=by_id)
def test_a_warm_step_hands_nothing_from_the_host_to_the_device(case: Case, monkeypatch: pytest.MonkeyPatch):
    optimizer = on_meta(case, monkeypatch, capturable=True)
    with Apart():
        optimizer.step()


def test_numbers_for_compiled_code_are_made_on_the_device():
    with Apart():
        there = torch.empty((), dtype=torch.float64, device="meta")
        packed = compiled._pack([[0.5, there], [0.5, 2.0]], torch.float64, there.device, True)
    assert packed.shape == (2, 2)
    assert packed.device.type == "meta"
    numbers = compiled._pack([[0.5, 3], [0.5, 2.0]], torch.float64, torch.device("cpu"), True)
    assert identical(numbers, torch.tensor([[0.5, 3.0], [0.5, 2.0]], dtype=torch.float64))


def test_a_learning_rate_of_the_host_s_would_be_seen(monkeypatch: pytest.MonkeyPatch):
    optimizer = on_meta(Case("adamw"), monkeypatch, capturable=True)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
    with Apart(), pytest.raises(AssertionError, match=r"meet: aten\._to_copy"):
        optimizer.step()


@pytest.mark.parametrize("name", ["quad", "procrustes"])
def test_matrices_of_unlike_counts_are_one_stack(name: str, monkeypatch: pytest.MonkeyPatch):
    """Counts that only a device knows cannot be compared, and each matrix has its own numbers."""
    stacks: list[int] = []
    rule = type(find_rule(name))
    transform = rule.transform

    def counted(self: Any, u: Tensor, **more: Any) -> Any:
        stacks.append(len(u))
        return transform(self, u, **more)

    options = {"update_probability": 0.5, "update_flat_steps": 2, "update_decay_steps": 0}
    params, twins = make_params(shapes=[(4, 3)] * 3), make_params(shapes=[(4, 3)] * 3)
    case = Case(name, options)
    optimizer, twin = case.make(params, capturable=True), case.make(twins)
    for some, some_params in ((optimizer, params), (twin, twins)):
        steps(some, some_params[:1], range(3))
        if some is optimizer:
            monkeypatch.setattr(rule, "transform", counted)
        steps(some, some_params, range(3, 6))
        monkeypatch.setattr(rule, "transform", transform)
    assert stacks == [3] * 3
    torch.testing.assert_close(values(params), values(twins), rtol=1e-5, atol=1e-6)


def test_the_recorder_would_see_numbers_that_stay():
    """Without the option a replay repeats the step count, or the recording fails."""
    with pytest.raises(AssertionError, match="the host"):
        check_replays(Case("adamw"), torch.float32, compile=False, capturable=False)


@pytest.mark.parametrize("case", QUIET, ids=by_id)
def test_replays_skip_gradients_that_are_not_finite_and_count(case: Case, monkeypatch: pytest.MonkeyPatch):
    def on_device(batches: list[ParamBatch]) -> bool | Tensor:
        return all_finite([member.grad for batch in batches for member in batch.members])

    monkeypatch.setattr(grad_check, "check_gradients", on_device)
    params, twins = case.params(), case.params()
    optimizer = case.make(params, nonfinite="skip", capturable=True, compile=False)
    twin = case.make(twins, compile=False)
    for some, some_params in ((optimizer, params), (twin, twins)):
        steps(some, some_params, range(WARM))
    refill(params, WARM)
    with Recorded(at_home(case, optimizer)) as graph:
        optimizer.step()
    steps(twin, twins, [WARM])
    for step in range(WARM + 1, WARM + 5):
        refill(params, 90)
        params[step % len(params)].grad.view(-1)[0] = torch.nan
        before = values(params)
        graph.replay()
        assert identical(values(params), before)
        refill(params, step)
        graph.replay()
        steps(twin, twins, [step])
    assert identical(params, twins)
    assert identical(optimizer.state_dict()["state"], twin.state_dict()["state"])
    assert optimizer.skipped_steps == 4


def test_a_count_that_a_checkpoint_brought_to_the_host_goes_to_the_device():
    optimizer = steepest.SignGSD(make_params(), capturable=True)
    optimizer.param_groups[0]["skipped_steps"] = torch.tensor(3)
    count_skipped(optimizer.param_groups, torch.tensor(False, device="meta"))
    there = optimizer.param_groups[0]["skipped_steps"]
    assert there.device.type == "meta"
    count_skipped(optimizer.param_groups, torch.tensor(False, device="meta"))
    assert optimizer.param_groups[0]["skipped_steps"] is there


def test_counts_that_an_option_left_on_several_devices_are_added_to():
    """What was stepped while they were the device's has its count there; the others' are the host's."""
    params = make_params()
    optimizer = steepest.AdamW(params)
    steps(optimizer, params, range(2))
    (batch,) = Collector().batches_of("a test", optimizer.param_groups, optimizer.state)
    first, *others = (optimizer.state[param] for param in params)
    first["step"] = first["step"].to("meta")
    add_step(batch, torch.tensor(True))
    assert first["step"].device.type == "meta"
    assert [float(state["step"]) for state in others] == [3.0, 3.0]


def test_all_groups_count_in_the_same_memory():
    params = make_params()
    optimizer = steepest.SignGSD([{"params": params[:1]}, {"params": params[1:], "capturable": True}])
    count_skipped(optimizer.param_groups, torch.tensor(False))
    counts = [group["skipped_steps"] for group in optimizer.param_groups]
    count_skipped(optimizer.param_groups, torch.tensor(False))
    now = [group["skipped_steps"] for group in optimizer.param_groups]
    assert all(count is before for count, before in zip(now, counts, strict=True))
    assert optimizer.skipped_steps == 2


def test_the_option_is_a_group_s_and_survives_a_checkpoint():
    params = make_params()
    optimizer = steepest.AdamW([{"params": params[:2], "capturable": True}, {"params": params[2:]}])
    steps(optimizer, params, range(3))
    again = steepest.AdamW([{"params": params[:2]}, {"params": params[2:]}])
    again.load_state_dict(optimizer.state_dict())
    assert [group["capturable"] for group in again.param_groups] == [True, False]
    with pytest.raises(ValueError, match="capturable"):
        steepest.AdamW(params, capturable=1)


@pytest.fixture
def in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a CUDA graph were being captured, and parameters were there."""
    monkeypatch.setattr(
        cuda_graphs, "capturing", lambda device=None: device in (None, torch.device("cuda", 0))
    )
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    configure(monkeypatch, device=lambda group: torch.device("cuda", 0))


@pytest.mark.usefixtures("in_a_graph")
@pytest.mark.parametrize(
    ("case", "option"),
    [(Case("muon", {"method": "svd"}), "method='svd'"), (Case("quad", {"norm": "exact"}), "norm='exact'")],
    ids=str,
)
def test_an_option_that_waits_for_the_device_is_refused(case: Case, option: str):
    params = case.params()
    optimizer = case.make(params, capturable=True)
    set_gradients(params, 0)
    with pytest.raises(RuntimeError, match=f"{option} waits for the device"):
        optimizer.step()


@pytest.mark.usefixtures("in_a_graph")
@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "parameter 'weight' does not have capturable=True"),
        ({"capturable": True, "nonfinite": "raise"}, "waits for the device"),
        ({"capturable": True, "lr": torch.tensor(0.1)}, "lr is a tensor on the CPU"),
        ({"capturable": True}, "parameter 'weight' has not been stepped yet"),
    ],
    ids=str,
)
def test_what_a_graph_would_not_repeat_is_refused(options: dict[str, Any], why: str):
    weight = Parameter(torch.ones(3))
    optimizer = steepest.AdamW([("weight", weight)], **options)
    set_gradients([weight], 0)
    before = snapshot(optimizer, [weight])
    with pytest.raises(RuntimeError, match=f"{why}.*Nothing was changed"):
        optimizer.step()
    assert identical(snapshot(optimizer, [weight]), before)


@pytest.mark.usefixtures("in_a_graph")
@pytest.mark.parametrize("count", [0, torch.tensor(2)], ids=["none", "on the host"])
def test_a_count_of_skipped_steps_that_replays_could_not_add_to_is_refused(count: Any):
    """A rule without state may be captured at once, but for this."""
    weight = Parameter(torch.ones(3))
    optimizer = steepest.SignGSD([("weight", weight)], capturable=True, nonfinite="skip", compile=False)
    optimizer.param_groups[0]["skipped_steps"] = count
    set_gradients([weight], 0)
    before = snapshot(optimizer, [weight])
    with pytest.raises(
        RuntimeError, match=r"no counter of skipped steps yet; take a few steps first\. Nothing was changed"
    ):
        optimizer.step()
    assert identical(snapshot(optimizer, [weight]), before)


@pytest.mark.usefixtures("in_a_graph")
@pytest.mark.parametrize(
    ("case", "steps_before", "why"),
    [
        (Case("adamw"), 2, "has not been stepped yet"),
        (Case("sgd_sai", {"warmup_batches": 3}), 2, "is still being measured"),
        (Case("quad"), 2, "has not been stepped yet"),
    ],
    ids=str,
)
def test_state_that_is_not_ready_is_refused(
    case: Case, steps_before: int, why: str, monkeypatch: pytest.MonkeyPatch
):
    """Counts on the host, and a scale that is still measured."""
    params = case.params()
    optimizer = case.make(params, capturable=True)
    with monkeypatch.context() as outside:
        outside.setattr(cuda_graphs, "capturing", lambda device=None: False)
        configure(outside, device=lambda group: torch.device("cpu"))
        steps(optimizer, params, range(steps_before))
    optimizer._collector = Collector()
    set_gradients(params, steps_before)
    before = snapshot(optimizer, params)
    with pytest.raises(RuntimeError, match=why):
        optimizer.step()
    assert identical(snapshot(optimizer, params), before)


class _GraphDevice:
    """The CPU, taken for the GPU whose work is being captured."""

    type = "cuda"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, torch.device) and other.type == "cpu"

    __hash__ = None  # type: ignore[assignment]


def check(optimizer: steepest.Optimizer) -> None:
    batches = Collector().batches_of("a test", optimizer.param_groups, optimizer.state)
    cuda_graphs.check_capture(batches, optimizer.param_groups)


@pytest.mark.parametrize("case", GRAPHS, ids=by_id)
def test_what_has_been_stepped_may_be_captured_unless_state_is_missing(
    case: Case, monkeypatch: pytest.MonkeyPatch
):
    params = case.params(torch.bfloat16)
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    optimizer = case.make(groups, capturable=True, rounding="stochastic")
    steps(optimizer, params, range(WARM))
    monkeypatch.setattr(cuda_graphs, "capturing", lambda device=None: True)
    configure(monkeypatch, device=lambda group: _GraphDevice())
    set_gradients(params, WARM)
    check(optimizer)
    state = optimizer.state[params[-1]]
    for name in list(state):
        value = state.pop(name)
        with pytest.raises(RuntimeError, match=r"parameter 1 of group 1 .*has not been stepped yet"):
            check(optimizer)
        state[name] = value
    check(optimizer)


def test_a_device_whose_work_is_not_captured_is_refused(monkeypatch: pytest.MonkeyPatch):
    """The host, and a second GPU: what is launched there would be done once."""
    params = make_params()
    optimizer = steepest.SignGSD(params, capturable=True)
    set_gradients(params, 0)
    first = torch.device("cuda", 0)
    monkeypatch.setattr(cuda_graphs, "capturing", lambda device=None: device in (None, first))
    with pytest.raises(RuntimeError, match="is on cpu: a graph would not contain that part of the step"):
        check(optimizer)
    configure(monkeypatch, device=lambda group: torch.device("cuda", 1))
    with pytest.raises(RuntimeError, match="is on cuda:1, whose current stream is not being captured"):
        check(optimizer)
    configure(monkeypatch, device=lambda group: first)
    check(optimizer)


@pytest.mark.parametrize(("begun", "held"), [(True, True), (True, False), (False, True)])
def test_whether_a_graph_is_captured_is_asked_of_torch(
    begun: bool, held: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: begun)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: held)
    assert cuda_graphs.capturing() is (begun and held)


@needs_compiler
def test_code_is_not_compiled_within_a_graph(monkeypatch: pytest.MonkeyPatch):
    """It is tried when it is made, and that waits for the device; later it may be made."""
    params = make_params()
    optimizer = steepest.SignGSD(params, capturable=True, compile=True)
    set_gradients(params, 0)
    before = values(params)
    monkeypatch.setattr(cache, "_made", {})
    with monkeypatch.context() as graph:
        graph.setattr(cuda_graphs, "capturing", lambda: True)
        with pytest.raises(RuntimeError, match="its code is not compiled yet"):
            optimizer.step()
        assert identical(values(params), before)
    optimizer.step()
    assert len(cache._made) == 1


@pytest.mark.usefixtures("in_a_graph")
def test_ternary_weights_and_released_gradients_are_refused(monkeypatch: pytest.MonkeyPatch):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    steepest.ternary.ternarize(model, include=["0"])
    optimizer = steepest.build(model, "lion", capturable=True)
    model(torch.ones(1, 8)).sum().backward()
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
        optimizer.step()
    monkeypatch.setattr("steepest.optimizer_in_backward.capturing", lambda: True)
    plain = torch.nn.Linear(3, 1)
    start = values(plain.parameters())
    with (
        steepest.release_gradients(plain, steepest.Lion(plain.parameters(), capturable=True)),
        pytest.raises(RuntimeError, match="released gradients cannot be captured"),
    ):
        plain(torch.ones(3)).backward()
    assert identical(values(plain.parameters()), start)


def test_what_released_gradients_left_to_step_is_refused_too(monkeypatch: pytest.MonkeyPatch):
    """Backward alone, within accumulate(), may be in a graph: it steps nothing."""
    model = torch.nn.Linear(3, 1)
    optimizer = steepest.Lion(model.parameters(), capturable=True)
    with steepest.release_gradients(model, optimizer) as released:
        monkeypatch.setattr("steepest.optimizer_in_backward.capturing", lambda: True)
        with released.accumulate():
            model(torch.ones(3)).backward()
        start, grads = values(model.parameters()), [param.grad for param in model.parameters()]
        with pytest.raises(RuntimeError, match="released gradients cannot be captured"):
            optimizer.step()
        assert identical(values(model.parameters()), start)
        assert all(param.grad is grad for param, grad in zip(model.parameters(), grads, strict=True))
        monkeypatch.setattr("steepest.optimizer_in_backward.capturing", lambda: False)
        optimizer.step()
    assert not identical(values(model.parameters()), start)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("case", GRAPHS, ids=by_id)
def test_a_cuda_graph_s_replay_is_the_next_step(case: Case, compile: bool):
    params, twins = case.params(device="cuda"), case.params(device="cuda")
    lr = torch.tensor(0.05, device="cuda")
    options = case.can(compile=compile) | {"weight_decay": 0.125}
    optimizer = case.make(params, lr=lr, capturable=True, nonfinite="skip", **options)
    twin = case.make(twins, lr=float(lr), **options)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        steps(optimizer, params, range(WARM))
    torch.cuda.current_stream().wait_stream(side)
    steps(twin, twins, range(WARM))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for step, rate in enumerate(RATES, WARM):
        refill(params, 90)
        params[0].grad.view(-1)[0] = torch.nan
        graph.replay()
        lr.fill_(rate)
        refill(params, step)
        graph.replay()
        for group in twin.param_groups:
            group["lr"] = float(lr)
        steps(twin, twins, [step])
        torch.testing.assert_close(values(params), values(twins), rtol=1e-5, atol=1e-6)
    assert optimizer.skipped_steps == len(RATES)


@pytest.mark.gpu
def test_a_step_that_was_not_made_for_it_is_refused_in_a_real_graph():
    params = make_params(device="cuda")
    optimizer = steepest.AdamW(params, compile=False)
    steps(optimizer, params, range(2))
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="capturable=True"), torch.cuda.graph(graph):
        optimizer.step()


@pytest.mark.gpu
def test_the_page_s_python_runs():
    names = run_python("docs/cuda_graphs.md")
    assert all(int(state["step"]) > 10 for state in names["optimizer"].state.values())
