"""Route a model's tensors: decide which rule each of them gets, from its role in the module that owns it."""

from steepest.routing.auto import Auto
from steepest.routing.build import build
from steepest.routing.groups import param_groups
from steepest.routing.recipe import Recipe
from steepest.routing.roles import Role, find_roles
from steepest.routing.tensors import Owner, Routed, find_tensors

__all__ = [
    "Auto",
    "Owner",
    "Recipe",
    "Role",
    "Routed",
    "build",
    "find_roles",
    "find_tensors",
    "param_groups",
]
