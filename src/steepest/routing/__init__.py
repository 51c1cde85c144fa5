"""Route a model's tensors: decide which rule each of them gets, from its role in the module that owns it."""

from steepest.routing.build import build
from steepest.routing.roles import Role, find_roles
from steepest.routing.tensors import Owner, Routed, find_tensors

__all__ = ["Owner", "Role", "Routed", "build", "find_roles", "find_tensors"]
