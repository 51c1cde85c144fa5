"""What the site documents: optimizers, and public names by module, read without importing them."""

import ast
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "steepest"

MODULES = (
    "steepest",
    "steepest.ternary",
    "steepest.views",
    "steepest.linalg",
    "steepest.compat",
    "steepest.planning",
    "steepest.model_shapes",
    "steepest.trust",
    "steepest.lab",
    "steepest.lab.bench",
    "steepest.integrations.axolotl",
    "steepest.integrations.lightning",
    "steepest.integrations.peft",
    "steepest.integrations.timm",
    "steepest.integrations.transformers",
)
"""The modules all of whose public names have an entry."""

FOR_RULES = (
    "steepest.rule.StateSpec",
    "steepest.rule.Moments",
    "steepest.rule.MatrixOptions",
    "steepest.arithmetic",
    "steepest.constructor.constructor",
    "steepest.hyperparameters.Hyperparameter",
    "steepest.hyperparameters.at_least",
    "steepest.hyperparameters.betas",
    "steepest.hyperparameters.choice",
    "steepest.hyperparameters.finite",
    "steepest.hyperparameters.flag",
    "steepest.hyperparameters.floating_dtype",
    "steepest.hyperparameters.fraction",
    "steepest.hyperparameters.integer",
    "steepest.hyperparameters.learning_rate",
    "steepest.hyperparameters.optional",
    "steepest.hyperparameters.positive",
    "steepest.hyperparameters.rate",
)
"""What one needs besides to add a rule."""


@dataclass(frozen=True)
class OptimizerPage:
    """An optimizer with a page of its own."""

    title: str
    identifier: str
    name: str | None  # None: a trainer or base that ``create`` does not make
    source: str  # path in the repository


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def public_names(module: str) -> list[str]:
    """Return a module's ``__all__``."""
    path = PACKAGE.parent.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in _tree(file).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise ValueError(f"{module} has no __all__")


def optimizer_pages() -> list[OptimizerPage]:
    """Return the optimizers of ``steepest.rules`` by name, then the two that have no name in the registry."""
    pages = []
    for file in sorted((PACKAGE / "rules").glob("*.py")):
        body = [node for node in _tree(file).body if isinstance(node, ast.ClassDef)]
        names = {
            node.name: ast.literal_eval(statement.value)
            for node in body
            for statement in node.body
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "name"
        }
        source = str(file.relative_to(ROOT))
        for node in body:
            for keyword in node.keywords:
                if keyword.arg == "rule":
                    rule = ast.unparse(keyword.value).partition("(")[0]
                    pages.append(OptimizerPage(node.name, f"steepest.{node.name}", names[rule], source))
    pages.sort(key=lambda page: page.title.casefold())
    psgd = OptimizerPage("PSGD", "steepest.rules.psgd.PSGD", None, "src/steepest/rules/psgd/__init__.py")
    flip = OptimizerPage(
        "TernaryFlip", "steepest.ternary.TernaryFlip", None, "src/steepest/ternary/trainer.py"
    )
    return [*pages, psgd, flip]
