"""Test OrthogonalizedOptimizer, the base class for users' own matrix optimizers."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

import steepest
from steepest import OrthogonalizedOptimizer
from steepest.linalg import newton_schulz
from steepest.views import rows


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
        [{"params": [first], "flavour": "sour"}, {"params": [conv]}],
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


def test_view_batch_keeps_the_leading_dimensions():
    (experts,) = weights((3, 4, 2))
    optimizer = Doubling([experts], lr=0.1, momentum_beta=0.0, view="batch")
    give_gradients([experts], 0)
    optimizer.step()
    assert experts.calls[0][0].shape == (3, 4, 2)


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
    with pytest.raises(ValueError, match=r"no parameter 'qvk' to which they apply \(did you mean 'qkv'"):
        steepest.Muon([("qkv", fused)], views={"qvk": rows(4, 2, 2)})
    with pytest.raises(ValueError, match="named_parameters"):
        steepest.Muon([fused], views={"qkv": rows(4, 2, 2)})


def test_error_for_one_parameter_changes_none():
    class Picky(OrthogonalizedOptimizer):
        def orthogonalize(self, p, grad, **kwargs):
            if kwargs["picky"]:
                raise ArithmeticError("not this one")
            return grad

    first, second, vector = weights((3, 3), (3, 3), (3,))
    optimizer = Picky(
        [
            {"params": [vector], "rule": "lion"},
            {"params": [first]},
            {"params": [second], "picky": True},
        ],
        lr=0.1,
        picky=False,
    )
    start = [p.detach().clone() for p in (first, second, vector)]
    give_gradients([first, second, vector], 0)
    with pytest.raises(ArithmeticError):
        optimizer.step()
    for param, before in zip((first, second, vector), start, strict=True):
        assert torch.equal(param, before)
        assert not any(value.any() for value in optimizer.state[param].values())
    optimizer.param_groups[2]["picky"] = False
    optimizer.step()
    assert not torch.equal(second, start[1])
