"""Numbers and sequences that configuration libraries hand over, and what must not slip through."""

from __future__ import annotations

import collections
import io
import warnings

import numpy as np
import pytest
import torch

import steepest
from steepest.compile import cache


def weight(*shape):
    return torch.nn.Parameter(torch.ones(shape or (3,)))


@pytest.mark.parametrize("number", [np.float32, np.float64])
@pytest.mark.parametrize("sequence", [list, tuple, collections.UserList])
def test_numpys_numbers_and_list_likes_become_pythons(number, sequence):
    """numpy's float64 is a subclass of float, and yet a checkpoint with one does not load without trust."""
    optimizer = steepest.Lion([weight()], lr=number(0.5), betas=sequence([number(0.5), number(0.25)]))
    (group,) = optimizer.param_groups
    assert (type(group["lr"]), group["lr"]) == (float, 0.5)
    assert tuple(group["betas"]) == (0.5, 0.25)
    assert [type(beta) for beta in group["betas"]] == [float, float]
    simba = steepest.Simba([{"params": [weight()], "window_size": np.int64(10)}])
    assert type(simba.param_groups[0]["window_size"]) is int
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), simba.state_dict()], file)
    file.seek(0)
    torch.load(file, weights_only=True)


@pytest.mark.parametrize("number", [np.float32, np.float64, np.array])
def test_numpys_numbers_become_pythons_wherever_a_group_gets_them(number):
    """In dicts, groups that are added, build's arguments, and what is assigned, before a step and after."""
    half = number(0.5)
    optimizer = steepest.Lion([{"params": [weight()], "lr": half, "weight_decay": half, "initial_lr": half}])
    optimizer.add_param_group({"params": [weight()], "lr": half, "betas": np.array([0.5, 0.25])})
    built = steepest.build(
        torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)),
        "muon",
        lr=half,
        weight_decay=half,
        fallback={"rule": "adamw", "lr": half, "betas": (half, half)},
        overrides={"0.weight": {"lr": half, "weight_decay": half}},
    )
    for each in (optimizer, built):
        _saves_plain_numbers(each)
        for group in each.param_groups:
            group["lr"], group["weight_decay"] = half, half
            if "betas" in group:
                group["betas"] = [half, *group["betas"][1:]]
        _saves_plain_numbers(each)
        for group in each.param_groups:
            for param in group["params"]:
                param.grad = torch.ones_like(param)
        each.step()
        assert {type(group["lr"]) for group in each.param_groups} == {float}
        _saves_plain_numbers(each)


def _saves_plain_numbers(optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))


def test_numpys_strings_flags_and_sizes_become_pythons():
    """As a sweep over choices draws them."""
    matrix = weight(4, 4)
    two = np.int64(2)
    optimizer = steepest.create(
        np.str_("muon"),
        [("w", matrix)],
        coefficients=np.str_("jordan"),
        rounding=np.str_("stochastic"),
        nesterov=np.bool_(False),
        views={np.str_("w"): ("rows", (two, two))},
    )
    (group,) = optimizer.param_groups
    assert {type(group[name]) for name in ("rule", "coefficients", "rounding")} == {str}
    assert group["nesterov"] is False
    assert [*map(type, group["views"]), *map(type, group["views"]["w"][1])] == [str, int, int]
    _saves_plain_numbers(optimizer)
    group["nonfinite"], group["maximize"] = np.str_("skip"), np.bool_(True)
    matrix.grad = torch.eye(4)
    optimizer.step()
    _saves_plain_numbers(optimizer)
    saved = optimizer.state_dict()
    saved["param_groups"][0].update(nonfinite=np.str_("raise"), maximize=np.bool_(False), lr=np.float64(0.5))
    optimizer.load_state_dict(saved)
    (group,) = optimizer.param_groups
    assert [type(group[name]) for name in ("nonfinite", "maximize", "lr")] == [str, bool, float]


def test_a_scheduler_of_numpys_numbers():
    optimizer = steepest.Muon([weight(3, 3)], lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: np.float64(0.5) ** step)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.25
    _saves_plain_numbers(optimizer)


@pytest.mark.parametrize("flag", ["fused", "foreach", "differentiable"])
def test_torchs_flags_are_pointed_to_compile(flag):
    with pytest.raises(TypeError, match=f"'{flag}'.*compile"):
        steepest.AdamW([weight()], **{flag: True})


def test_a_leaky_group_must_name_its_rule():
    with pytest.raises(ValueError, match="simba_leaky"):
        steepest.Simba([{"params": [weight()], "leak": 0.1}])
    both = steepest.Simba(
        [{"params": [weight()]}, {"params": [weight()], "rule": "simba_leaky", "leak": 0.1}]
    )
    assert both.param_groups[1]["leak"] == 0.1


def test_an_expanded_parameter_is_refused_by_name():
    expanded = torch.nn.Parameter(torch.ones(1).expand(4))
    with pytest.raises(ValueError, match="'wide' is expanded"):
        steepest.Lion([("wide", expanded)])


@pytest.mark.parametrize("gradient", [1e-3, 1e-15, 1e-18])
def test_adamw_without_eps_moves_by_lr_whatever_the_gradients_size(gradient):
    param = weight()
    optimizer = steepest.AdamW([param], lr=0.25, eps=0.0, weight_decay=0.0)
    param.grad = torch.full((3,), gradient)
    optimizer.step()
    torch.testing.assert_close(param.detach(), torch.full((3,), 0.75), rtol=1e-4, atol=0)


def test_adamw_without_eps_never_moves_further_than_lr_in_its_first_step():
    param = weight()
    optimizer = steepest.AdamW([param], lr=0.25, eps=0.0, weight_decay=0.0)
    param.grad = torch.tensor([1e-20, 1e-22, 1e-40])
    optimizer.step()
    assert ((param - 1).abs() <= 0.25).all()


def test_where_nothing_can_be_compiled_it_runs_eagerly_with_one_warning(monkeypatch):
    """A compiler that is there and does not work."""
    from torch._inductor import config
    from torch._inductor.utils import fresh_cache

    monkeypatch.setattr(cache, "_made", {})
    monkeypatch.setattr(cache, "_broken", set())
    param = weight(4)
    optimizer = steepest.Lion([param], lr=0.5, compile=True)
    param.grad = torch.ones(4)
    with warnings.catch_warnings(record=True) as seen, fresh_cache():
        warnings.simplefilter("always")
        with config.patch({"cpp.cxx": (None, "/bin/false")}):
            optimizer.step()
            optimizer.step()
    assert param.tolist() == [0.0] * 4
    ours = [str(each.message) for each in seen if "without compilation" in str(each.message)]
    assert len(ours) == 1, ours


def test_a_shard_that_replaces_a_parameter_is_refused_by_name(tmp_path):
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.tensor import DTensor, Partial, init_device_mesh

    param = weight(4)
    optimizer = steepest.SGDSaI([("w", param)])
    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        partial = DTensor.from_local(torch.ones(4), init_device_mesh("cpu", (1,)), [Partial()])
        shard = torch.nn.Parameter(partial)
        shard.grad = partial
        optimizer.param_groups[0]["params"][0] = shard
        with pytest.raises(ValueError, match=r"'w' is a DTensor that has the placement P\(sum\)"):
            optimizer.step()
        assert not optimizer.state
    finally:
        destroy_process_group()


def test_a_conjugate_view_is_refused():
    """Its numbers are made where it is read: what is written over them is lost."""
    turned = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64).conj())
    with pytest.raises(ValueError, match=r"'turned' is a conjugate view.*resolve_conj"):
        steepest.SignGSD([("turned", turned)])
