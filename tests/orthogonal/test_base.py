"""Test OrthogonalizedOptimizer, the base class for users' own matrix optimizers."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch

import steepest
from steepest import OrthogonalizedOptimizer
from steepest.linalg import newton_schulz
from steepest.views import rows

from .test_groups import Peak


def weights(*shapes, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]


def give_gradients(params, seed):
    draw = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=draw)


class Doubling(OrthogonalizedOptimizer):
    """Record the arguments of each call."""

    def orthogonalize(self, p, grad, **kwargs):
        p.calls = [*getattr(p, "calls", []), (grad.clone(), kwargs)]
        return 2 * grad


def identity(u):
    return u


@pytest.mark.parametrize("nesterov", [False, True])
def test_identity_gives_sgd_with_averaged_momentum(nesterov):
    (ours,), (theirs,) = weights((4, 3)), weights((4, 3))
    optimizer = OrthogonalizedOptimizer(
        [ours], lr=0.1, momentum_beta=0.9, use_nesterov=nesterov, scaled_orthogonalize_fn=identity
    )
    sgd = torch.optim.SGD(
        [theirs], lr=0.1, momentum=0.9, dampening=0.0 if nesterov else 0.9, nesterov=nesterov
    )
    for step in range(20):
        give_gradients([ours], step)
        if step == 0:
            # torch starts from the first gradient itself, our average from 0.
            sgd.state[theirs]["momentum_buffer"] = torch.zeros_like(theirs)
        theirs.grad = ours.grad.clone() * (0.1 if nesterov else 1.0)
        # Nesterov: u = g + β(m − g) = (1−β)g + βm, which is torch's form on (1−β)g.
        optimizer.step()
        sgd.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_orthogonalize_receives_parameter_matrix_and_group_options():
    first, conv = weights((4, 3), (4, 2, 3, 3))
    optimizer = Doubling(
        [{"params": [first], "flavour": "sour"}, {"params": [conv], "view": "flatten"}],
        lr=0.5,
        momentum_beta=0.0,
        flavour="sweet",
    )
    give_gradients([first, conv], 0)
    before = [p.detach().clone() for p in (first, conv)]
    optimizer.step()
    (seen, options), (flat, others) = first.calls[0], conv.calls[0]
    assert torch.equal(seen, first.grad)
    assert torch.equal(flat, conv.grad.view(4, 18))
    assert options["flavour"] == "sour"
    assert others["flavour"] == "sweet"
    assert "params" not in options
    assert options["lr"] == 0.5
    torch.testing.assert_close(first, before[0] - first.grad, rtol=0, atol=1e-6)
    torch.testing.assert_close(conv, before[1] - conv.grad, rtol=0, atol=1e-6)
    saved = optimizer.state_dict()["param_groups"]
    assert [group["flavour"] for group in saved] == ["sour", "sweet"]


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (3, 4, 2)),
        ({"view": "param"}, (3, 4, 2)),
        ({"view": "batch"}, (3, 4, 2)),
        ({"view": "flatten"}, (3, 8)),
    ],
)
def test_three_dimensions_come_as_they_are_unless_they_are_flattened(options, shape):
    (experts,) = weights((3, 4, 2))
    optimizer = Doubling([experts], lr=0.1, momentum_beta=0.0, **options)
    give_gradients([experts], 0)
    start = experts.detach().clone()
    optimizer.step()
    (seen, _), *more = experts.calls
    assert not more
    assert torch.equal(seen, experts.grad.reshape(shape))
    torch.testing.assert_close(experts.detach(), start - 0.2 * experts.grad)


def test_muon_flattens_and_has_no_view_of_the_parameter_itself():
    (conv,) = weights((3, 4, 2))
    assert steepest.Muon([conv]).param_groups[0]["view"] == "flatten"
    with pytest.raises(ValueError, match="view must be one of 'flatten', 'batch', got 'param'"):
        steepest.Muon([conv], view="param")


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_matmul_precision_is_set_inside_and_restored_after_an_error(precision):
    before = torch.get_float32_matmul_precision()
    seen = []

    class Failing(OrthogonalizedOptimizer):
        def orthogonalize(self, p, grad, **kwargs):
            seen.append(torch.get_float32_matmul_precision())
            raise ArithmeticError("no")

    (weight,) = weights((3, 3))
    start = weight.detach().clone()
    optimizer = Failing([weight], lr=0.1, fp32_matmul_prec=precision)
    give_gradients([weight], 0)
    with pytest.raises(ArithmeticError):
        optimizer.step()
    assert seen == [precision]
    assert torch.get_float32_matmul_precision() == before
    assert torch.equal(weight, start)
    assert not optimizer.state[weight]["momentum_buffer"].any()


def test_vectors_are_refused_at_construction_by_name():
    matrix, vector = weights((3, 3), (3,))
    for make in (
        lambda params: OrthogonalizedOptimizer(params, scaled_orthogonalize_fn=identity),
        steepest.Muon,
    ):
        with pytest.raises(ValueError, match=r"'norm.weight' has shape \(3,\)"):
            make([("fc.weight", matrix), ("norm.weight", vector)])
        optimizer = make([("fc.weight", matrix)])
        with pytest.raises(ValueError, match="takes matrices"):
            optimizer.add_param_group({"params": [("norm.weight", vector)]})
        assert len(optimizer.param_groups) == 1


def test_missing_function_warns_and_uses_the_identity():
    (weight,) = weights((3, 3))
    with pytest.warns(UserWarning, match="scaled_orthogonalize_fn"):
        optimizer = OrthogonalizedOptimizer([weight], lr=1.0, momentum_beta=0.0)
    start = weight.detach().clone()
    give_gradients([weight], 0)
    optimizer.step()
    torch.testing.assert_close(weight, start - weight.grad)


def test_result_of_another_shape_raises_and_names_the_parameter():
    class Wrong(OrthogonalizedOptimizer):
        def orthogonalize(self, p, grad, **kwargs):
            return grad.T

    (weight,) = weights((3, 2))
    start = weight.detach().clone()
    optimizer = Wrong([("fc", weight)], lr=1.0)
    give_gradients([weight], 0)
    with pytest.raises(ValueError, match="'fc'"):
        optimizer.step()
    assert torch.equal(weight, start)


def test_function_survives_deepcopy_and_pickle_and_is_not_in_the_state_dict():
    (weight,) = weights((3, 3))
    optimizer = OrthogonalizedOptimizer(
        [weight], lr=1.0, momentum_beta=0.0, scaled_orthogonalize_fn=torch.sign
    )
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        (other,) = twin.param_groups[0]["params"]
        start = other.detach().clone()
        give_gradients([other], 0)
        twin.step()
        torch.testing.assert_close(other, start - other.grad.sign())
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    torch.load(file, weights_only=True)


class SplitQKV(OrthogonalizedOptimizer):
    """Orthogonalize the parts of a fused QKV projection separately, as in the documented example."""

    def orthogonalize(self, p, grad, **options):
        blocks = grad.split(options["qkv"]) if getattr(p, "is_qkv", False) else [grad]
        return torch.cat([newton_schulz(block) for block in blocks])


def test_split_qkv_equals_three_matrices():
    fused, other = weights((8, 4), (4, 4))
    fused.is_qkv = True
    parts = [torch.nn.Parameter(block.clone()) for block in fused.detach().split([4, 2, 2])]
    together = SplitQKV([fused, other], lr=0.1, qkv=[4, 2, 2])
    apart = SplitQKV(parts, lr=0.1)
    for step in range(5):
        give_gradients([fused, other], step)
        for part, gradient in zip(parts, fused.grad.split([4, 2, 2]), strict=True):
            part.grad = gradient.clone()
        together.step()
        apart.step()
    torch.testing.assert_close(fused.detach(), torch.cat([p.detach() for p in parts]), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["muon", "normuon", "polargrad", "scion"])
def test_view_equals_separate_matrices(name):
    (fused,) = weights((8, 4))
    parts = [torch.nn.Parameter(block.clone()) for block in fused.detach().split([4, 2, 2])]
    together = steepest.create(name, [("qkv", fused)], lr=0.1, views={"qkv": rows(4, 2, 2)})
    apart = steepest.create(name, [(str(i), part) for i, part in enumerate(parts)], lr=0.1)
    for step in range(5):
        give_gradients([fused], step)
        for part, gradient in zip(parts, fused.grad.split([4, 2, 2]), strict=True):
            part.grad = gradient.clone()
        together.step()
        apart.step()
    torch.testing.assert_close(fused.detach(), torch.cat([p.detach() for p in parts]), rtol=0, atol=0)


def test_views_that_do_not_fill_the_parameter_are_refused_by_name():
    (fused,) = weights((8, 4))
    with pytest.raises(ValueError, match=r"'qkv' has shape \(8, 4\)"):
        steepest.Muon([("qkv", fused)], views={"qkv": rows(4, 2)})
    with pytest.raises(ValueError, match="'qkv'"):
        steepest.Muon([("qkv", fused)], views={"qkv": "thirds"})


def test_view_of_a_missing_parameter_is_refused():
    (fused,) = weights((8, 4))
    with pytest.raises(ValueError, match=r"no parameter here is named 'qvk' \(did you mean 'qkv'"):
        steepest.Muon([("qkv", fused)], views={"qvk": rows(4, 2, 2)})
    with pytest.raises(ValueError, match="named_parameters"):
        steepest.Muon([fused], views={"qkv": rows(4, 2, 2)})


class Picky(OrthogonalizedOptimizer):
    """Raise for a parameter that is marked, after spoiling what it was given."""

    def orthogonalize(self, p, grad, **kwargs):
        grad.zero_()
        if getattr(p, "picky", False):
            raise ArithmeticError("not this one")
        return torch.ones_like(grad)


def snapshot(optimizer, params):
    return [
        [p.detach().clone(), *(value.clone() for value in optimizer.state[p].values() if value.numel())]
        for p in params
    ]


def bitwise(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize("views", [None, {"bad": rows(2, 1)}])
def test_after_an_error_each_parameter_is_stepped_or_as_it_was(views):
    good, bad, after, vector = weights((3, 3), (3, 3), (3, 3), (3,))
    named = [("good", good), ("bad", bad), ("after", after)]
    optimizer = Picky(
        [{"params": [("vector", vector)], "rule": "lion"}, {"params": named, "views": views}],
        lr=0.1,
        momentum_beta=0.5,
        rounding="stochastic",
    )
    params = [good, bad, after, vector]
    for step in range(2):
        give_gradients(params, step)
        optimizer.step()
    bad.picky = True
    before, gradient = snapshot(optimizer, params), good.grad
    give_gradients(params, 2)
    with pytest.raises(ArithmeticError):
        optimizer.step()
    now = snapshot(optimizer, params)
    # lr 0.1 along ones, and the average of what it was and the gradient.
    torch.testing.assert_close(now[0][0], before[0][0] - 0.1)
    torch.testing.assert_close(now[0][1], 0.5 * before[0][1] + 0.5 * good.grad)
    assert gradient is not good.grad
    for each in (1, 2, 3):
        assert bitwise(now[each], before[each])
    # A step without the fault goes on from there.
    bad.picky = False
    optimizer.step()
    torch.testing.assert_close(bad.detach(), before[1][0] - 0.1)


def test_a_step_holds_what_one_parameter_needs():
    """Measure the peak of the step's own tensors for one matrix, and for eight."""
    peaks = []
    for count in (1, 8):
        params = weights(*[(64, 64)] * count)
        optimizer = OrthogonalizedOptimizer(params, lr=0.1, scaled_orthogonalize_fn=lambda u: 2 * u)
        give_gradients(params, 0)
        optimizer.step()
        own = [t for p in params for t in (p, p.grad, *optimizer.state[p].values())]
        with Peak(own) as seen:
            optimizer.step()
        peaks.append(seen.peak)
    size = 64 * 64 * 4
    # A copy of the momentum, u, twice u, and a chunk's temporaries.
    assert peaks[0] <= 6 * size
    assert peaks[1] <= peaks[0]


# -- attributes, as in the class that this one follows


class SplitByAttributes(OrthogonalizedOptimizer):
    """Split QKV as Emerging-Optimizers documents it."""

    def __init__(self, params, qkv_split_shapes, **options):
        super().__init__(params, **options)
        self.qkv_split_shapes = qkv_split_shapes
        self._calls = 0

    def orthogonalize(self, p, grad, **kwargs):
        self._calls += 1
        if getattr(p, "is_qkv", False):
            parts = torch.split(grad, self.qkv_split_shapes, dim=0)
            return torch.cat([self.scaled_orthogonalize_fn(part) for part in parts])
        return self.scaled_orthogonalize_fn(grad)


def split_by_attributes(**options):
    fused, other = weights((8, 4), (4, 4))
    fused.is_qkv = True
    return SplitByAttributes(
        [fused, other], [4, 2, 2], lr=0.1, scaled_orthogonalize_fn=newton_schulz, **options
    )


def test_split_qkv_by_attributes_equals_three_matrices():
    together = split_by_attributes()
    fused, other = together.param_groups[0]["params"]
    parts = [torch.nn.Parameter(block.clone()) for block in fused.detach().split([4, 2, 2])]
    apart = OrthogonalizedOptimizer(parts, lr=0.1, scaled_orthogonalize_fn=newton_schulz)
    for step in range(5):
        give_gradients([fused, other], step)
        for part, gradient in zip(parts, fused.grad.split([4, 2, 2]), strict=True):
            part.grad = gradient.clone()
        together.step()
        apart.step()
    assert torch.equal(fused.detach(), torch.cat([p.detach() for p in parts]))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_subclass_s_attributes_survive_copies(copied):
    first = split_by_attributes(use_nesterov=True)
    params = first.param_groups[0]["params"]
    give_gradients(params, 0)
    # A scheduler wraps the step of the one object.
    torch.optim.lr_scheduler.StepLR(first, 10)
    first.step()
    second = copied(first)
    twins = second.param_groups[0]["params"]
    for twin in twins:
        twin.is_qkv = twin.shape == (8, 4)
    assert (second.qkv_split_shapes, second._calls, second.use_nesterov) == ([4, 2, 2], 2, True)
    assert "step" not in vars(second)
    for each in (params, twins):
        give_gradients(each, 1)
    first.step()
    second.step()
    assert bitwise(params, twins)
    assert second._collector is not first._collector


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("use_nesterov", True, True),
        ("fp32_matmul_prec", "medium", "medium"),
        ("weight_decay_method", "l2", "l2"),
        ("weight_decay_method", "independent", "untied"),
        ("scaled_orthogonalize_fn", torch.tanh, None),
    ],
)
def test_assigning_an_attribute_is_as_constructing_with_it(name, value, said):
    common = {"lr": 0.1, "weight_decay": 0.3, "scaled_orthogonalize_fn": torch.sign}
    (ours, more), (theirs, others) = weights((4, 3), (4, 3)), weights((4, 3), (4, 3))
    assigned = OrthogonalizedOptimizer([ours], **common)
    setattr(assigned, name, value)
    assert getattr(assigned, name) == value
    made = OrthogonalizedOptimizer([theirs], **{**common, name: value})
    assert getattr(made, name) == value
    for optimizer, late in ((assigned, more), (made, others)):
        optimizer.add_param_group({"params": [late]})
        for group in optimizer.param_groups:
            assert group.get(name) == said
        for step in range(3):
            give_gradients([ours, more] if optimizer is assigned else [theirs, others], step)
            optimizer.step()
    assert bitwise([ours, more], [theirs, others])


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("use_nesterov", 1, ValueError),
        ("fp32_matmul_prec", "low", ValueError),
        ("weight_decay_method", "L2", ValueError),
        ("scaled_orthogonalize_fn", 3.0, TypeError),
    ],
)
def test_an_invalid_value_is_refused_and_nothing_changes(name, value, error):
    (weight,) = weights((3, 3))
    optimizer = OrthogonalizedOptimizer([weight], lr=0.1, scaled_orthogonalize_fn=identity)
    before = (getattr(optimizer, name), dict(optimizer.defaults), dict(optimizer.param_groups[0]))
    with pytest.raises(error, match=name):
        setattr(optimizer, name, value)
    assert before == (getattr(optimizer, name), optimizer.defaults, optimizer.param_groups[0])
    with pytest.raises(error, match=name):
        OrthogonalizedOptimizer([weight], lr=0.1, **{"scaled_orthogonalize_fn": identity, name: value})


def test_attributes_say_what_is_in_force():
    first, second, bias = weights((3, 3), (3, 3), (3,))
    optimizer = OrthogonalizedOptimizer(
        [{"params": [first]}, {"params": [bias], "rule": "lion"}], scaled_orthogonalize_fn=identity
    )
    saved = OrthogonalizedOptimizer(
        [{"params": [first]}, {"params": [bias], "rule": "lion"}],
        use_nesterov=True,
        weight_decay_method="independent",
        scaled_orthogonalize_fn=identity,
    )
    optimizer.load_state_dict(saved.state_dict())
    assert (optimizer.use_nesterov, optimizer.weight_decay_method) == (True, "independent")
    optimizer.weight_decay_method = "palm"
    # The group of another rule keeps its own.
    assert optimizer.param_groups[1]["weight_decay_method"] == "decoupled"
    optimizer.add_param_group({"params": [second], "use_nesterov": False})
    # The groups differ: what a group to come will get.
    assert optimizer.use_nesterov is optimizer.defaults["use_nesterov"] is False
    optimizer.use_nesterov = True
    assert [group.get("use_nesterov") for group in optimizer.param_groups] == [True, None, True]


def test_a_missing_function_reads_as_the_identity_and_none_takes_it_away():
    (weight,) = weights((3, 3))
    optimizer = Doubling([weight])
    assert optimizer.scaled_orthogonalize_fn(weight) is weight
    optimizer.scaled_orthogonalize_fn = torch.sign
    optimizer.scaled_orthogonalize_fn = None
    assert optimizer.scaled_orthogonalize_fn(weight) is weight


def test_muon_has_the_attributes_of_its_own_options_alone():
    (weight,) = weights((3, 3))
    optimizer = steepest.Muon([weight], weight_decay_method="independent")
    assert (optimizer.weight_decay_method, optimizer.fp32_matmul_prec) == ("independent", "highest")
    optimizer.weight_decay_method = "independent"
    assert optimizer.param_groups[0]["weight_decay_method"] == "independent"
    for name, value in (("use_nesterov", True), ("scaled_orthogonalize_fn", identity)):
        assert not hasattr(optimizer, name)
        with pytest.raises(AttributeError, match=name):
            setattr(optimizer, name, value)


# -- decay by a subclass's own code


class OwnDecay(OrthogonalizedOptimizer):
    """Decay toward a parameter's anchor, as a subclass may wish."""

    def _apply_weight_decay_inplace(self, p, grad, lr, weight_decay):
        p.calls = [*getattr(p, "calls", []), (grad.clone(), lr, weight_decay)]
        p.add_(p - p.anchor, alpha=-lr * weight_decay)


class MixinDecay(OrthogonalizedOptimizer):
    """Call the base class's method."""

    def _apply_weight_decay_inplace(self, p, grad, lr, weight_decay):
        super()._apply_weight_decay_inplace(p, grad, lr, weight_decay)


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("maximize", [False, True])
def test_an_overridden_decay_takes_the_place_of_ours(decay, maximize):
    weight, bias = weights((3, 3), (3,))
    weight.anchor = torch.ones(3, 3)
    start = weight.detach().clone()
    optimizer = OwnDecay(
        [{"params": [weight]}, {"params": [bias], "rule": "lion"}],
        lr=0.1,
        momentum_beta=0.0,
        weight_decay=decay,
        scaled_orthogonalize_fn=identity,
        maximize=maximize,
    )
    give_gradients([weight, bias], 0)
    gradient = weight.grad.clone()
    optimizer.step()
    sign = -1 if maximize else 1
    ((seen, lr, strength),) = weight.calls
    assert torch.equal(seen, sign * gradient)
    assert (lr, strength) == (0.1, decay)
    assert torch.equal(weight.grad, gradient)
    expected = start - 0.1 * decay * (start - 1) - sign * 0.1 * gradient
    torch.testing.assert_close(weight.detach(), expected)
    assert not hasattr(bias, "calls")


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("method", ["decoupled", "independent", "untied", "l2", "palm", "sign"])
def test_the_base_s_decay_called_from_an_override_is_the_engine_s(method, maximize):
    (ours,), (theirs,) = weights((3, 3)), weights((3, 3))
    options = {
        "lr": 0.1,
        "weight_decay": 0.25,
        "weight_decay_method": method,
        "maximize": maximize,
        "scaled_orthogonalize_fn": torch.sign,
    }
    made = [MixinDecay([ours], **options), OrthogonalizedOptimizer([theirs], **options)]
    schedules = [torch.optim.lr_scheduler.StepLR(each, 2, 0.5) for each in made]
    for step in range(6):
        for weight, optimizer, schedule in zip((ours, theirs), made, schedules, strict=True):
            give_gradients([weight], step)
            optimizer.step()
            schedule.step()
    torch.testing.assert_close(ours.detach(), theirs.detach())


def test_cautious_decay_cannot_be_done_before_the_direction_is_known():
    (weight,) = weights((3, 3))
    optimizer = MixinDecay(
        [weight], weight_decay=0.1, weight_decay_method="cautious", scaled_orthogonalize_fn=identity
    )
    give_gradients([weight], 0)
    with pytest.raises(ValueError, match="'cautious' needs the step's direction"):
        optimizer.step()


def test_an_error_in_the_decay_or_after_it_leaves_the_parameter_as_it_was():
    class Halving(OrthogonalizedOptimizer):
        def _apply_weight_decay_inplace(self, p, grad, lr, weight_decay):
            p.mul_(0.5)
            grad.zero_()
            if p.fails == "decay":
                raise ArithmeticError

        def orthogonalize(self, p, grad, **kwargs):
            if p.fails == "orthogonalize":
                raise ArithmeticError
            return grad

    for fails in ("decay", "orthogonalize"):
        good, bad = weights((3, 3), (3, 3))
        good.fails, bad.fails = None, fails
        optimizer = Halving([good, bad], lr=0.1)
        give_gradients([good, bad], 0)
        gradient = bad.grad.clone()
        start = [p.detach().clone() for p in (good, bad)]
        with pytest.raises(ArithmeticError):
            optimizer.step()
        assert torch.equal(good, 0.5 * start[0])
        assert torch.equal(bad, start[1])
        assert torch.equal(bad.grad, gradient)
        assert not optimizer.state[bad]["momentum_buffer"].any()


@pytest.mark.parametrize("finite", [False, True])
def test_a_skipped_step_undoes_an_overridden_decay(finite, monkeypatch):
    (ours,), (theirs,) = weights((3, 3)), weights((3, 3))
    options = {"lr": 0.1, "weight_decay": 0.5, "scaled_orthogonalize_fn": torch.sign, "nonfinite": "skip"}
    for weight, masked in ((ours, True), (theirs, False)):
        weight.anchor = torch.ones(3, 3)
        give_gradients([weight], 0)
        start = weight.detach().clone()
        optimizer = OwnDecay([weight], **options)
        with monkeypatch.context() as patch:
            if masked:
                patch.setattr(
                    "steepest.engine.grad_check.check_gradients", lambda batches: torch.tensor(finite)
                )
            optimizer.step()
        if masked and not finite:
            assert torch.equal(weight, start)
            assert not optimizer.state[weight]["momentum_buffer"].any()
            return
    assert torch.equal(ours, theirs)


def test_muon_s_decay_can_be_overridden_and_nothing_else_changes():
    class Decaying(steepest.NorMuon):
        def _apply_weight_decay_inplace(self, p, grad, lr, weight_decay):
            p.mul_(1 - lr * weight_decay)

    ours, theirs = weights((4, 3), (4, 3)), weights((4, 3), (4, 3))
    options = {"lr": 0.1, "weight_decay": 0.5}
    made = [Decaying(ours, **options), steepest.NorMuon(theirs, **options)]
    for step in range(3):
        give_gradients([*ours], step)
        give_gradients([*theirs], step)
        for optimizer in made:
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.detach(), other.detach())


@pytest.mark.parametrize(
    ("name", "meant"),
    [("weight_decy", "weight_decay"), ("momentum", "momentum_beta"), ("nesterov", "use_nesterov")],
)
def test_a_near_miss_of_an_option_warns_and_is_kept(name, meant):
    with pytest.warns(
        UserWarning, match=f"'{name}' is no option of 'orthogonalized' .did you mean '{meant}'"
    ):
        optimizer = OrthogonalizedOptimizer(
            [torch.nn.Parameter(torch.ones(2, 2))], scaled_orthogonalize_fn=newton_schulz, **{name: 0.5}
        )
    assert optimizer.param_groups[0][name] == 0.5


@pytest.mark.parametrize("name", ["qkv", "rank", "heads", "split", "scale_factor", "warmup", "is_fused"])
def test_a_subclass_s_own_option_does_not(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OrthogonalizedOptimizer(
            [torch.nn.Parameter(torch.ones(2, 2))], scaled_orthogonalize_fn=newton_schulz, **{name: 0.5}
        )
