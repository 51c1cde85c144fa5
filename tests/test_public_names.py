"""Every public name is documented, and every optimizer with an example that runs."""

import doctest
import inspect
import re
from pathlib import Path

import pytest
import torch

import steepest
from loops import for_each
from steepest import compat
from steepest.registry import optimizer_class
from steepest.rule import find_rule

CLASSES = {optimizer_class(name) for name in steepest.list_optimizers()} | {
    getattr(compat, name) for name in compat.__all__
}


@for_each("name", steepest.__all__)
def test_has_a_docstring(name):
    thing = getattr(steepest, name)
    assert inspect.getdoc(thing)
    assert thing.__doc__, f"{name} has only an inherited docstring"
    if inspect.isclass(thing):
        for method, value in vars(thing).items():
            if not method.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
                assert value.__doc__, f"{name}.{method}"


def test_all_names_are_there_and_sorted_for_the_reader():
    assert len(set(steepest.__all__)) == len(steepest.__all__)
    for name in steepest.__all__:
        assert hasattr(steepest, name)
    for name in steepest.list_optimizers():
        assert optimizer_class(name).__name__ in steepest.__all__


@for_each("cls", sorted(CLASSES, key=lambda c: (c.__module__, c.__name__)))
def test_optimizers_have_an_example_that_steps(cls):
    doc = inspect.cleandoc(cls.__doc__)
    examples = doctest.DocTestParser().get_examples(doc)
    source = "".join(example.source for example in examples)
    assert f"{cls.__name__}(" in source
    assert ".step()" in source
    assert any(example.want for example in examples)


def documented_in(cls) -> list[str]:
    """Return the class's docstring, and those of its bases and of the common options that it refers to."""
    options = (steepest.CommonOptions, steepest.rule.MatrixOptions)
    others = {other.__name__: other for other in (*cls.__mro__[1:], *options)}
    texts, left = {}, [cls]
    while left:
        each = left.pop()
        texts[each] = each.__doc__ or ""
        named = {name.split(".")[-1] for name in re.findall(r":class:`~?([\w.]+)`", texts[each])}
        left += [others[name] for name in named if name in others and others[name] not in texts]
    return list(texts.values())


@for_each("name", steepest.list_optimizers())
def test_docstrings_say_what_a_reader_needs(name):
    cls = optimizer_class(name)
    for section in (".. math::", "State:", "Args:", "Raises:", "Tuning:", "When not to use it:", "Source:"):
        assert section in cls.__doc__, section
    tuning = cls.__doc__.partition("Tuning:")[2].partition("When not")[0]
    assert all(advice in tuning for advice in ("- ``lr``:", "- ``weight_decay``:", "- batch size:"))
    texts = documented_in(cls)
    declared_by = cls.__init__.__qualname__.partition(".")[0]
    own = next(each for each in cls.__mro__ if each.__name__ == declared_by).__doc__
    for parameter, seen in inspect.signature(cls).parameters.items():
        how = rf"^ *(- )?(\*\*)?(`*\w+`*, )*`*{parameter}`*(, `*\w+`*)*:"
        assert any(re.search(how, text, re.MULTILINE) for text in texts), parameter
        if seen.kind is seen.POSITIONAL_OR_KEYWORD:
            assert f"{parameter}:" in own, parameter


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("Lion", "lion"),
        ("sgdsai", "sgd_sai"),
        ("SGD_sai", "sgd_sai"),
        ("simba-leaky", "simba_leaky"),
    ],
)
def test_names_are_found_without_case_dashes_and_underscores(name, rule):
    optimizer = steepest.create(name, [torch.nn.Parameter(torch.ones(2))], lr=0.5)
    assert type(optimizer) is optimizer_class(rule)
    assert (optimizer.param_groups[0]["rule"], optimizer.param_groups[0]["lr"]) == (rule, 0.5)


def test_no_two_names_differ_in_case_dashes_and_underscores_alone():
    bare = [name.replace("_", "").replace("-", "").casefold() for name in steepest.list_optimizers()]
    assert len(set(bare)) == len(bare)


@pytest.mark.parametrize("name", compat.__all__)
def test_create_finds_the_originals_or_says_where_they_are(name):
    weight = torch.nn.Parameter(torch.ones(2, 2))
    try:
        made = optimizer_class(name)
    except ValueError as error:
        assert f"steepest.compat.{name}" in str(error)  # noqa: PT017
        with pytest.raises(ValueError, match=f"unknown optimizer '{name}'"):
            steepest.create(name, [weight])
    else:
        assert issubclass(getattr(compat, name), made)


def test_what_create_says_of_scaled_optum_is_true():
    weights = [torch.nn.Parameter(torch.tensor([1.0, 0.25])) for _ in range(2)]
    original = compat.ScaledOptum([weights[0]], lr=0.5, weight_decay=1.0)
    ours = steepest.create("signgsd", [weights[1]], lr=0.5, weight_decay=1.0, decay_overshoot=True)
    for weight, optimizer in zip(weights, (original, ours), strict=True):
        weight.grad = torch.tensor([1.0, 0.0])
        optimizer.step()
    assert torch.equal(*weights)


@pytest.mark.parametrize("name", [3, "", "loin", "unheard-of"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=r"unknown optimizer .*; known: adam_mini, adamw, "):
        steepest.create(name, [torch.nn.Parameter(torch.ones(2))])


def test_the_originals_that_are_classes_of_ours_are_the_same_classes():
    for name in ("QUAD", "Procrustes", "Simba", "OrthogonalizedOptimizer"):
        assert getattr(compat, name) is getattr(steepest, name)


def table_of_optimizers() -> str:
    return (Path(__file__).parents[1] / "docs" / "optimizers" / "index.md").read_text(encoding="utf-8")


@for_each("name", steepest.list_optimizers())
def test_the_table_lists_it_with_its_learning_rate(name):
    rows = [line for line in table_of_optimizers().splitlines() if line.startswith(f"| `{name}` |")]
    assert len(rows) == 1
    rate = rows[0].strip("| ").split("|")[-1].strip()
    assert float(rate) == inspect.signature(optimizer_class(name)).parameters["lr"].default


@for_each("name", steepest.list_optimizers())
def test_the_constructors_defaults_are_the_rules(name):
    # A param group that names the rule takes the rule's own; both must say the same.
    cls = optimizer_class(name)
    given = {p.name: p.default for p in inspect.signature(cls).parameters.values()}
    for key, value in find_rule(name).defaults().items():
        assert given.get(key, value) == value, key
