"""How well sign memories know the mean's sign, before and after it reverses.

Figures measured elsewhere: 0.80/0.78 for Simba-leaky, 0.82/0.32 for Simba, 0.81/0.78 for Signum. Their
set-up is not known; with the one below (whose means are chosen so that Signum's first figure comes out)
they are 0.81/0.76, 0.80/0.38 and 0.81/0.76.
"""

import pytest
import torch

from steepest import Signum, Simba, SimbaLeaky

NUMEL, REVERSAL = 3000, 400


def agreement(make):
    """How often p moves against the true mean's sign: (before the reversal, after it).

    Each coordinate has a mean of its own, N(0, 0.105²), under unit noise; after 400 steps every mean
    changes sign. Counted over the last 100 steps before, and over steps 100 to 400 after.
    """
    generator = torch.Generator().manual_seed(0)
    mean = 0.105 * torch.randn(NUMEL, generator=generator)
    param = torch.nn.Parameter(torch.zeros(NUMEL))
    optimizer = make([param])
    before, after = [], []
    for t in range(2 * REVERSAL):
        if t == REVERSAL:
            mean = -mean
        param.grad = mean + torch.randn(NUMEL, generator=generator)
        last = param.detach().clone()
        optimizer.step()
        agrees = float(((last - param.detach()).sign() == mean.sign()).float().mean())
        if REVERSAL - 100 <= t < REVERSAL:
            before.append(agrees)
        elif t >= REVERSAL + 100:
            after.append(agrees)
    return sum(before) / len(before), sum(after) / len(after)


@pytest.mark.parametrize(
    ("make", "figures"),
    [
        (lambda params: SimbaLeaky(params, lr=1.0, leak=0.01), (0.80, 0.78)),
        (lambda params: Simba(params, lr=1.0), (0.82, 0.32)),
        (lambda params: Signum(params, lr=1.0, momentum=0.99), (0.81, 0.78)),
    ],
    ids=["simba_leaky", "simba", "signum"],
)
def test_agreement_with_the_means_sign(make, figures):
    assert agreement(make) == pytest.approx(figures, abs=0.07)


def test_on_pure_noise_a_counter_is_uniform_and_mostly_decides():
    # A clamped random walk: only 5 of its 41 values leave the choice to the gradient.
    param = torch.nn.Parameter(torch.zeros(4000))
    optimizer = Simba([param], lr=1.0, window_size=20, threshold=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1500):
        param.grad = torch.randn(4000, generator=generator)
        optimizer.step()
    counts = optimizer.state[param]["counts"].long()
    found = torch.bincount(counts + 20, minlength=41).double()
    chi_square = float(((found - 4000 / 41) ** 2 / (4000 / 41)).sum())
    assert chi_square < 40 + 5 * (2 * 40) ** 0.5
    assert float((counts.abs() > 2).double().mean()) == pytest.approx(36 / 41, abs=0.03)
