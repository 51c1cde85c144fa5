"""Imports point one way, and the library without its lab depends on torch alone."""

import ast
import subprocess
import sys
from pathlib import Path

import steepest
from loops import for_each

ROOT = Path(steepest.__file__).parent
# Each may import those before it. A new part of the library finds its place here first.
LAYERS = [
    "autotuning",
    "scratch",
    "compile",
    "random",
    "arithmetic",
    "formats",
    "hyperparameters",
    "linalg",
    "views",
    "rule",
    "distributed",
    "engine",
    "explain",
    "group_names",
    "group_options",
    "migrations",
    "saved_groups",
    "stored_state",
    "state_dict",
    "master_weights",
    "constructor",
    "optimizer",
    "combined",
    "freed_gradient",
    "optimizer_in_backward",
    "rules",
    "registry",
    "routing",
    "ternary",
    "model_shapes",
    "planning",
    "trust",
    "learning_rates",
    "compat",
    "integrations",
    "__init__",
    "lab",
    "__main__",
]
# The rules of a family are subclasses of one; the others know no rule but themselves.
BASES = {
    "muon": "orthogonalized",
    **dict.fromkeys(("normuon", "polargrad", "scion", "hyperball"), "muon"),
    **dict.fromkeys(("quad", "procrustes"), "psgd"),
}
# typing_extensions comes with torch, which requires it; so does triton with its builds for CUDA, and the one
# file that asks for it goes on without.
DEPENDENCIES = {"torch", "typing_extensions"}
# Each has one file that adapts to it, which nothing else imports.
FRAMEWORKS = ("axolotl", "lightning", "peft", "timm", "transformers")
OPTIONAL = {
    "steepest.learning_rates.range_test": {"matplotlib"},
    "steepest.linalg.triton_symmetric": {"triton"},
    "steepest.integrations.hf_ternary": {"transformers"},
    **{f"steepest.integrations.{each}": {each} for each in FRAMEWORKS},
    "steepest.integrations.axolotl": {"axolotl", "pydantic"},  # which Axolotl's config is made of
}
MODULES = sorted(ROOT.rglob("*.py"))


def dotted(path: Path) -> list[str]:
    """``["steepest", "rules", "lion"]`` of that file; a package's __init__ is the package."""
    parts = ["steepest", *path.relative_to(ROOT).with_suffix("").parts]
    return parts[:-1] if parts[-1] == "__init__" else parts


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, for type checking too; relative ones resolved."""
    package = dotted(path) if path.name == "__init__.py" else dotted(path)[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            # ``from . import x`` may mean the module x.
            within = [f"{module}.{alias.name}" for alias in node.names]
            files = [n for n in within if is_module(n)]
            found |= set(files) or {module}
            if len(files) < len(within):
                found.add(module)
    return found


def is_module(name: str) -> bool:
    at = ROOT.parent.joinpath(*name.split("."))
    return at.is_dir() or at.with_suffix(".py").is_file()


def layer(name: str) -> str:
    """Which part of the library a module of it belongs to."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def test_every_part_has_its_place():
    assert {layer(".".join(dotted(path))) for path in MODULES} == set(LAYERS)


@for_each("path", MODULES)
def test_imports_point_one_way(path):
    own = LAYERS.index(layer(".".join(dotted(path))))
    for name in imported(path):
        if name.split(".")[0] == "steepest":
            # A package that asks for itself is a cycle waiting: only the lab, above all, imports the root.
            assert LAYERS.index(layer(name)) <= own, f"{path.name} imports {name}"


def test_the_lab_uses_the_public_names():
    public = {
        "lab",
        "__init__",
        "autotuning",
        "compat",
        "compile",
        "hyperparameters",
        "linalg",
        "model_shapes",
        "planning",
        "ternary",
        "trust",
    }
    for path in MODULES:
        if layer(".".join(dotted(path))) == "lab":
            assert {layer(n) for n in imported(path) if n.split(".")[0] == "steepest"} <= public, path


# What each part of the lab may import of the others. What is not named here is for all of them, or for
# commands of its own.
LAB = {
    "models": {"errors"},
    "defaults": set(),
    "loading": {"errors"},
    "files": {"errors"},
    "printable": set(),
    "records": {"errors", "files", "printable"},
    "tasks": {"defaults", "files", "loading", "models", "records", "errors"},
    "training": {"defaults", "loading", "printable", "tasks", "records", "errors"},
    "progress": {"training", "records", "errors"},
    "analysis": {"records", "errors"},
    "report": {"analysis", "files", "records", "errors"},
    "bench": {"defaults", "files", "training", "records", "errors"},
    "experiments": {
        "defaults",
        "bench",
        "files",
        "printable",
        "training",
        "tasks",
        "models",
        "analysis",
        "progress",
        "records",
        "errors",
    },
}


def test_parts_of_the_lab_import_one_way():
    for path in MODULES:
        name = dotted(path)
        if name[:2] != ["steepest", "lab"] or len(name) < 3:
            continue
        found = {n.split(".")[2] for n in imported(path) if n.startswith("steepest.lab.")} - {name[2]}
        assert "cli" not in found or name[2] == "__main__", path
        if name[2] in LAB:
            assert found <= LAB[name[2]], f"{'.'.join(name)} imports {', '.join(found - LAB[name[2]])}"


def test_rules_know_no_other_rule_but_their_base_and_linalg_compile_and_formats_stand_alone():
    for path in MODULES:
        name, names = dotted(path), imported(path)
        if name[1:2] == ["rules"] and len(name) >= 3:
            known = {n.split(".")[2] for n in names if n.startswith("steepest.rules.")}
            assert known <= {name[2], BASES.get(name[2])}, path
        if name[1:2] == ["linalg"]:
            own = {layer(n) for n in names if n.split(".")[0] == "steepest"}
            assert own <= {"linalg", "autotuning", "scratch", "random", "hyperparameters"}, path
        if name[1:2] == ["compile"]:
            assert {layer(n) for n in names if n.split(".")[0] == "steepest"} <= {"compile"}, path
        if name[1:2] == ["formats"]:
            assert {layer(n) for n in names if n.split(".")[0] == "steepest"} <= {"formats", "random"}, path


def test_the_library_depends_on_torch_alone():
    for path in MODULES:
        if layer(".".join(dotted(path))) == "lab":
            continue
        outside = {name.split(".")[0] for name in imported(path)}
        allowed = DEPENDENCIES | OPTIONAL.get(".".join(dotted(path)), set())
        assert outside - set(sys.stdlib_module_names) - {"steepest"} <= allowed, path


def test_importing_the_library_loads_neither_the_lab_nor_what_it_needs_and_no_dynamo():
    # Dynamo takes more than a second, which only those who compile or step should pay. DTensors take another;
    # torch itself loads them with Dynamo, in the first step.
    script = (
        "import sys, torch; before = set(sys.modules)\n"
        "import steepest, steepest.compat; from steepest import *\n"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))\n"
        "print(any(n.startswith('steepest.lab') for n in sys.modules))\n"
        "late = ('torch._dynamo', 'torch._inductor', 'torch.distributed.tensor', 'sympy')\n"
        "print(*[name for name in late if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    loaded, lab, compilers = out.split("\n")[:3]
    heavy = {"matplotlib", "rich", "typer", "jinja2", "sklearn", "pandas", "scipy", *FRAMEWORKS}
    assert not set(loaded.split()) & heavy
    assert "steepest" in loaded
    assert lab == "False"
    assert compilers == ""


def test_the_parser_sees_relative_and_type_checking_imports():
    # An oracle for this file's own reading: in a place as deep as steepest/engine/x.py.
    path = ROOT / "engine" / "x.py"
    source = (
        "from . import chunks\nfrom ..lab import race\nimport os.path\nfrom steepest import rules, Lion\n"
        "if TYPE_CHECKING:\n    import numpy\nelse:\n    import math\n"
    )

    class Text(type(path)):
        def read_text(self, *args, **kwargs):
            return source

    assert imported(Text(path)) == {
        "steepest.engine.chunks",
        "steepest.lab",
        "os.path",
        "math",
        "numpy",
        "steepest.rules",
        "steepest",
    }
