"""Compare each step with the original quad_torch, if a checkout is available (see CONTRIBUTING)."""

from __future__ import annotations

import copy
import importlib
import io
import os
import sys

import pytest
import torch

from .fitting import KINDS
from .test_reference import SHAPES

TOLERANCE = 1e-10

OPTIONS = [
    {},
    {"max_skew_dense": float("inf")},
    {"max_size_dense": 3},
    {"lr_style": None, "momentum": 0.5, "preconditioner_init_scale": 1.3},
    {"preconditioner_lr": 0.2},
]


@pytest.fixture(scope="module")
def original():
    """Import quad_torch uncompiled, with exact norms and no noise, as our optimizers run here.

    This needs a checkout: release 0.4.5 on the package index fails on every matrix.
    """
    folder = os.environ.get("QUAD_TORCH")
    if not folder:
        pytest.skip("QUAD_TORCH does not name a checkout of the quad_torch repository")
    patch = pytest.MonkeyPatch()
    loaded = {name for name in sys.modules if name.split(".")[0] == "quad_torch"}
    assert not loaded, "quad_torch was imported earlier, compiled"
    patch.syspath_prepend(folder)
    patch.setattr(torch, "compile", lambda *args, **options: lambda function: function)
    package = importlib.import_module("quad_torch")
    inner = importlib.import_module("quad_torch._psgd")
    patch.setattr(inner, "print", lambda *args, **options: None, raising=False)
    patch.setattr(inner, "_add_noise", lambda x, scale: x)
    patch.setattr(
        inner,
        "_norm_lower_bound",
        # The original first divides by max|R|, which is zero for a symmetric Q.
        lambda a, k=4, iters=5, skh=False: torch.linalg.matrix_norm(torch.nan_to_num(a), ord=2),
    )
    # quad_torch creates L and Q in the default dtype.
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield package
    torch.set_default_dtype(before)
    patch.undo()


@pytest.mark.peer
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["QUAD", "Procrustes"])
def test_step_by_step(original, name, options):
    """Use nine shapes in one group, gradients over two orders of magnitude, a burst, and two balancings."""
    draw = torch.Generator().manual_seed(0)

    def gaussian(shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    theirs = [torch.nn.Parameter(gaussian(shape)) for shape in SHAPES]
    ours = [torch.nn.Parameter(p.detach().clone()) for p in theirs]
    steps = [
        getattr(original, name)(theirs, lr=0.01, noise_scale=0.0, **options).step,
        KINDS[name.lower()](ours, lr=0.01, noise_scale=0.0, norm="exact", literal=True, **options).step,
    ]
    worst = 0.0
    for t in range(210):
        for one, other in zip(theirs, ours, strict=True):
            spread = torch.logspace(-3, -1, max(1, one.numel()), dtype=torch.float64).reshape(one.shape)
            one.grad = gaussian(one.shape) * spread * (10 if t == 30 else 1)
            other.grad = one.grad.clone()
        for step in steps:
            step()
        for one, other in zip(theirs, ours, strict=True):
            worst = max(worst, float((one - other).detach().abs().max() / other.detach().abs().max()))
    print(f"{name} {options}: {worst:.1e}")
    assert worst < TOLERANCE


@pytest.mark.peer
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["QUAD", "Procrustes"])
def test_its_checkpoint_goes_on_here(original, name, options):
    draw = torch.Generator().manual_seed(0)

    def gaussian(shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    theirs = [torch.nn.Parameter(gaussian(shape)) for shape in SHAPES]
    original_optimizer = getattr(original, name)(theirs, lr=0.01, noise_scale=0.0, **options)
    ours: list[torch.nn.Parameter] = []
    steps = [original_optimizer.step]
    for t in range(120):
        if t == 30:
            file = io.BytesIO()
            torch.save(original_optimizer.state_dict(), file)
            file.seek(0)
            ours = copy.deepcopy(theirs)
            optimizer = KINDS[name.lower()](ours, norm="exact", literal=True)
            optimizer.load_state_dict(torch.load(file, weights_only=True))
            steps.append(optimizer.step)
        for index, one in enumerate(theirs):
            one.grad = gaussian(one.shape) * 10.0 ** (index % 3 - 2)
            if ours:
                ours[index].grad = one.grad.clone()
        for step in steps:
            step()
        for one, other in zip(theirs, ours, strict=False):
            assert float((one - other).detach().abs().max() / one.detach().abs().max()) < TOLERANCE
