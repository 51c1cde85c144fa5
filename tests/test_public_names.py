"""Every public name is documented, and every optimizer with an example that runs."""

import doctest
import inspect
from pathlib import Path

import pytest

import steepest
from steepest import compat
from steepest.registry import optimizer_class
from steepest.rule import find_rule

CLASSES = {optimizer_class(name) for name in steepest.list_optimizers()} | {
    getattr(compat, name) for name in compat.__all__
}


@pytest.mark.parametrize("name", steepest.__all__)
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


@pytest.mark.parametrize("cls", sorted(CLASSES, key=lambda c: (c.__module__, c.__name__)))
def test_optimizers_have_an_example_that_steps(cls):
    doc = inspect.cleandoc(cls.__doc__)
    examples = doctest.DocTestParser().get_examples(doc)
    source = "".join(example.source for example in examples)
    assert f"{cls.__name__}(" in source
    assert ".step()" in source
    assert any(example.want for example in examples)


@pytest.mark.parametrize("name", steepest.list_optimizers())
def test_docstrings_say_what_a_reader_needs(name):
    cls = optimizer_class(name)
    doc = cls.__doc__
    for section in (".. math::", "State:", "Args:", "Raises:", "Source:"):
        assert section in doc, section
    for parameter in inspect.signature(cls).parameters:
        assert f"{parameter}:" in doc, parameter


def readme() -> str:
    return (Path(__file__).parents[1] / "README.md").read_text()


@pytest.mark.parametrize("name", steepest.list_optimizers())
def test_the_readme_lists_it_with_its_learning_rate(name):
    rows = [line for line in readme().splitlines() if line.startswith(f"| `{name}` |")]
    assert len(rows) == 1
    rate = rows[0].strip("| ").split("|")[-1].strip()
    assert float(rate) == inspect.signature(optimizer_class(name)).parameters["lr"].default


@pytest.mark.parametrize("name", steepest.list_optimizers())
def test_the_constructors_defaults_are_the_rules(name):
    # A param group that names the rule takes the rule's own; both must say the same.
    cls = optimizer_class(name)
    given = {p.name: p.default for p in inspect.signature(cls).parameters.values()}
    for key, value in find_rule(name).defaults().items():
        assert given.get(key, value) == value, key
