"""Test Muon's execution: batched by shape, in bounded memory, and compared with torch's Muon."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import steepest
from loops import for_each
from steepest.linalg import newton_schulz
from steepest.views import columns, heads, rows

SHAPES = {"a": (6, 4), "b": (6, 4), "c": (4, 9), "conv": (6, 2, 3, 3), "qkv": (12, 4), "col": (4, 8)}
VIEWS = {"qkv": rows(6, 3, 3), "col": columns(5, 3)}
KIN = ["muon", "normuon", "polargrad", "scion", "hyperball"]


def named(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.nn.Parameter(torch.randn(shape, generator=draw)) for name, shape in SHAPES.items()}


def train(params, optimizers, steps=4):
    draw = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for param in params.values():
            param.grad = torch.randn(param.shape, generator=draw)
        for optimizer in optimizers:
            optimizer.step()
    return params


@pytest.mark.parametrize("name", KIN)
def test_parameters_together_equal_parameters_alone(name):
    together, alone = named(), named()
    train(together, [steepest.create(name, together.items(), views=VIEWS)])
    train(
        alone,
        [
            steepest.create(name, [item], views={key: VIEWS[key] for key in VIEWS if key == item[0]})
            for item in alone.items()
        ],
    )
    for key in SHAPES:
        torch.testing.assert_close(together[key], alone[key], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", KIN)
def test_bucket_size_does_not_change_results(name):
    large, small = named(), named()
    train(large, [steepest.create(name, large.items())])
    train(small, [steepest.create(name, small.items(), bucket_bytes=1)])
    for key in SHAPES:
        torch.testing.assert_close(large[key], small[key], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(8, 8), (16, 4), (4, 16)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_matches_torchs_muon(shape, nesterov):
    """Use torch's coefficients and dtype; both define momentum as the same average."""
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=draw)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    common = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov, "ns_steps": 5}
    mine = steepest.Muon([ours], coefficients="jordan", ns_dtype=torch.bfloat16, **common)
    peer = torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **common)
    for _ in range(10):
        ours.grad = torch.randn(shape, generator=draw)
        theirs.grad = ours.grad.clone()
        mine.step()
        peer.step()
    # Both iterate in bfloat16, and the iteration amplifies rounding errors: 1e-2 of the change of p.
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved


def test_overridden_orthogonalize_receives_each_parameter():
    class PerHead(steepest.Muon):
        def orthogonalize(self, p, grad, **options):
            if p.shape == (12, 4):
                blocks = [super(PerHead, self).orthogonalize(p, b, **options) for b in grad.split(3)]
                return torch.cat(blocks)
            return super().orthogonalize(p, grad, **options)

    overridden, viewed = named(), named()
    train(overridden, [PerHead(overridden.items())])
    train(viewed, [steepest.Muon(viewed.items(), views={"qkv": heads(4, 3)})])
    for key in SHAPES:
        torch.testing.assert_close(overridden[key], viewed[key], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(32, 32), (64, 16), (16, 64), (256, 8), (16, 4, 3, 3)])
def test_default_scale_gives_adamws_rms(shape):
    """The rms is 0.2 within 10 %, as AdamW's is."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(shape))
    optimizer = steepest.Muon([weight], lr=1.0, weight_decay=0.0)
    for _ in range(5):
        before = weight.detach().clone()
        weight.grad = torch.randn(shape, generator=draw)
        optimizer.step()
        rms = (weight - before).square().mean().sqrt().item()
        assert rms == pytest.approx(0.2, rel=0.1)


@for_each("normalization", [None, "frobenius", "schatten4", "schatten8", "aol"])
@for_each("coefficients", ["jordan", "minimax_17_17"])
@for_each("name", ["muon", "polargrad"])
def test_coefficients_and_normalization_reach_newton_schulz(name, coefficients, normalization):
    weight = torch.nn.Parameter(torch.zeros(6, 9, dtype=torch.float64))
    weight.grad = torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options = {"coefficients": coefficients, "normalization": normalization}
    steepest.create(name, [weight], lr=1.0, momentum=0.0, scale="none", **options).step()
    polar = newton_schulz(weight.grad, coefficients, normalization=normalization)
    expected = polar * (polar * weight.grad).sum() if name == "polargrad" else polar
    torch.testing.assert_close(weight.detach(), -expected, rtol=1e-9, atol=1e-12)


def test_groups_saved_before_there_were_norms_load():
    weight = torch.nn.Parameter(torch.ones(3, 4))
    saved = steepest.Muon([weight]).state_dict()
    del saved["param_groups"][0]["normalization"]
    optimizer = steepest.Muon([weight])
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["normalization"] is None


def test_unknown_coefficients_are_refused_before_the_first_step():
    with pytest.raises(ValueError, match="quintic"):
        steepest.Muon([torch.nn.Parameter(torch.ones(2, 2))], coefficients="quintik")


def test_muon_and_an_element_rule_in_one_object():
    matrix_, vector = torch.nn.Parameter(torch.ones(3, 3)), torch.nn.Parameter(torch.ones(3))
    alone = [torch.nn.Parameter(p.detach().clone()) for p in (matrix_, vector)]
    both = steepest.Optimizer(
        [{"params": [matrix_]}, {"params": [vector], "rule": "lion", "lr": 0.1}], rule="muon"
    )
    apart = [steepest.Muon([alone[0]]), steepest.Lion([alone[1]], lr=0.1)]
    draw = torch.Generator().manual_seed(0)
    for _ in range(3):
        for ours, theirs in zip((matrix_, vector), alone, strict=True):
            ours.grad = torch.randn(ours.shape, generator=draw)
            theirs.grad = ours.grad.clone()
        both.step()
        for optimizer in apart:
            optimizer.step()
    assert torch.equal(matrix_, alone[0])
    assert torch.equal(vector, alone[1])


class Products(TorchDispatchMode):
    """Count matrix products, batched or not, and record their dtypes."""

    def __init__(self):
        super().__init__()
        self.count, self.dtypes = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm, torch.ops.aten.mm):
            self.count += 1
            self.dtypes.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


def products(name, params, **options):
    optimizer = steepest.create(name, params, **options)
    draw = torch.Generator().manual_seed(0)
    for _, param in params:
        param.grad = torch.randn(param.shape, generator=draw)
    with Products() as seen:
        optimizer.step()
    return seen


@pytest.mark.parametrize("name", [*KIN, "quad", "procrustes"])
def test_matrices_of_equal_shape_are_computed_together(name):
    """Eight matrices need as many products as one, as parameters or as blocks of one parameter."""
    one = products(name, [("w", torch.nn.Parameter(torch.ones(6, 4)))]).count
    many = [(str(i), torch.nn.Parameter(torch.ones(6, 4))) for i in range(8)]
    fused = [("w", torch.nn.Parameter(torch.ones(48, 4)))]
    assert one > 0
    assert products(name, many).count == one
    assert products(name, fused, views={"w": heads(8, 6)}).count == one
    assert products(name, many, bucket_bytes=1).count == 8 * one


@for_each("name", KIN)
@for_each("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_products_have_the_requested_dtype(name, dtype):
    assert products(name, [("w", torch.nn.Parameter(torch.ones(6, 4)))], ns_dtype=dtype).dtypes == {dtype}


@pytest.mark.parametrize("view", [columns(2, 3), rows(1, 2), columns(1, 1, 3)], ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 2)])
def test_views_do_not_change_stochastic_rounding(view, shape):
    """Noise depends on an element's index in the parameter, so with the identity, views change no bit."""
    trained = []
    for views in (None, {"w": view}):
        whole = torch.nn.Parameter(torch.ones(shape, dtype=torch.bfloat16))
        optimizer = steepest.OrthogonalizedOptimizer(
            [("w", whole)],
            lr=2e-3,
            momentum_beta=0.0,
            scaled_orthogonalize_fn=identity,
            rounding="stochastic",
            views=views,
        )
        for _ in range(4):
            whole.grad = torch.ones_like(whole)
            optimizer.step()
        trained.append(whole.detach())
    assert torch.equal(*trained)
    assert trained[0].unique().numel() > 1


def identity(u):
    return u
