"""Checkpoints: what they hold, what loads, which dtype comes back, whose memory it is."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from loops import for_each

from .cases import CASES, RULES, Case, able, by_id, spread
from .training import identical, set_gradients, snapshot, steps, train

OPTIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16, rounded stochastically": {"rounding": "stochastic"},
    "bfloat16, float32 state": {"state_dtype": torch.float32},
    "float32, bfloat16 state": {"state_dtype": torch.bfloat16},
    "float16, float64 state": {"state_dtype": torch.float64},
    "complex64": {},
}

CASES_AND_OPTIONS = [
    *spread(CASES, [kind for kind in OPTIONS if kind != "complex64"]),
    *spread(able(CASES, "complex"), ["complex64"]),
]


def _trained(case: Case, kind: str) -> tuple[Any, list[Tensor]]:
    params = case.params(getattr(torch, kind.split(",")[0]))
    optimizer = case.make(params, **OPTIONS[kind])
    train(optimizer, params, 3)
    return optimizer, params


_KEPT: dict[tuple[str, str], tuple[Any, list[Tensor]]] = {}


def _kept(case: Case, kind: str) -> tuple[Any, list[Tensor]]:
    """One trained optimizer for all tests that only read it."""
    key = (str(case), kind)
    if key not in _KEPT:
        _KEPT[key] = _trained(case, kind)
    return _KEPT[key]


def _through_a_file(tree: Any) -> Any:
    file = io.BytesIO()
    torch.save(tree, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _tensors(value)


@for_each(("case", "kind"), CASES_AND_OPTIONS)
def test_it_has_exactly_state_and_param_groups_of_plain_values(case: Case, kind: str):
    optimizer, params = _kept(case, kind)
    saved = optimizer.state_dict()
    assert set(saved) == {"state", "param_groups"}
    assert set(saved["state"]) <= set(range(len(params)))
    for state in saved["state"].values():
        for name, value in state.items():
            assert isinstance(name, str)
            assert isinstance(value, (Tensor, int, float)), name
    for group in saved["param_groups"]:
        for name, value in group.items():
            plain = (str, int, float, bool, type(None), torch.dtype, tuple, list)
            assert isinstance(value, plain), (name, type(value))


@for_each(("case", "kind"), CASES_AND_OPTIONS)
def test_it_loads_with_weights_only_and_every_bit_comes_back(case: Case, kind: str):
    """``load_state_dict`` keeps every dtype: integer counters, and state wider or narrower than p."""
    optimizer, params = _kept(case, kind)
    saved = _through_a_file(optimizer.state_dict())
    assert identical(saved, optimizer.state_dict())
    again = case.make(params, **OPTIONS[kind])
    again.load_state_dict(saved)
    assert identical(again.state_dict(), optimizer.state_dict())


@for_each("case", CASES)
def test_the_saved_dtype_wins_over_the_new_optimizer_s_own(case: Case):
    optimizer, params = _trained(case, "float32, bfloat16 state")
    again = case.make(params)
    again.load_state_dict(optimizer.state_dict())
    assert identical(again.state_dict(), optimizer.state_dict())
    train(again, params, 2)
    dtypes = {
        value.dtype
        for param, state in again.state.items()
        for name, value in state.items()
        if value.dim() and value.is_floating_point() and name not in case.factors(again, param)
    }
    assert dtypes <= {torch.bfloat16}


@for_each(("case", "trained"), spread(CASES, [False, True]))
def test_nothing_is_shared_with_the_dict(case: Case, trained: bool):
    params = case.params()
    optimizer = case.make(params, lr=torch.tensor(0.03125))
    train(optimizer, params, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    others = case.params()
    again = case.make(others, lr=torch.tensor(0.03125))
    if trained:
        train(again, others, 2)
    again.load_state_dict(saved)
    theirs = {t.untyped_storage().data_ptr() for t in _tensors(saved) if t.numel()}
    ours = {t.untyped_storage().data_ptr() for t in _tensors(again.state_dict()) if t.numel()}
    assert not ours & theirs
    train(again, others, 2)
    again.param_groups[0]["lr"].mul_(2)
    assert identical(saved, kept), "steps after loading must not write into the dict"
    before = copy.deepcopy(again.state_dict())
    for tensor in _tensors(saved):
        tensor.zero_()
    assert identical(again.state_dict(), before), "and the dict's later fate is not the optimizer's"


@for_each("case", CASES)
def test_a_fresh_optimizer_s_dict_round_trips(case: Case):
    params, twins = case.params(), case.params()
    optimizer, again = case.make(params), case.make(twins)
    assert not optimizer.state_dict()["state"]
    again.load_state_dict(_through_a_file(optimizer.state_dict()))
    assert identical(train(optimizer, params), train(again, twins))


@for_each("case", CASES)
def test_loading_forgets_what_was_there(case: Case):
    """Also state of parameters for which the dict has none."""
    params, twins = case.params(), case.params()
    optimizer, early = case.make(params), case.make(twins)
    fresh = copy.deepcopy(early.state_dict())
    steps(early, twins, range(20, 23))
    early.load_state_dict(fresh)
    with torch.no_grad():
        for param, twin in zip(params, twins, strict=True):
            twin.copy_(param)
    assert identical(train(optimizer, params), train(early, twins))


@for_each("case", CASES)
def test_a_checkpoint_of_one_frozen_parameter_resumes(case: Case):
    def run(optimizer: Any, params: list[Tensor], which: range) -> None:
        for step in which:
            for index, param in enumerate(params):
                shape = param.shape
                noise = torch.randn(shape, generator=torch.Generator().manual_seed(10 * step + index))
                param.grad = None if index == 1 and step < 3 else noise
            optimizer.step()

    params, twins = case.params(), case.params()
    optimizer, twin = case.make(params), case.make(twins)
    run(optimizer, params, range(2))
    again = case.make(params)
    again.load_state_dict(_through_a_file(optimizer.state_dict()))
    run(again, params, range(2, 5))
    run(twin, twins, range(5))
    assert identical(params, twins)


@for_each("case", CASES)
def test_hyper_parameters_come_from_the_dict_too(case: Case):
    params, twins = case.params(), case.params()
    options = {"lr": 0.25, "weight_decay": 0.125, "maximize": True, "seed": 3, "nonfinite": "skip"}
    optimizer, twin = case.make(params, **options), case.make(twins, **options)
    steps(optimizer, params, range(2))
    steps(twin, twins, range(4))
    again = case.make(params, lr=7.0, weight_decay=0.0)
    again.load_state_dict(optimizer.state_dict())
    steps(again, params, range(2, 4))
    assert identical(params, twins)


@pytest.mark.parametrize("case", RULES, ids=by_id)
def test_an_older_checkpoint_that_lacks_options_keeps_what_the_optimizer_has(case: Case):
    params, twins = case.params(), case.params()
    options = {"weight_decay": 0.125, "maximize": True}
    optimizer, twin = case.make(params, **options), case.make(twins, **options)
    steps(optimizer, params, range(2))
    steps(twin, twins, range(4))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"] = [{"params": group["params"]} for group in saved["param_groups"]]
    again = case.make(params, **options)
    again.load_state_dict(saved)
    steps(again, params, range(2, 4))
    assert identical(params, twins)


@for_each("case", CASES)
def test_extra_keys_of_a_checkpoint_s_groups_are_kept(case: Case):
    optimizer, params = _kept(case, "float32")
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["initial_lr"] = 9.0
    again = case.make(params)
    again.load_state_dict(saved)
    assert again.param_groups[0]["initial_lr"] == 9.0


@for_each("rule", RULES)
def test_names_in_a_checkpoint_do_not_affect_loading(rule: Case):
    params = rule.params()
    named = rule.make([(f"p{i}", p) for i, p in enumerate(params)])
    train(named, params, 2)
    nameless = rule.make(params)
    train(nameless, params, 1)
    named.load_state_dict(nameless.state_dict())
    assert named.param_groups[0]["param_names"] == ["p0", "p1", "p2"]
    assert identical(named.state_dict()["state"], nameless.state_dict()["state"])


@pytest.mark.parametrize("case", CASES, ids=by_id)
def test_state_tensors_lie_where_they_should(case: Case, device: torch.device):
    """Elementwise state with its parameter; one number per tensor on the CPU."""
    params = case.params(device=device)
    optimizer = case.make(params)
    train(optimizer, params, 2)
    saved = torch.utils._pytree.tree_map_only(Tensor, Tensor.cpu, optimizer.state_dict())
    optimizer.load_state_dict(saved)
    for param in params:
        for name, value in optimizer.state[param].items():
            single = name in case.tensor_state | {"step"}
            assert value.device.type == ("cpu" if single else device.type), name
            if name not in case.factors(optimizer, param):
                assert value.shape == (() if single else param.shape), name


@for_each("case", CASES)
def test_state_bytes_counts_what_the_checkpoint_holds(case: Case):
    optimizer, _ = _kept(case, "float32")
    held = sum(t.numel() * t.element_size() for t in _tensors(optimizer.state_dict()["state"]))
    assert optimizer.state_bytes() == held


@for_each("case", CASES)
def test_saving_changes_nothing(case: Case):
    optimizer, params = _trained(case, "float32")
    before = snapshot(optimizer, params)
    optimizer.state_dict()
    optimizer.load_state_dict(optimizer.state_dict())
    assert identical(snapshot(optimizer, params), before)


@for_each("kind", [int, float])
@for_each("case", CASES)
def test_plain_numbers_for_per_tensor_state(case: Case, kind: type):
    """As in checkpoints of old; the numbers become tensors again."""
    params, twins = case.params(), case.params()
    optimizer, twin = case.make(params), case.make(twins)
    steps(optimizer, params, range(3))
    steps(twin, twins, range(5))
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        for name in case.tensor_state | {"step"}:
            if name in state and float(state[name]) == kind(state[name]):
                state[name] = kind(state[name])
    again = case.make(params)
    again.load_state_dict(saved)
    assert identical(again.state_dict()["state"], optimizer.state_dict()["state"])
    steps(again, params, range(3, 5))
    assert identical(params, twins)


@pytest.mark.parametrize("case", CASES, ids=by_id)
def test_a_default_device_and_dtype_change_nothing(case: Case):
    """A default device is for new tensors of the user's; "meta" makes every slip an error."""
    options = {"nonfinite": "skip", "rounding": "stochastic"}
    params, twins = case.params(torch.bfloat16), case.params(torch.bfloat16)
    optimizer, twin = case.make(params, **options), case.make(twins, **options)
    steps(twin, twins, range(3))
    before = torch.get_default_dtype()
    try:
        for step, (dtype, device) in enumerate(
            [(torch.float64, "meta"), (torch.float16, "meta"), (before, "cpu")]
        ):
            set_gradients(params, step)
            torch.set_default_dtype(dtype)
            with torch.device(device):
                optimizer.step()
                optimizer.load_state_dict(optimizer.state_dict())
    finally:
        torch.set_default_dtype(before)
    assert identical(params, twins)
    assert identical(optimizer.state_dict()["state"], twin.state_dict()["state"])


@for_each("rule", RULES)
def test_state_of_a_replaced_parameter_is_left_out(rule: Case):
    """torch's own state_dict raises a KeyError with its id."""
    params = rule.params()
    optimizer = rule.make(params)
    train(optimizer, params, 2)
    old, group = params[0], optimizer.param_groups[0]
    params[0] = group["params"][0] = torch.nn.Parameter(old.detach().clone())
    stateful = bool(optimizer.state)
    saved = optimizer.state_dict()
    assert set(saved["state"]) == ({1, 2} if stateful else set())
    assert (old in optimizer.state) == stateful
