"""SOAP follows its equations step by step, and Shampoo where the two are one."""

import numpy as np
import pytest
import torch

from loops import for_each
from reference import soap
from steepest import SOAP, AdamW
from steepest.rules import SOAPRule

STEPS = 25


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def gradients(*shape, steps=STEPS):
    """Of full rank, and of another size in each row and column, so that no two eigenvalues are close."""
    scale = np.logspace(-1, 1, num=int(np.prod(shape))).reshape(shape)
    return [scale * (gaussian(*shape, seed=t) + 0.3) for t in range(steps)]


def parameter(values, dtype=torch.float64):
    return torch.nn.Parameter(torch.tensor(values).to(dtype))


def run(grads, start=None, dtype=torch.float64, **options):
    """(the optimizer, the parameter, what each step subtracted)."""
    start = np.zeros(grads[0].shape) if start is None else start
    param, moves = parameter(start, dtype), []
    optimizer = SOAP([param], **{"lr": 1.0, "weight_decay": 0.0, **options})
    for g in grads:
        before = param.detach().clone()
        param.grad = torch.tensor(g).to(dtype)
        optimizer.step()
        moves.append((before - param.detach()).double().numpy())
    return optimizer, param, moves


def take_bases(state, expected):
    """Let the reference begin with the optimizer's bases, once they are found to be eigenbases.

    Signs are free, and so is the basis of the null space that the first gradient leaves to the longer side.
    """
    for at, side in enumerate(("left", "right")):
        if f"Q_{side}" not in state:
            continue
        q, moment = state[f"Q_{side}"].double().numpy(), expected.moments[at]
        scale = np.abs(moment).max()
        spectrum = q.T @ moment @ q
        np.testing.assert_allclose(q.T @ q, np.eye(len(q)), atol=1e-6)
        np.testing.assert_allclose(spectrum, np.diag(np.linalg.eigvalsh(moment)[::-1]), atol=1e-6 * scale)
        expected.bases[at] = q.copy()


@for_each("shape", [(6, 6), (4, 7), (9, 5), (8,)])
@for_each(
    "options",
    [
        {},
        {"precondition_frequency": 1},
        {"precondition_frequency": 3, "betas": (0.8, 0.99), "shampoo_beta": 0.7, "eps": 1e-3},
        {"betas": (0.0, 0.5), "precondition_frequency": 2, "weight_decay": 0.0},
        {"max_precond_dim": 6, "precondition_frequency": 2},
        {"max_precond_dim": 0},
    ],
)
def test_it_follows_the_reference(options, shape):
    start, grads = gaussian(*shape, seed=99), gradients(*shape)
    options = {"lr": 1e-2, "weight_decay": 0.1, **options}
    param, expected = parameter(start), soap.SOAP(start, **options)
    optimizer = SOAP([param], **options)
    for t, g in enumerate(grads):
        param.grad = torch.tensor(g)
        optimizer.step()
        expected.step(g)
        if t == 0:
            take_bases(optimizer.state[param], expected)
        np.testing.assert_allclose(
            param.detach().numpy(), expected.p, rtol=1e-9, atol=1e-9, err_msg=f"step {t}"
        )
        state = optimizer.state[param]
        np.testing.assert_allclose(state["exp_avg"].numpy(), expected.m, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(state["exp_avg_sq"].numpy(), expected.v, rtol=1e-7, atol=1e-9)
        for side, moment in zip(("left", "right"), expected.moments, strict=False):
            assert (f"GG_{side}" in state) == (moment is not None)
            if moment is not None:
                np.testing.assert_allclose(state[f"GG_{side}"].numpy(), moment, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_lower_precision_it_stays_near_the_reference(dtype):
    options = {"lr": 1e-2, "weight_decay": 0.0, "precondition_frequency": 2}
    param, expected = parameter(np.zeros((6, 5)), dtype), soap.SOAP(np.zeros((6, 5)), **options)
    optimizer = SOAP([param], state_dtype=torch.float32, **options)
    for t, g in enumerate(gradients(6, 5)):
        param.grad = torch.tensor(g).to(dtype)
        optimizer.step()
        expected.step(param.grad.double().numpy())
        if t == 0:
            take_bases(optimizer.state[param], expected)
    # L's eigenvalues span four decades, whose ends float32 knows to 1e-3. bfloat16 rounds each step.
    tolerance = 1e-3 if dtype == torch.float32 else STEPS * 2**-9
    error = np.abs(param.detach().double().numpy() - expected.p).max()
    assert error <= tolerance * np.abs(expected.p).max()


@pytest.mark.parametrize("shape", [(6, 6), (4, 7), (9, 5)])
def test_the_step_along_a_constant_gradient_is_shampoos(shape):
    """G = U diag(s) Vᵀ: the bases are U and V up to signs, and both move by sign(s) along them.

    Shampoo's L^(−¼) G R^(−¼), L = GGᵀ and R = GᵀG, is U s^(−½) s s^(−½) Vᵀ.
    """
    g = gaussian(*shape)
    u, s, vt = np.linalg.svd(g, full_matrices=False)
    optimizer, param, moves = run([g] * 8, eps=1e-9, precondition_frequency=3)
    state = optimizer.state[param]
    for side, vectors in (("left", u), ("right", vt.T)):
        overlap = np.abs(state[f"Q_{side}"].numpy()[:, : len(s)].T @ vectors)
        np.testing.assert_allclose(overlap, np.eye(len(s)), atol=1e-9)
    shampoo = u @ np.diag(s**-0.5 * s * s**-0.5) @ vt
    assert not moves[0].any()
    for move in moves[1:]:
        np.testing.assert_allclose(move, shampoo, atol=1e-5)


def test_with_exact_bases_the_second_moments_are_those_of_the_rotated_gradient():
    """So Adam in the eigenbasis divides by the spectrum that Shampoo takes from L and R."""
    u, _, vt = np.linalg.svd(gaussian(5, 5))
    drawn = [np.exp(gaussian(5, seed=t)) for t in range(40)]
    beta = 0.9
    optimizer, param, _ = run(
        [u @ np.diag(s) @ vt for s in drawn], betas=(0.9, beta), precondition_frequency=1
    )
    state = optimizer.state[param]
    spectrum = np.zeros(5)
    for t, s in enumerate(drawn):
        spectrum = beta * spectrum + (1 - beta) * s**2
        if t == 0:
            first = (1 - beta) * s**2 * beta ** (len(drawn) - 1)
    for side in ("left", "right"):
        found = np.linalg.eigvalsh(state[f"GG_{side}"].numpy())
        np.testing.assert_allclose(found, np.sort(spectrum), rtol=1e-10)
    # v leaves the first gradient out.
    v = state["exp_avg_sq"].numpy()
    np.testing.assert_allclose(np.sort(v.max(0)), np.sort(spectrum - first), rtol=1e-8)


@pytest.mark.parametrize(("shape", "largest"), [((6, 6), 6), ((8, 5), 5), ((5, 8), 5)])
def test_an_orthogonal_change_of_coordinates_turns_every_update(shape, largest):
    """On the rotated sides: the others, on which the first gradient has a null space, keep theirs."""
    u, v = (np.linalg.qr(gaussian(s, s, seed=7))[0] if s <= largest else np.eye(s) for s in shape)
    plain = gradients(*shape)
    options = {"precondition_frequency": 2, "max_precond_dim": largest}
    _, _, one = run(plain, **options)
    _, _, other = run([u @ g @ v.T for g in plain], **options)
    for t, (a, b) in enumerate(zip(one, other, strict=True)):
        np.testing.assert_allclose(u @ a @ v.T, b, atol=1e-6, err_msg=f"step {t}")


def test_without_rotated_sides_it_is_adam_from_the_second_step_on():
    grads = gradients(6, 5)
    _, _, moves = run(grads, max_precond_dim=0, betas=(0.9, 0.99), lr=0.5)
    twin = parameter(np.zeros((6, 5)))
    adam = AdamW([twin], lr=0.5, betas=(0.9, 0.99), weight_decay=0.0)
    for g, move in zip(grads[1:], moves[1:], strict=True):
        before = twin.detach().clone()
        twin.grad = torch.tensor(g)
        adam.step()
        np.testing.assert_allclose(move, (before - twin.detach()).numpy(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(12, 2), (2, 12), (3, 4, 2, 2)])
def test_bases_stay_orthonormal_where_the_gradients_have_low_rank(shape):
    optimizer, param, moves = run(gradients(*shape, steps=60), dtype=torch.float32, precondition_frequency=1)
    for side in ("left", "right"):
        q = optimizer.state[param][f"Q_{side}"]
        torch.testing.assert_close(q.mT @ q, torch.eye(len(q)), atol=1e-5, rtol=0)
    assert np.isfinite(moves).all()


def test_a_gradient_that_is_not_finite_makes_no_basis_of_it():
    param = parameter(np.ones((4, 3)), torch.float32)
    optimizer = SOAP([param])
    param.grad = torch.full((4, 3), torch.nan)
    optimizer.step()
    q = optimizer.state[param]["Q_left"]
    torch.testing.assert_close(q.mT @ q, torch.eye(4))


def test_scalars_are_the_same_where_only_the_device_knows_the_step():
    def scalars(step):
        return SOAPRule().scalars(step, betas=(0.9, 0.95), precondition_frequency=3)

    count = torch.arange(1.0, 11.0, dtype=torch.float64)
    on_host, on_device = [scalars(float(step)) for step in count], scalars(count)
    for name, values in on_device.items():
        expected = torch.tensor([numbers[name] for numbers in on_host], dtype=values.dtype)
        torch.testing.assert_close(values, expected, rtol=1e-14, atol=0)
    assert [t for t, numbers in enumerate(on_host, 1) if numbers["renew"]] == [4, 7, 10]
