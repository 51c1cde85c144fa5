"""A shadow measures exactly what candidates would do, and leaves the run as it found it."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import Parameter

import steepest
from steepest.lab.models import GPTConfig
from steepest.lab.seeding import infinite_batches, seeded
from steepest.lab.tasks import text_task

RULES = [name for name in steepest.list_optimizers() if name not in ("orthogonalized", "ternary_flip")]
STEPS = 12


def text():
    task = text_task(model=GPTConfig(width=16, depth=1, heads=2, context=16), eval_bytes=64)
    with seeded(0):
        return task, task.make(0)


def flat(value):
    """All tensors and numbers in a state dict."""
    if isinstance(value, dict):
        return [leaf for key in value for leaf in flat(value[key])]
    return [leaf for each in value for leaf in flat(each)] if isinstance(value, (list, tuple)) else [value]


def same(one, other):
    return len(one) == len(other) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("running", ["adamw", "lion", "muon"])
def test_a_run_with_a_shadow_is_the_run_without(running):
    ends = []
    for candidates in ([], [name for name in RULES if name != running]):
        torch.manual_seed(7)
        model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
        model = model.to(torch.bfloat16)
        optimizer = steepest.build(
            model, running, weight_decay=0.1, rounding="stochastic", state_dtype="int8"
        )
        shadowed = steepest.shadow(optimizer, candidates) if candidates else None
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(5, 6, dtype=torch.bfloat16)).float().square().mean().backward()
            optimizer.step()
        grads = [param.grad for param in model.parameters()]
        ends.append(
            flat(
                [
                    list(model.parameters()),
                    grads,
                    optimizer.state_dict(),
                    torch.get_rng_state(),
                    random_words(),
                ]
            )
        )
        assert shadowed is None or len(shadowed.report().rows) > len(candidates)
    assert same(*ends)


def random_words():
    return torch.rand(3)


def test_at_the_reported_learning_rates_every_rule_moves_every_role_as_far_on_the_text_task():
    """Candidates built by hand replay the gradients."""
    task, model = text()
    optimizer = steepest.build(model, "adamw", lr=2e-3, weight_decay=0.1)
    shadowed = steepest.shadow(optimizer, RULES)
    batches = infinite_batches(task, 0)
    history = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        task.loss(model, next(batches)).backward()
        named = dict(model.named_parameters())
        before = {name: param.detach().clone() for name, param in named.items()}
        grads = {name: param.grad.clone() for name, param in named.items()}
        optimizer.step()
        history.append((before, grads, {name: param.detach().clone() for name, param in named.items()}))
    report = shadowed.report(last=4)
    kinds = {row.name: (row.kind, row.weight_decay) for row in optimizer.explain().rows}
    assert {row.candidate for row in report.rows} == set(RULES)
    for row in report.rows:
        names = [name for name, (kind, _) in kinds.items() if kind == row.role]
        ours = theirs = 0.0
        copies = {name: Parameter(history[0][0][name].clone()) for name in names}
        candidate = steepest.create(row.candidate, copies.items(), lr=row.lr, weight_decay=0.0)
        for step, (before, grads, after) in enumerate(history):
            for name in names:
                if row.candidate != "hyperball":  # it stays on its sphere
                    copies[name].data.copy_(before[name])
                copies[name].grad = grads[name]
            starts = {name: each.detach().clone() for name, each in copies.items()}
            candidate.step()
            if step >= STEPS - 4:
                for name in names:
                    theirs += (copies[name] - starts[name]).double().square().sum().item()
                    undecayed = after[name] - before[name] * (1 - 2e-3 * kinds[name][1])
                    ours += undecayed.double().square().sum().item()
        tolerance = 0.1 if row.candidate == "hyperball" else 2e-3  # its steps bend around the sphere
        assert math.sqrt(theirs / ours) == pytest.approx(1, rel=tolerance), row


@pytest.mark.parametrize("method", ["decoupled", "independent", "untied", "palm", "sign", "cautious"])
def test_weight_decay_is_taken_out(method):
    weight = Parameter(torch.tensor([3.0, -4.0, 2.0, 1.0]))
    optimizer = steepest.SGD([weight], lr=0.5, weight_decay=0.3, weight_decay_method=method)
    optimizer.param_groups[0]["lr"] = 0.25  # not where independent decay started
    gradient = torch.tensor([0.6, 0.8, -0.1, 0.2])
    with steepest.shadow(optimizer, ["signgsd"]) as shadowed:
        weight.grad = gradient
        optimizer.step()
    (row,) = shadowed.report().rows
    assert row.multiplier == pytest.approx(gradient.square().mean().sqrt().item(), rel=1e-5)
    shrinks = {
        "independent": 0.3 * 0.25 / 0.5, "untied": 0.3, "palm": 0.3 * 0.25**2,
    }.get(method, 0.3 * 0.25)  # fmt: skip
    assert row.lr * row.weight_decay == pytest.approx(shrinks)


def test_gradients_with_weight_decay_in_them_have_none_to_translate():
    weight = Parameter(torch.tensor([1.0]))
    optimizer = steepest.SGD([weight], lr=0.5, weight_decay=1.0)
    with steepest.shadow(optimizer, ["lion", "sgd"]) as shadowed:
        weight.grad = torch.tensor([2.0])
        optimizer.step()
    lion, sgd = shadowed.report().rows
    assert (lion.lr, sgd.lr) == pytest.approx((1.5, 0.75))  # 2 + λ·1, where a candidate sees 2
    assert math.isnan(lion.weight_decay)


def test_a_schedule_changes_the_learning_rate_and_not_the_multiplier():
    weight = Parameter(torch.zeros(4))
    optimizer = steepest.SGD([weight], lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [1, 0, 0.25][step])
    shadowed = steepest.shadow(optimizer, "lion")
    for _ in range(2):
        weight.grad = torch.full((4,), 3.0)
        optimizer.step()
        schedule.step()
    (row,) = shadowed.report(last=2).rows  # the second step had no learning rate and does not count
    assert (row.multiplier, row.lr) == (pytest.approx(3), pytest.approx(3 * 0.125))


def test_matrix_rules_get_hidden_matrices_cut_as_the_running_rule_cuts_them():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.out = nn.MultiheadAttention(8, 2), nn.Linear(8, 4)

    torch.manual_seed(0)
    model = Attention()
    optimizer = steepest.build(model, "muon", lr=0.1)
    others = {"rule": "muon", "views": {"attention.in_proj_weight": None}}
    with steepest.shadow(optimizer, ["muon", others, "adamw"]) as shadowed:
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        optimizer.step()
    rows = {(row.candidate, row.role): row for row in shadowed.report().rows}
    assert {role for candidate, role in rows if candidate == "muon"} == {"attention", "linear"}
    assert {role for candidate, role in rows if candidate == "adamw"} == {
        "attention",
        "linear",
        "bias",
        "output",
    }
    assert rows["muon", "attention"].multiplier == pytest.approx(1, rel=1e-4)
    whole = rows["muon views={'attention.in_proj_weight': None}", "attention"].multiplier
    assert whole != pytest.approx(1, rel=1e-2)


def test_state_bytes_are_those_of_an_optimizer_of_the_candidate():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 4))
    optimizer = steepest.build(model, "adamw")
    with steepest.shadow(
        optimizer, ["procrustes", {"rule": "lion", "state_dtype": torch.bfloat16}]
    ) as shadowed:
        model(torch.randn(3, 6)).sum().backward()
        optimizer.step()
    rows = shadowed.report().rows
    for name in ("procrustes", "lion"):
        twin = steepest.create(name, copy.deepcopy(model).parameters())
        for copied, param in zip(twin.param_groups[0]["params"], model.parameters(), strict=True):
            copied.grad = param.grad
        twin.step()
        expected = twin.state_bytes() // (2 if name == "lion" else 1)
        assert sum(row.state_bytes for row in rows if row.candidate.split()[0] == name) == expected
    assert (
        sum(row.running_state_bytes for row in rows if row.candidate == "procrustes")
        == optimizer.state_bytes()
    )


def test_gradients_may_be_missing_come_from_a_closure_or_be_skipped():
    used, unused = Parameter(torch.zeros(3)), Parameter(torch.zeros(2, 2))
    optimizer = steepest.SGD([used, unused], lr=0.5, nonfinite="skip")
    shadowed = steepest.shadow(optimizer, ["lion"])

    gradients = iter((2.0, math.inf, 2.0))

    def closure():
        used.grad = torch.full((3,), next(gradients))
        return 0.0

    for _ in range(3):
        optimizer.step(closure)
    rows = {row.role: row for row in shadowed.report(last=3).rows}
    assert rows["vector"].lr == pytest.approx(1)
    assert math.isnan(rows["matrix"].lr)
    assert optimizer.skipped_steps == 1


def test_once_removed_it_measures_no_more():
    weight = Parameter(torch.zeros(2))
    optimizer = steepest.SGD([weight], lr=1.0)
    with steepest.shadow(optimizer, ["lion"]) as shadowed:
        weight.grad = torch.tensor([2.0, 2.0])
        optimizer.step()
    weight.grad = torch.tensor([9.0, 9.0])
    optimizer.step()
    assert (shadowed.report().rows[0].lr, shadowed.report().steps) == (pytest.approx(2), 1)
    header, _, line = str(shadowed.report()).splitlines()
    assert header.split() == [
        "candidate",
        "role",
        "group",
        "lr",
        "×",
        "lr",
        "decay",
        "parameters",
        "state",
        "now",
    ]
    assert line.split()[:6] == ["lion", "vector", "0", "2", "2", "0"]


def test_ternary_weights_are_left_out():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 4))
    steepest.ternary.ternarize(model)
    optimizer = steepest.build(model, "adamw")
    with steepest.shadow(optimizer, ["lion"]) as shadowed:
        model(torch.randn(2, 64)).square().sum().backward()
        optimizer.step()
    assert {row.role for row in shadowed.report().rows} == {"bias", "gain", "output"}


@pytest.mark.parametrize(
    ("candidates", "error", "words"),
    [
        ([], ValueError, "needs a candidate"),
        (["loin"], ValueError, "did you mean 'lion'"),
        ([3], TypeError, "a rule's name or a dict"),
        ([{"momentum": 0.9}], ValueError, "names no rule"),
        ([{"rule": "lion", "lr": 0.1}], ValueError, "leave lr out"),
        ([{"rule": "lion", "weight_decay": 0.1}], ValueError, "leave weight_decay out"),
        ([{"rule": "lion", "beta": 0.1}], TypeError, "did you mean 'betas'"),
        ([{"rule": "lion", "betas": (2, 0)}], ValueError, "betas must be"),
        (["muon"], ValueError, "takes none"),
    ],
)
def test_errors_come_before_anything_is_hooked(candidates, error, words):
    optimizer = steepest.SGD([Parameter(torch.zeros(2))], lr=1.0)
    with pytest.raises(error, match=words):
        steepest.shadow(optimizer, candidates)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_other_errors_say_what_to_do():
    with pytest.raises(TypeError, match=r"an optimizer of steepest, got torch.optim.sgd.SGD"):
        steepest.shadow(torch.optim.SGD([Parameter(torch.zeros(2))], lr=1.0), ["lion"])
    shadowed = steepest.shadow(steepest.SGD([Parameter(torch.zeros(2))], lr=1.0), ["lion"])
    with pytest.raises(ValueError, match="before the optimizer's first step"):
        shadowed.report()
