"""Without its framework, an integration says what to install; with a broken one, what is broken."""

import sys
from importlib import import_module

import pytest

from steepest.integrations.failed_import import failed_import

FRAMEWORKS = ("axolotl", "lightning", "peft", "timm", "transformers")


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_it_names_what_to_install(framework, monkeypatch):
    loaded = [name for name in sys.modules if name.partition(".")[0] == framework]
    for name in (framework, *loaded):
        monkeypatch.setitem(sys.modules, name, None)  # as if it could not be found
    name = f"steepest.integrations.{framework}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ImportError, match=f"{name} needs {framework}.*pip install"):
        import_module(name)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_it_says_why_what_is_installed_fails(framework, monkeypatch, tmp_path):
    """Such as transformers beside a torchvision of another build, which it imports on demand."""
    package = tmp_path / framework
    package.mkdir()
    (package / "__init__.py").write_text(
        "cause = RuntimeError('operator torchvision::nms does not exist')\n"
        "raise ModuleNotFoundError('Could not import module Trainer') from cause\n"
    )
    (tmp_path / "accelerate.py").touch()
    for name in [name for name in sys.modules if name.partition(".")[0] in (framework, "accelerate")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    name = f"steepest.integrations.{framework}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ImportError) as refused:
        import_module(name)
    words = str(refused.value)
    assert words.startswith(f"{name} needs {framework}")
    assert "installed but cannot be imported" in words
    assert words.endswith("RuntimeError: operator torchvision::nms does not exist")
    assert "pip install" not in words


def test_one_of_two_packages_is_missing():
    error = failed_import("my.module", ["json", "nowhere>=2.0"], ImportError("No module named 'nowhere'"))
    assert str(error) == "my.module needs json and nowhere: pip install json 'nowhere>=2.0'"
