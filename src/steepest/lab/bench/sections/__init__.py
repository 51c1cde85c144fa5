"""The benchmark's sections by name, in the order of execution."""

from __future__ import annotations

from ..section import Section
from .families import Families
from .first import First
from .formats import Formats
from .host import Host
from .machine import Machine
from .offload import Offload
from .polar import PolarFactors
from .sharded import Sharded
from .steps import Steps
from .sweep import Sweep
from .symmetric import Symmetric
from .ternary import Ternary

SECTIONS: dict[str, Section] = {
    section.name: section
    for section in (
        Machine(),
        Symmetric(),
        PolarFactors(),
        Steps(),
        Families(),
        Host(),
        Offload(),
        First(),
        Sweep(),
        Ternary(),
        Sharded(),
        Formats(),
    )
}
"""To add a section, write a class with `name`, `work_units` and `run`, and list it here."""

ON_REQUEST = frozenset({"sharded", "formats"})
"""Sections that run only if they are named: their processes share the cores, or they compile for minutes."""
