"""What cannot apply to a rule is stated with its reason in ``cases.cannot``, and true; the rest applies."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import Parameter
from torch.optim.lr_scheduler import OneCycleLR

import steepest
from loops import for_each

from .cases import CASES, LR, PECULIAR, RULES, Case, able, by_id
from .recording import Recorded
from .training import gradient, identical, make_params, set_gradients, train

# The base of the orthogonalized family says that it is an identity until it is told what to do.
pytestmark = pytest.mark.filterwarnings("ignore:.*the momentum is used as it is:UserWarning")


def _error_of(attempt: Callable[[], object]) -> str | None:
    try:
        attempt()
    except ValueError as error:
        return str(error)
    return None


def _refuses(case: Case, param: Parameter, words: str) -> bool:
    """Whether the constructor, a group and an added group refuse the parameter by its name."""
    made = steepest.Optimizer([("fine", case.params()[0])], rule=case.name, lr=LR)
    attempts: list[Callable[[], object]] = [
        lambda: case.make([("fine", case.params()[0]), ("odd", param)]),
        lambda: steepest.Optimizer([{"params": [("odd", param)], "rule": case.name}], rule="adamw"),
        lambda: made.add_param_group({"params": [("odd", param)]}),
    ]
    errors = [_error_of(attempt) for attempt in attempts]
    refused = errors[0] is not None
    assert len(made.param_groups) == 1 + (not refused), "nothing is added"
    for error in errors:
        assert refused == (error is not None)
        assert error is None or ("parameter 'odd'" in error and words in error)
    return refused


def _no_complex(case: Case) -> bool:
    return _refuses(case, Parameter(torch.ones(4, 3, dtype=torch.complex64)), "complex")


def _no_vectors(case: Case) -> bool:
    vectors = [Parameter(torch.ones(shape)) for shape in ((), (1,), (5,), (0,))]
    refused = [_refuses(case, vector, "takes matrices") for vector in vectors]
    assert len(set(refused)) == 1
    return refused[0]


def _no_zeros(case: Case) -> bool:
    return _refuses(case, Parameter(torch.zeros(4, 3)), "is zero")


def _no_weight_decay(case: Case) -> bool:
    made = steepest.create(case.name, case.params(), weight_decay=0.0)
    error = _error_of(lambda: steepest.create(case.name, case.params(), weight_decay=0.1))
    added = _error_of(lambda: made.add_param_group({"params": case.params(), "weight_decay": 0.1}))
    assert (error is None) == (added is None)
    assert error is None or "weight_decay must be 0" in error
    assert added is None or "group 1: weight_decay must be 0" in added
    return error is not None


def _no_cycled_momentum(case: Case) -> bool:
    params = case.params()
    optimizer = case.make(params)
    OneCycleLR(optimizer, max_lr=0.1, total_steps=4, base_momentum=0.25, max_momentum=0.375)
    set_gradients(params, 0)
    optimizer.step()
    options = [optimizer.param_groups[0][name] for name in case.rule.hyper]
    return not any(0.375 in option if isinstance(option, tuple) else option == 0.375 for option in options)


def _no_independent_decay(case: Case) -> bool:
    optimizer = case.make(case.params(), weight_decay_method="independent")
    return bool(optimizer.param_groups[0]["weight_decay_method"] != "independent")


def _no_unknown_keywords(case: Case) -> bool:
    try:
        optimizer = case.make(case.params(), weight_decai=0.1)
    except TypeError:
        return False
    assert optimizer.param_groups[0]["weight_decai"] == 0.1
    return True


def _no_wide_products(case: Case) -> bool:
    """A bfloat16 parameter's step is not the float32 step rounded; with ``dtype=torch.float32`` it is."""

    def is_rounded(**options: object) -> bool:
        (param,), (wide,) = (make_params(torch.bfloat16, shapes=[(32, 32)]) for _ in range(2))
        wide = Parameter(wide.detach().float())
        optimizer, oracle = (case.make([some], lr=1.0, **options) for some in (param, wide))
        param.grad = gradient(param, 0, 0)
        wide.grad = param.grad.float()
        optimizer.step()
        oracle.step()
        return identical(param.detach(), wide.detach().bfloat16())

    assert is_rounded(**case.wide(torch.bfloat16))
    return not is_rounded()


def _no_infinite_weights(case: Case) -> bool:
    answers = []
    for value in (torch.inf, torch.finfo(torch.float32).max):
        param = Parameter(torch.full((4, 3), value))
        optimizer = case.make([param], weight_decay=0.0)
        param.grad = torch.zeros_like(param)
        optimizer.step()
        answers.append(param.detach().isnan().all().item())
    assert len(set(answers)) == 1
    return answers[0]


def _no_quiet_steps(case: Case) -> bool:
    params = case.params()
    optimizer = case.make(params, lr=torch.tensor(LR), capturable=True, compile=False)
    train(optimizer, params, 5)
    set_gradients(params, 5)
    try:
        with Recorded([state[name] for state in optimizer.state.values() for name in case.tensor_state]):
            optimizer.step()
    except AssertionError as error:
        assert "the host reads a device's number" in str(error)  # noqa: PT017
        return True
    return False


PROBES: dict[str, Callable[[Case], bool]] = {
    "complex": _no_complex,
    "vectors": _no_vectors,
    "zeros": _no_zeros,
    "weight_decay": _no_weight_decay,
    "cycled momentum": _no_cycled_momentum,
    "independent decay": _no_independent_decay,
    "unknown keywords": _no_unknown_keywords,
    "wide products": _no_wide_products,
    "infinite weights": _no_infinite_weights,
    "quiet steps": _no_quiet_steps,
}


@for_each("what", PROBES)
@for_each("rule", RULES)
def test_the_table_says_what_is(rule: Case, what: str):
    assert PROBES[what](rule) == (what in rule.cannot)


def test_the_table_has_reasons_for_known_rules_and_nothing_else():
    assert set(PECULIAR) <= set(steepest.list_optimizers())
    for rule in RULES:
        assert set(rule.cannot) <= set(PROBES)
        assert all(len(reason.split()) > 2 for reason in rule.cannot.values())


@pytest.mark.parametrize("case", able(CASES, "vectors"), ids=by_id)
def test_a_vector_is_served_beside_matrices(case: Case):
    params = make_params(shapes=[(4, 3), (5,), (), (1,), (2, 3, 2)])
    before = [param.detach().clone() for param in params]
    after = train(case.make(params), params, 2)
    assert all(not torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_a_zero_matrix_is_taken_with_a_radius():
    """Its norm is then known; the first step gives it a direction."""
    (param,) = make_params(shapes=[(4, 3)])
    with torch.no_grad():
        param.zero_()
    train(Case("hyperball").make([param], radius=2.0), [param], 2)
    assert torch.linalg.matrix_norm(param.detach()).item() == pytest.approx(2.0, rel=1e-6)
