"""Which tensor gets which rule, decided by the module that owns it and by its role there."""

from steepest.routing.build import build
from steepest.routing.roles import Role, find_roles
from steepest.routing.tensors import Owner, Routed, find_tensors

__all__ = ["Owner", "Role", "Routed", "build", "find_roles", "find_tensors"]
