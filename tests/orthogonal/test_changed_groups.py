"""Test param groups that change between construction and a step; invalid groups raise before any step."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import steepest
from loops import for_each
from steepest.views import columns, rows

MATRIX_RULES = [
    name for name in steepest.list_optimizers() if steepest.rule.find_rule(name).scope == "matrix"
]
pytestmark = pytest.mark.filterwarnings("ignore:.*the momentum is used as it is")


def matrix(*shape, seed=0):
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def flatten(optimizer, group=0):
    """Flatten all parameters into one vector under the first one's name, as ZeRO does."""
    params = optimizer.param_groups[group]["params"]
    flat = torch.nn.Parameter(torch.cat([param.detach().flatten() for param in params]))
    flat.grad = torch.ones_like(flat)
    optimizer.param_groups[group]["params"] = [flat]
    return flat


@for_each("copied", [lambda o: o, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@for_each("views", [None, {"w": rows(2, 2)}, {"w": columns(3, 1)}])
@for_each("name", MATRIX_RULES)
def test_flattened_parameter_is_refused_with_the_reason(name, views, copied):
    vector = torch.nn.Parameter(torch.ones(3))
    groups = [{"params": [("v", vector)], "rule": "lion"}, {"params": [("w", matrix(4, 4))]}]
    optimizer = copied(steepest.create(name, groups, lr=0.1, views=views))
    (first,), flat = optimizer.param_groups[0]["params"], flatten(optimizer, 1)
    before = flat.detach().clone()
    first.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"'w' is a vector of shape \(16,\), .*ZeRO, FSDP1"):
        optimizer.step()
    assert torch.equal(flat, before)
    assert torch.equal(first, torch.ones(3))
    assert not optimizer.state


def test_vector_flattened_together_with_matrices_is_refused():
    optimizer = steepest.QUAD([("b", matrix(3)), ("w", matrix(4, 4))])
    flatten(optimizer)
    with pytest.raises(ValueError, match=r"'b' is a vector of shape \(19,\)"):
        optimizer.step()


def test_flattened_parameter_in_a_later_group_is_refused():
    optimizer = steepest.QUAD([("w", matrix(4, 4))])
    optimizer.add_param_group({"params": [("late", matrix(4, 2))]})
    flatten(optimizer, 1)
    with pytest.raises(ValueError, match="'late' is a vector"):
        optimizer.step()


def test_element_rules_step_flattened_parameters():
    optimizer = steepest.Lion([("w", matrix(4, 4))], lr=0.1)
    flat = flatten(optimizer)
    before = flat.detach().clone()
    optimizer.step()
    torch.testing.assert_close(flat, before - 0.1)


@for_each("mark", ["_is_flat_param", "_fsdp_flattened", "ds_id", "ds_tensor"])
@for_each("name", MATRIX_RULES)
def test_parameters_that_are_marked_as_flat_are_refused_at_construction(name, mark):
    flat = matrix(16)
    setattr(flat, mark, True)
    with pytest.raises(ValueError, match=r"'flat' is flattened or partitioned .*ZeRO, FSDP1"):
        steepest.create(name, [("flat", flat)])
    steepest.Lion([flat])


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("coefficients", "foo", "group 1: unknown coefficients 'foo'"),
        ("ns_steps", 0, "group 1: ns_steps"),
        ("scale", "large", "group 1: scale"),
        ("momentum", "much", "group 1: momentum"),
        ("views", 3, "group 1: views"),
    ],
)
@pytest.mark.parametrize("when", [0, 2])
def test_invalid_new_option_is_refused_before_any_group_moves(option, value, words, when):
    a, b = matrix(3, 3), matrix(3, 3, seed=1)
    optimizer = steepest.Muon([{"params": [("a", a)]}, {"params": [("b", b)]}])
    a.grad, b.grad = torch.ones(3, 3), torch.ones(3, 3)
    for _ in range(when):
        optimizer.step()
    kept, optimizer.param_groups[1][option] = optimizer.param_groups[1][option], value
    before = copy.deepcopy((a.detach(), b.detach(), optimizer.state_dict()["state"]))
    for _ in range(2):
        with pytest.raises(ValueError, match=words):
            optimizer.step()
    after = (a.detach(), b.detach(), optimizer.state_dict()["state"])
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    optimizer.param_groups[1][option] = kept
    optimizer.step()


def test_later_views_must_match_the_shape():
    a, b = matrix(3, 3), matrix(3, 3, seed=1)
    optimizer = steepest.Muon([{"params": [("a", a)]}, {"params": [("b", b)]}])
    a.grad, b.grad = torch.ones(3, 3), torch.ones(3, 3)
    optimizer.step()
    before = a.detach().clone()
    optimizer.param_groups[1]["views"] = {"b": rows(1, 1)}
    with pytest.raises(ValueError, match=r"'b' has shape \(3, 3\); rows\(1, 1\)"):
        optimizer.step()
    assert torch.equal(a, before)


def test_list_changed_in_place_is_checked_again():
    optimizer = steepest.Muon([weight := matrix(3, 3)], coefficients=[(1.5, -0.5, 0.0)])
    weight.grad = torch.ones(3, 3)
    optimizer.step()
    optimizer.param_groups[0]["coefficients"].append((1.0,))
    with pytest.raises(ValueError, match="coefficients"):
        optimizer.step()


def test_options_are_checked_when_they_change_and_not_in_every_step(monkeypatch):
    looks = []
    rule = type(steepest.rule.find_rule("muon"))
    check = rule.check
    monkeypatch.setattr(rule, "check", lambda *args: (looks.append(1), check(*args)))
    optimizer = steepest.Muon([weight := matrix(3, 3)])
    weight.grad = torch.ones(3, 3)
    optimizer.step()
    looks.clear()
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
        optimizer.step()
    assert not looks
    optimizer.param_groups[0]["extra_scale"] = 2.0
    optimizer.step()
    assert len(looks) == 1


def test_slightly_negative_lr_from_a_schedule_is_accepted():
    optimizer = steepest.Muon([weight := matrix(3, 3)])
    weight.grad = torch.ones(3, 3)
    optimizer.param_groups[0]["lr"] = -1e-20
    optimizer.step()


# -- views


def two():
    return matrix(4, 4), matrix(4, 4, seed=1)


@pytest.mark.parametrize("turned", [False, True])
def test_group_views_must_name_parameters_of_the_group(turned):
    a, b = two()
    groups = [{"params": [("a", a)], "views": {"b": rows(2, 2)}}, {"params": [("b", b)]}]
    with pytest.raises(ValueError, match="no parameter here is named 'b'"):
        steepest.Muon(groups[::-1] if turned else groups)
    optimizer = steepest.Muon([("b", b)])
    with pytest.raises(ValueError, match="no parameter here is named 'b'"):
        optimizer.add_param_group(groups[0] | {"params": [("a", a)]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("turned", [False, True])
def test_constructor_views_apply_to_every_group_of_the_rule(turned):
    a, b = two()
    groups = [{"params": [("a", a)]}, {"params": [("b", b)], "lr": 0.5}]
    optimizer = steepest.Muon(groups[::-1] if turned else groups, views={"b": rows(2, 2)})
    assert {row.name: row.view for row in optimizer.explain().rows} == {"a": None, "b": ("rows", (2, 2))}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        ({"rule": "lion"}, "'b' is in a group of rule 'lion', which uses no views"),
        ({"rule": "quad"}, "'b' is in a group with views of its own, or of another rule"),
        ({"views": {}}, "'b' is in a group with views of its own, or of another rule"),
    ],
)
def test_constructor_view_of_a_parameter_in_another_rules_group_is_refused(theirs, words, turned):
    a, b = two()
    groups = [{"params": [("a", a)]}, {"params": [("b", b)], **theirs}]
    with pytest.raises(ValueError, match=words):
        steepest.Muon(groups[::-1] if turned else groups, views={"b": rows(2, 2)})


def test_views_in_a_group_of_an_element_rule_are_refused():
    a, b = two()
    group = {"params": [("b", b)], "rule": "lion", "views": {"b": rows(2, 2)}}
    with pytest.raises(TypeError, match="group 1: 'views' is no option of 'lion'"):
        steepest.Muon([{"params": [("a", a)]}, group])


# -- names


@pytest.mark.parametrize("name", ["rule", "skipped_steps", "base_lr", "initial_lr", "param_names"])
def test_extra_option_with_a_reserved_name_is_refused(name):
    with pytest.raises(TypeError, match=f"option '{name}'"):
        steepest.OrthogonalizedOptimizer([matrix(3, 3)], scaled_orthogonalize_fn=abs, **{name: "lion"})


# -- momentum conventions


FAMILY = [name for name in MATRIX_RULES if steepest.rule.find_rule(name).conventions]


def test_family_declares_its_momentum_convention():
    assert set(FAMILY) == {"orthogonalized", "muon", "normuon", "polargrad", "scion", "hyperball"}


def trained(name):
    optimizer = steepest.create(name, [weight := matrix(3, 3)])
    weight.grad = torch.ones(3, 3)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", FAMILY)
def test_state_dict_states_its_convention(name):
    optimizer = trained(name)
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["momentum_convention"] == "ema"
    other = copy.deepcopy(saved)
    other["param_groups"][0]["momentum_convention"] = "sum"
    before = copy.deepcopy(saved)
    with pytest.raises(ValueError, match=r"momentum_convention .* is 'ema', got 'sum'"):
        optimizer.load_state_dict(other)
    assert str(optimizer.state_dict()) == str(before)
    # State dicts from before this entry existed hold an average too.
    older = copy.deepcopy(saved)
    del older["param_groups"][0]["momentum_convention"]
    optimizer.load_state_dict(older)
    assert str(optimizer.state_dict()["state"]) == str(before["state"])
    assert optimizer.param_groups[0]["momentum_convention"] == "ema"
    with pytest.raises(ValueError, match="got 'sum'"):
        steepest.create(name, [{"params": [matrix(3, 3)], "momentum_convention": "sum"}])


def test_state_dict_without_a_convention_is_refused():
    theirs = torch.optim.SGD([weight := matrix(3, 3)], lr=0.1, momentum=0.9)
    weight.grad = torch.ones(3, 3)
    theirs.step()
    with pytest.raises(ValueError, match="does not record its momentum_convention, which is 'ema' here"):
        trained("muon").load_state_dict(theirs.state_dict())


def test_a_function_in_a_group_is_refused_instead_of_ignored():
    param = matrix(3, 2)
    with pytest.raises(ValueError, match="scaled_orthogonalize_fn is not an option of groups"):
        steepest.OrthogonalizedOptimizer([{"params": [param], "scaled_orthogonalize_fn": torch.sign}])


class PeakRule(steepest.rules.orthogonalized.OrthogonalizedRule):
    """Also keeps the largest mean square of a gradient so far."""

    name = "peak"

    def state_specs(self, group):
        return {**super().state_specs(group), "peak": steepest.rule.StateSpec("tensor")}

    def measure(self, moments, state, group):
        return {}, {"peak": max(float(state["peak"]), float(moments.square) / moments.numel)}


@pytest.mark.usefixtures("forgotten_rules")
def test_a_measured_number_is_kept_where_a_subclass_orthogonalizes():
    class Peak(steepest.OrthogonalizedOptimizer, rule=PeakRule()):
        def orthogonalize(self, p, grad, **kwargs):
            return grad

    param = matrix(3, 2)
    optimizer = Peak([param])
    for value in (1.0, 3.0, 2.0):
        param.grad = torch.full((3, 2), value)
        optimizer.step()
    assert float(optimizer.state[param]["peak"]) == 9
