"""The sections by name, in the order of execution: modules with `run(config)`, which yields tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..config import BenchConfig
from ..results import Result
from . import (
    families,
    first,
    formats,
    host,
    machine,
    offload,
    polar,
    sharded,
    steps,
    symmetric,
    ternary,
)

SECTIONS: dict[str, Callable[[BenchConfig], Iterator[Result]]] = {
    "machine": machine.run,
    "symmetric": symmetric.run,
    "polar": polar.run,
    "steps": steps.run,
    "families": families.run,
    "host": host.run,
    "offload": offload.run,
    "first": first.run,
    "ternary": ternary.run,
    "sharded": sharded.run,
    "formats": formats.run,
}

ON_REQUEST = frozenset({"sharded", "formats"})
"""Sections that run only if they are named: their processes share the cores, or they compile for minutes."""
