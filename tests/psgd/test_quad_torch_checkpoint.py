"""quad_torch's checkpoints go on here: its lists of whole factors become factors over a scale, P the same.

The original is played by the reference in numpy, its state laid out as quad_torch's; test_against_quad_torch
does the same with the package itself, where it is at hand.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import steepest
from reference.psgd import PSGD
from steepest.views import rows

from .fitting import KINDS, preconditioners, relative
from .test_reference import SHAPES, gradients

TOLERANCE = 1e-10
BEFORE, AFTER = 25, 85  # beyond the first balancing, in step 100


def quad_torch_state(original, dtype=torch.float64):
    """A parameter's state as quad_torch keeps it; numpy's whole factors are its own."""
    return {
        "step": torch.tensor(original.t, dtype=torch.int32),
        "momentum_buffer": torch.tensor(original.m.reshape(original.p.shape), dtype=dtype),
        "merged_shape": tuple(original.shape) if original.p.ndim else (),
        "Q": [
            torch.tensor(q.reshape(original.p.shape if original.p.ndim == 0 else q.shape), dtype=dtype)
            for q in original.q
        ],
        "L": [torch.tensor(bound, dtype=dtype) for bound in original.bounds],
        "diag": [not dense for dense in original.dense],
    }


def quad_torch_group(count, **options):
    """A param group as quad_torch has it."""
    return {
        "lr": 0.02,
        "lr_style": "adam",
        "momentum": 0.9,
        "weight_decay": 0.1,
        "max_size_dense": 16384,
        "max_skew_dense": 1.0,
        "preconditioner_lr": 0.7,
        "preconditioner_init_scale": None,
        "noise_scale": 0.0,
        "dtype": None,
        "do_init": False,
        **options,
        "params": list(range(count)),
    }


def train(kind, shapes, steps=BEFORE, **options):
    """References of these shapes after some steps, and the state dict that quad_torch would have saved."""
    known = {
        name: value
        for name, value in quad_torch_group(0, **options).items()
        if name not in ("noise_scale", "dtype", "do_init", "params")
    }
    originals = []
    for shape in shapes:
        start = np.random.default_rng(1).normal(size=shape)
        original = PSGD(kind, start, literal=True, **known)
        for gradient in gradients(shape, steps):
            original.step(gradient.numpy())
        originals.append(original)
    saved = {
        "state": {at: quad_torch_state(original) for at, original in enumerate(originals)},
        "param_groups": [quad_torch_group(len(shapes), **options)],
    }
    return originals, saved


def here(kind, originals, dtype=torch.float64, **options):
    params = [torch.nn.Parameter(torch.tensor(original.p, dtype=dtype)) for original in originals]
    # Other options than the checkpoint's, which must win.
    return params, KINDS[kind](params, lr=7.0, momentum=0.1, norm="exact", **options)


@pytest.mark.parametrize(
    "options", [{}, {"max_skew_dense": float("inf")}, {"max_size_dense": 3}, {"lr_style": None}], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
def test_it_goes_on_here_as_there(kind, options):
    originals, saved = train(kind, SHAPES, **options)
    kept = copy.deepcopy(saved)
    params, optimizer = here(kind, originals, literal=True)
    optimizer.load_state_dict(saved)
    assert str(saved) == str(kept), "the state dict that was given is as it was"
    assert "do_init" not in optimizer.param_groups[0]
    for param, original in zip(params, originals, strict=True):
        state = optimizer.state[param]
        assert (float(state["step"]), float(state["scale"])) == (BEFORE, 1.0)
        for ours, theirs in zip(literal_ones(optimizer, param), original.preconditioners(), strict=True):
            assert relative(ours, torch.tensor(theirs)) < 1e-14
    draws = [list(gradients(shape, BEFORE + AFTER))[BEFORE:] for shape in SHAPES]
    for step in range(AFTER):
        for param, original, draw in zip(params, originals, draws, strict=True):
            param.grad = draw[step]
            original.step(draw[step].numpy())
        optimizer.step()
        for param, original in zip(params, originals, strict=True):
            assert relative(param.detach(), torch.tensor(original.p)) < TOLERANCE
    again = here(kind, originals, literal=True)[1]
    again.load_state_dict(optimizer.state_dict())
    assert str(again.state_dict()) == str(optimizer.state_dict())


def literal_ones(optimizer, param):
    """P of each side as the optimizer makes it with ``literal=True``: Q Q."""
    state = optimizer.state[param]
    whole = [state["scale"] * state[name] for name in ("Q", "Q_left", "Q_right") if name in state]
    return [q @ q if q.dim() == 2 else torch.diag(q * q) for q in whole]


def test_quads_p_is_the_same_whatever_literal_says():
    originals, saved = train("quad", SHAPES)
    params, optimizer = here("quad", originals, update_probability=0.5)
    optimizer.load_state_dict(saved)
    for param, original in zip(params, originals, strict=True):
        for ours, theirs in zip(preconditioners(optimizer, param), original.preconditioners(), strict=True):
            assert relative(ours, torch.tensor(theirs)) < 1e-14
    optimizer.param_groups[0]["lr"] = 0.0
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    kept = optimizer.state[params[0]]
    torch.testing.assert_close(kept["P_left"], kept["Q_left"] @ kept["Q_left"], rtol=1e-12, atol=0)


def refuses(optimizer, saved, words):
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(saved)
    assert str(optimizer.state_dict()) == str(before)


def test_procrustes_p_is_another_without_literal():
    """Q Q there, QᵀQ here: of one symmetric Q or a diagonal one the same, of others not."""
    originals, saved = train("procrustes", [(6, 6)])
    refuses(here("procrustes", originals)[1], saved, "quad_torch's: its P is Q Q, .* made with literal=True")
    refuses(here("quad", originals, literal=True)[1], saved, "a Q is not symmetric, so it is Procrustes'")
    for shapes, options in ([(5,), (1, 7)], {}), ([(6, 6), (4, 9)], {"max_size_dense": 3}):
        originals, saved = train("procrustes", shapes, **options)
        params, optimizer = here("procrustes", originals)
        optimizer.load_state_dict(saved)
        for param, original in zip(params, originals, strict=True):
            for ours, theirs in zip(
                preconditioners(optimizer, param), original.preconditioners(), strict=True
            ):
                assert relative(ours, torch.tensor(theirs)) < 1e-14


def test_its_release_on_the_package_index_has_two_options_less():
    originals, saved = train("quad", [(5,)])
    for name in ("preconditioner_init_scale", "do_init"):
        del saved["param_groups"][0][name]
    _, optimizer = here("quad", originals, preconditioner_init_scale=0.5)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["preconditioner_init_scale"] == 0.5


def test_dense_factors_keep_their_dtype_and_the_rest_is_float32_at_least():
    originals, saved = train("quad", [(4, 9)])
    saved["state"][0] = quad_torch_state(originals[0], torch.bfloat16)
    params, optimizer = here("quad", originals, torch.bfloat16)
    optimizer.load_state_dict(saved)
    state = optimizer.state[params[0]]
    assert {name: value.dtype for name, value in state.items()} == {
        "momentum_buffer": torch.bfloat16,
        "step": torch.float64,
        "scale": torch.float32,
        "Q_left": torch.bfloat16,
        "L_left": torch.float32,
        "Q_right": torch.float32,
        "L_right": torch.float32,
    }
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert params[0].isfinite().all()


def test_factors_of_another_shape_are_refused():
    originals, saved = train("quad", [(4, 9)])
    saved["param_groups"][0]["max_size_dense"] = 3
    refuses(here("quad", originals)[1], saved, r"'Q_left' .* has shape \(4, 4\) .* and \(4,\) here")
    originals, saved = train("quad", [(4, 9)])
    saved["state"][0]["L"].pop()
    refuses(here("quad", originals)[1], saved, "it has 2 factors Q and 1 bounds L")


def test_a_whole_matrix_s_factors_do_not_serve_its_blocks():
    originals, saved = train("quad", [(4, 9)])
    param = torch.nn.Parameter(torch.tensor(originals[0].p))
    optimizer = steepest.QUAD([("qkv", param)], views={"qkv": rows(2, 2)})
    refuses(optimizer, saved, "parameter 'qkv' .*has 'Q_left'.*, which 'quad' does not know")
