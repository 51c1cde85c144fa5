"""The package imports what a public name needs when the name is first used."""

from __future__ import annotations

import ast
import json
import pickle
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch

import steepest
from loops import for_each

SUBMODULES = {module.name for module in pkgutil.iter_modules(steepest.__path__)} - {"__main__"}
BY_FULL_NAME = {"integrations", "lab"}


# Runs each script that it is sent in a fork, which torch's import does not delay by seconds.
SERVER = """
import contextlib, io, json, os, sys, traceback
import torch
assert not any(name.partition(".")[0] == "steepest" for name in sys.modules)
for line in sys.stdin:
    script, *sys.argv[1:] = json.loads(line)
    if os.fork() == 0:
        status, printed = 0, io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                exec(script, {"__name__": "__main__"})
        except BaseException:
            status = traceback.format_exc()
        print(json.dumps([status, printed.getvalue().strip()]), flush=True)
        os._exit(0)
    if ended := os.wait()[1]:
        print(json.dumps([f"the process crashed with status {ended}", ""]), flush=True)
"""
Run = Callable[..., str]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Return what a script prints in a process that has imported torch, and nothing of this library."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin is not None
    assert server.stdout is not None

    def run(script: str, *arguments: str) -> str:
        print(json.dumps([script, *arguments]), file=server.stdin, flush=True)
        error, printed = json.loads(server.stdout.readline())
        assert not error, error
        return printed

    yield run
    server.communicate(timeout=60)


def type_checkers_see() -> dict[str, str]:
    """Return the module from which the package imports each name for type checkers."""
    tree = ast.parse(Path(steepest.__file__).read_text(encoding="utf-8"))
    (block,) = (n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    return {alias.name: node.module for node in block.body for alias in node.names}


def test_a_crash_is_told(run: Run) -> None:
    with pytest.raises(AssertionError, match="crashed with status"):
        run("import os; os.abort()")
    assert run("print('alive')") == "alive"


def test_type_checkers_see_every_public_name_and_no_other() -> None:
    assert sorted(type_checkers_see()) == sorted(steepest.__all__)


@for_each(("name", "module"), type_checkers_see().items())
def test_a_name_is_what_type_checkers_think_it_is(name: str, module: str) -> None:
    meant = import_module(f"steepest.{name}" if module == "steepest" else module)
    assert getattr(steepest, name) is (meant if module == "steepest" else getattr(meant, name))


def test_no_submodule_can_hide_a_function() -> None:
    # To import a submodule sets the package's attribute of that name.
    assert set(steepest.__all__) & SUBMODULES == {"compat", "ternary", "views"}


def test_the_package_alone_loads_nothing() -> None:
    script = (
        "import sys, steepest\n"
        "print(steepest.__version__, dir(steepest).count('Lion'), hasattr(steepest, 'Loin'))\n"
        "print(*[n for n in sys.modules if n.split('.')[0] == 'torch' or n.startswith('steepest.')])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{steepest.__version__} 1 False"


def test_a_submodule_comes_alone(run: Run) -> None:
    script = "import sys, steepest; steepest.views.rows; print('steepest.rules' in sys.modules)"
    assert run(script) == "False"


def test_submodules_are_attributes_but_for_those_that_need_more_than_torch(run: Run) -> None:
    script = f"import steepest; print(*(name for name in {sorted(SUBMODULES)} if hasattr(steepest, name)))"
    assert set(run(script).split()) == SUBMODULES - BY_FULL_NAME


def test_the_star_imports_every_public_name(run: Run) -> None:
    script = "from steepest import *; import steepest; print({*steepest.__all__} <= {*globals()})"
    assert run(script) == "True"


def test_dir_has_the_public_names_and_a_misspelt_one_raises() -> None:
    assert set(dir(steepest)) >= {*steepest.__all__, "__version__"}
    with pytest.raises(AttributeError, match="module 'steepest' has no attribute 'Loin'"):
        steepest.Loin  # noqa: B018
    assert not hasattr(steepest, "no_package.name")
    assert not hasattr(steepest, "ternary.layer")
    with pytest.raises(ImportError, match="cannot import name 'Loin'"):
        from steepest import Loin  # noqa: F401


@pytest.mark.parametrize(
    ("imports", "rule"),
    [
        ("from steepest.optimizer import Optimizer", "lion"),
        ("from steepest import Optimizer", "muon"),
    ],
)
def test_the_optimizer_finds_rules_that_nobody_has_imported(imports: str, rule: str, run: Run) -> None:
    script = (
        f"import torch; {imports}\n"
        f"optimizer = Optimizer([torch.nn.Parameter(torch.ones(2, 2))], rule={rule!r})\n"
        "print(optimizer.param_groups[0]['rule'])"
    )
    assert run(script) == rule


def test_a_rule_cannot_take_the_name_of_one_that_nobody_has_imported(run: Run) -> None:
    script = (
        "from steepest import Optimizer, Rule\n"
        "class Mine(Rule):\n"
        "    name = 'lion'\n"
        "    def state_specs(self, group): return {}\n"
        "    def update(self, grad, param): return grad, {}\n"
        "try: type('Mine', (Optimizer,), {}, rule=Mine())\n"
        "except ValueError as error: print(error)"
    )
    assert run(script) == "the rule name 'lion' is taken by steepest.rules.lion.Lion"


def test_an_error_lists_rules_that_nobody_has_imported(run: Run) -> None:
    script = (
        "from steepest.rule import find_rule\n"
        "try: find_rule('loin')\n"
        "except ValueError as error: print(error)"
    )
    assert "did you mean 'lion'?" in (said := run(script))
    assert "simba_leaky" in said
    assert "soap" in said


def test_an_optimizer_of_several_rules_unpickles_in_a_new_process(tmp_path: Path, run: Run) -> None:
    layers = [torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)]
    optimizer = steepest.build(torch.nn.Sequential(*layers), "muon")
    (tmp_path / "optimizer").write_bytes(pickle.dumps(optimizer))
    script = (
        "import pickle, sys\n"
        "from pathlib import Path\n"
        "optimizer = pickle.loads(Path(sys.argv[1]).read_bytes())\n"
        "print(type(optimizer).__name__, *(group['rule'] for group in optimizer.param_groups))\n"
        "optimizer.step()"
    )
    rules = (group["rule"] for group in optimizer.param_groups)
    assert run(script, str(tmp_path / "optimizer")) == " ".join(["Muon+AdamW", *rules])
