"""Test valid and invalid options of param groups for the orthogonalized rules."""

from __future__ import annotations

import io
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import steepest
from steepest import OrthogonalizedOptimizer
from steepest.views import columns, heads, rows


def matrix(*shape, seed=0):
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def stepped(optimizer, *params):
    before = [p.detach().clone() for p in params]
    for param in params:
        param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(7))
    optimizer.step()
    return [b - p.detach() for b, p in zip(before, params, strict=True)]


def test_coefficients_run_their_whole_table_by_default():
    weight = matrix(6, 4)
    (moved,) = stepped(
        steepest.Muon([weight], lr=1.0, weight_decay=0.0, coefficients="deepseekv4", scale="none"), weight
    )
    torch.testing.assert_close(torch.linalg.svdvals(moved), torch.ones(4), rtol=0, atol=2e-3)


def test_scions_radius_is_per_group():
    first, second = matrix(4, 4), matrix(4, 4)
    optimizer = steepest.Scion(
        [{"params": [first]}, {"params": [second], "radius": 1.0}], lr=1.0, radius=50.0, weight_decay=0.0
    )
    large, small = stepped(optimizer, first, second)
    torch.testing.assert_close(large, 50 * small)


def test_invalid_group_views_are_refused():
    for bad in ({"b": rows(2, 2)}, {"a": rows(2, 1)}, {"a": ("rows", (6, -2))}, {"a": ("rows", "22")}):
        with pytest.raises(ValueError, match=r"'a'|'b'"):
            steepest.Muon([{"params": [("a", matrix(4, 4))], "views": bad}])
        optimizer = steepest.Muon([("c", matrix(4, 4))])
        with pytest.raises(ValueError, match=r"'a'|'b'"):
            optimizer.add_param_group({"params": [("a", matrix(4, 4))], "views": bad})
        assert len(optimizer.param_groups) == 1


def test_base_rule_outside_its_class_warns_and_uses_the_identity():
    weight = matrix(4, 4)
    optimizer = steepest.Optimizer([weight], rule="orthogonalized", lr=1.0, momentum_beta=0.0)
    with pytest.warns(UserWarning, match="its own class"):
        (moved,) = stepped(optimizer, weight)
    torch.testing.assert_close(moved, weight.grad)


def test_group_of_another_rule_uses_that_rules_matrix_function():
    ours, theirs, alone = matrix(4, 4), matrix(4, 4), matrix(4, 4)
    both = OrthogonalizedOptimizer(
        [{"params": [ours]}, {"params": [theirs], "rule": "muon"}],
        lr=0.1,
        scaled_orthogonalize_fn=lambda u: 100 * u,
    )
    _, moved = stepped(both, ours, theirs)
    (expected,) = stepped(steepest.Muon([alone]), alone)
    assert torch.equal(moved, expected)


class DoublingRule(steepest.rules.OrthogonalizedRule):
    name = "doubling_for_a_test"


def test_subclass_may_register_its_own_rule():
    class Doubling(OrthogonalizedOptimizer, rule=DoublingRule()):
        def orthogonalize(self, p, grad, **options):
            return 2 * grad

    try:
        weight = matrix(4, 4)
        optimizer = steepest.create("doubling_for_a_test", [weight], lr=1.0, momentum_beta=0.0)
        assert optimizer.param_groups[0]["rule"] == "doubling_for_a_test"
        (moved,) = stepped(optimizer, weight)
        torch.testing.assert_close(moved, 2 * weight.grad)
    finally:
        steepest.rule._RULES.pop("doubling_for_a_test")
        steepest.optimizer.OPTIMIZERS.pop("doubling_for_a_test")


@pytest.mark.parametrize("result", [None, 3.0])
def test_result_that_is_no_tensor_raises_and_names_the_parameter(result):
    class Wrong(OrthogonalizedOptimizer):
        def orthogonalize(self, p, grad, **options):
            return result

    weight = matrix(4, 4)
    weight.grad = torch.ones(4, 4)
    with pytest.raises(TypeError, match="'fc'"):
        Wrong([("fc", weight)]).step()


def test_hyperball_refuses_a_zero_block_and_a_zero_expert():
    half = torch.nn.Parameter(torch.cat([torch.ones(2, 4), torch.zeros(2, 4)]))
    steepest.Hyperball([("w", half)])
    with pytest.raises(ValueError, match="'w' is zero, or a matrix in it"):
        steepest.Hyperball([("w", half)], views={"w": rows(2, 2)})
    experts = torch.nn.Parameter(torch.stack([torch.ones(2, 3), torch.zeros(2, 3)]))
    with pytest.raises(ValueError, match="'w' is zero, or a matrix in it"):
        steepest.Hyperball([("w", experts)], view="batch")


def test_state_dict_with_other_views_is_refused():
    def make(views):
        return steepest.NorMuon([("w", matrix(4, 4))], views=views)

    saved, optimizer = make(None), make({"w": rows(2, 2)})
    stepped(saved, *saved.param_groups[0]["params"])
    with pytest.raises(ValueError, match="views"):
        optimizer.load_state_dict(saved.state_dict())
    assert optimizer.param_groups[0]["views"] == {"w": rows(2, 2)}
    assert not optimizer.state


class Peak(TorchDispatchMode):
    """Record the peak bytes of live storages created by operations, not counting ``own``."""

    def __init__(self, own):
        super().__init__()
        self.own = {tensor.untyped_storage().data_ptr() for tensor in own}
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(each, torch.Tensor):
                storage = each.untyped_storage()
                if storage.data_ptr() not in self.own:
                    self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


@pytest.mark.parametrize(
    ("name", "dtype", "options"),
    [
        ("muon", torch.float32, {}),
        ("muon", torch.bfloat16, {"rounding": "stochastic"}),
        ("muon", torch.float32, {"ns_dtype": torch.float64}),
        ("muon", torch.float32, {"ns_dtype": torch.float64, "method": "svd"}),
        ("quad", torch.float32, {"max_skew_dense": 1.0}),
        ("quad", torch.float32, {"max_skew_dense": 0.0}),
    ],
)
def test_bucket_bytes_bounds_the_working_memory_of_a_step(name, dtype, options):
    """Measure 64 matrices whose batch would be several times larger, and one parameter of 64 blocks."""
    bound = 4 << 20
    for params in (
        [(f"w{i}", torch.nn.Parameter(torch.randn(64, 64).to(dtype))) for i in range(64)],
        [("fused", torch.nn.Parameter(torch.randn(64 * 64, 64).to(dtype)))],
    ):
        views = {"fused": heads(64, 64)} if len(params) == 1 else None
        optimizer = steepest.create(name, params, bucket_bytes=bound, views=views, **options)
        for _, param in params:
            param.grad = torch.randn(param.shape).to(dtype)
        optimizer.step()
        own = [t for _, p in params for t in (p, p.grad, *optimizer.state[p].values())]
        with Peak(own) as seen:
            optimizer.step()
        assert seen.peak <= bound


def test_list_of_one_triple_is_repeated():
    """One triple runs five times, like the named set of the same triple; a longer list runs once."""
    jordan = (3.4445, -4.7750, 2.0315)
    moved = [
        stepped(steepest.Muon([weight], coefficients=coefficients), weight)[0]
        for weight, coefficients in ((matrix(6, 4), [jordan]), (matrix(6, 4), "jordan"))
    ]
    assert torch.equal(*moved)
    long = [jordan] * 6
    (six,) = stepped(steepest.Muon([weight := matrix(6, 4)], coefficients=long), weight)
    (told,) = stepped(steepest.Muon([weight := matrix(6, 4)], coefficients=[jordan], ns_steps=6), weight)
    (once,) = stepped(steepest.Muon([weight := matrix(6, 4)], coefficients=[jordan], ns_steps=1), weight)
    assert torch.equal(six, told)
    assert not torch.equal(once, moved[0])


def test_numpy_integers_and_other_mappings_become_python_types():
    weight = matrix(6, 4)
    optimizer = steepest.Muon(
        [("w", weight)], ns_steps=np.int64(7), views=MappingProxyType({"w": rows(np.int64(2), 4)})
    )
    optimizer.add_param_group(
        {"params": [("v", matrix(6, 4, seed=1))], "ns_steps": np.int64(3), "views": None}
    )
    groups = optimizer.param_groups
    assert [(type(group["ns_steps"]), group["ns_steps"]) for group in groups] == [(int, 7), (int, 3)]
    assert groups[0]["views"] == {"w": ("rows", (2, 4))}
    assert type(groups[0]["views"]) is dict
    stepped(optimizer, weight)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: rows(), r"integers ≥ 1, got \(\)"),
        (lambda: rows(True, True), r"got \(True, True\)"),
        (lambda: columns(2.0), r"got \(2.0,\)"),
        (lambda: heads(2.0, 2), "got 2.0 and 2"),
        (lambda: heads(-1, 2), "got -1 and 2"),
        (lambda: heads(2, 0), "got 2 and 0"),
    ],
)
def test_view_sizes_must_be_positive_integers(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("name", ["muon", "normuon", "polargrad", "scion"])
def test_fourth_argument_is_the_weight_decay(name):
    optimizer = steepest.registry.optimizer_class(name)([matrix(2, 2)], 0.1, 0.8, 0.25)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.1, 0.8, 0.25)
