"""Without its framework, an integration says what to install."""

import sys
from importlib import import_module

import pytest

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
