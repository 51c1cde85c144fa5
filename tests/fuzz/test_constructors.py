"""Constructors and groups of any arguments: an optimizer that steps, or a clear error before it exists."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import Parameter

import steepest
from steepest.rule import find_rule
from strategies import OWN, RULES

from .oracles import CLEAR, assert_clear
from .profile import cases

ANYTHING = st.one_of(
    st.floats(),
    st.integers(-3, 3),
    st.booleans(),
    st.none(),
    st.text(max_size=3),
    st.sampled_from(
        [1j, (), (0.9, 0.99), [0.5], (0.1, 0.2, 0.3), {}, torch.float32, torch.int8, "int8", "skip"]
    ),
    st.sampled_from(
        [torch.tensor(0.1), torch.ones(2), torch.tensor(torch.nan), torch.tensor(True), object()]
    ),
)
SHAPES = st.sampled_from([(), (0,), (3,), (4, 3), (2, 3, 2), (1, 1)])
DTYPES = st.sampled_from(
    [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.int32, torch.bool]
)


@st.composite
def params(draw: Any) -> Any:
    """What may be given as parameters, most often tensors."""
    kind = draw(
        st.sampled_from(["tensor"] * 8 + ["anything", "expanded", "sparse", "conj", "meta", "leafless"])
    )
    if kind == "anything":
        return draw(ANYTHING)
    value = torch.ones(draw(SHAPES), dtype=draw(DTYPES))
    if kind == "expanded":
        return Parameter(torch.ones(1).expand(4, 3))
    if kind == "sparse":
        return torch.ones(3, 3).to_sparse()
    if kind == "conj":
        return torch.ones(3, dtype=torch.complex64).conj()
    if kind == "meta":
        return Parameter(torch.ones(4, 3, device="meta"))
    if kind == "leafless":
        return Parameter(torch.ones(4, 3)) * 2
    return Parameter(value, requires_grad=value.is_floating_point() or value.is_complex())


@st.composite
def arguments(draw: Any) -> tuple[str, Any, dict[str, Any]]:
    """A rule's name, parameters or groups, and options."""
    name = draw(st.sampled_from(RULES))
    known = sorted(find_rule(name).defaults())
    own = {key: draw(value) for key, value in OWN.get(name, {}).items() if draw(st.booleans())}

    def options(most: int) -> dict[str, Any]:
        keys = st.one_of(st.sampled_from(known), st.sampled_from(["foreach", "beta", "rule", "params"]))
        return draw(st.dictionaries(keys, ANYTHING, max_size=most))

    tensors: Any = draw(st.lists(params(), max_size=3))
    form = draw(st.sampled_from(["list", "list", "named", "groups", "bare", "iterator", "anything"]))
    if form == "named":
        tensors = [(draw(st.one_of(st.text(max_size=2), st.integers())), each) for each in tensors]
    elif form == "groups":
        tensors = [{"params": [each], **options(1)} for each in tensors]
    elif form == "bare" and tensors:
        tensors = tensors[0]
    elif form == "iterator":
        tensors = iter(tensors)
    elif form == "anything":
        tensors = draw(ANYTHING)
    given_options = {**own, "compile": False, **options(2)}
    for reserved in ("rule", "params"):
        given_options.pop(reserved, None)
    return name, tensors, given_options


@cases(0.2, few=200)
@given(arguments())
def test_any_arguments(drawn: tuple[str, Any, dict[str, Any]]):
    name, tensors, options = drawn
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            optimizer = steepest.create(name, tensors, **options)
        except CLEAR as error:
            assert_clear(error)
            return
        taken = [param for group in optimizer.param_groups for param in group["params"]]
        for param in taken:
            if param.is_meta:
                param.requires_grad_(False)  # only frozen ones may be left there
        optimizer.step()  # what was taken can be stepped
        for param in taken:
            if param.is_leaf and not param.is_meta:
                param.grad = torch.ones_like(param)
        before = [param.detach().clone() for param in taken]
        try:
            optimizer.step()
        except CLEAR as error:
            assert_clear(error)
            assert all(a.is_meta or torch.equal(a.detach(), b) for a, b in zip(taken, before, strict=True))
