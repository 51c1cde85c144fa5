"""torch's records of optimizers without those of its operators."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

# It imports a thousand records and SciPy's signals, in every process that collects these tests, and gives the
# records of optimizers only a class that says where torch's own tests of them are skipped.
OPERATORS = "torch.testing._internal.common_methods_invocations"


class DecorateInfo:
    """Takes what torch's class takes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass


if OPERATORS not in sys.modules:
    stand_in = ModuleType(OPERATORS)
    stand_in.DecorateInfo = DecorateInfo  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, OPERATORS, stand_in)
        import torch.testing._internal.common_optimizers

# torch's own tests may set no backend's flags outside a context; other tests of this process may.
torch.backends.disable_global_flags.__globals__["__allow_nonbracketed_mutation_flag"] = True
