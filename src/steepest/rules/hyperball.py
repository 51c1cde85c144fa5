"""Hyperball: Muon on a sphere, where weights keep their norm instead of decaying."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from steepest.constructor import constructor
from steepest.distributed.local import is_dtensor
from steepest.hyperparameters import Hyperparameter, at_least, optional, positive
from steepest.linalg.normalization import frobenius_of_any
from steepest.rule import Group, StateSpec
from steepest.rules.muon import Muon, MuonOptions, MuonRule
from steepest.views import matrices

__all__ = ["Hyperball", "HyperballRule"]


_NORM = at_least(0)


class HyperballRule(MuonRule):
    """p ← R·normalize(p − η·R·normalize(O)),   R = ‖p‖_F as it was at first."""

    name = "hyperball"
    keeps_input = False
    hyper = {
        **MuonRule.hyper,
        "weight_decay": Hyperparameter(
            lambda value: not isinstance(value, bool) and value == 0,
            "0: the norm is held, nothing decays",
            traced=True,
        ),
        "radius": optional(positive()),
    }

    def check_param(self, who: str, name: str | None, param: Tensor, group: Group) -> None:
        """Refuse a matrix of zeros, which has no norm to hold."""
        super().check_param(who, name, param, group)
        # A shard does not tell whether the whole matrix is zero.
        if group["radius"] is not None or param.is_meta or param.numel() == 0 or is_dtensor(param):
            return
        view = (group["views"] or {}).get(name)
        for block in matrices(param.detach(), view, group["view"] == "batch"):
            stacked = block.reshape(self.matrix_shape(block.shape, group))
            if not stacked.any(dim=-1).any(dim=-1).all():
                raise ValueError(
                    f"{who} is zero, or a matrix in it is, so it has no norm to keep: give hyperball a "
                    "radius, or put the parameter into a group of another rule"
                )

    def moves_like_adamw(self, group: Group) -> bool:
        """Return False: whatever the scale, an update has the weights' norm, and lr is an angle."""
        return False

    def matrix_specs(self, shape: tuple[int, ...], dtype: torch.dtype, group: Group) -> dict[str, StateSpec]:
        """Return the norm that is held, which is 0 until it is known."""
        wide = torch.promote_types(torch.float32, dtype)
        fill = group["radius"] or 0.0
        return {"norm": StateSpec("matrix", wide, (*shape[:-2], 1, 1), fill, numbers=_NORM)}

    def transform(  # type: ignore[override]
        self, u: Tensor, *, param: Tensor, orthogonalize: Callable[[Tensor], Tensor] | None, **options: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Run Muon's transform, and pass on the parameter for its norm."""
        return super().transform(u, orthogonalize=orthogonalize, param=param, **options)

    def finish(self, polar: Tensor, u: Tensor, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        param, held = options["param"], options["norm"].to(u.dtype)
        radius = torch.where(held > 0, held, frobenius_of_any(param))
        return radius * _normalized(polar), {"norm": radius}

    def retract(self, param: Tensor, before: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """Project onto the sphere of radius R; a matrix that did not move stays bitwise equal."""
        still = (param == before).all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)
        return torch.where(still, before, state["norm"] * _normalized(param))


def _normalized(matrix: Tensor) -> Tensor:
    norm = frobenius_of_any(matrix)
    return torch.where(norm > 0, matrix / norm, 0.0)


class Hyperball(Muon, rule=HyperballRule(), defaults={"weight_decay": 0.0}):
    r"""Muon with the Frobenius norms of weights and updates held fixed.

    .. math::
        p \leftarrow R\,\mathrm{normalize}\bigl(p - \eta R\,\mathrm{normalize}(O)\bigr), \qquad
        R = \lVert p_0 \rVert_F

    with O Muon's polar factor; η is close to the angle that a step turns the weights by. It replaces
    weight decay, which therefore must be 0.

    State: Muon's ``momentum_buffer`` (4 bytes per float32 parameter), and ``norm``, one number per matrix.

    Args:
        params: matrices: tensors, ``(name, tensor)`` pairs, or group dicts.
        lr: η ≥ 0, a float or a 1-element tensor.
        momentum: β in [0, 1) of Muon's average.
        radius: R > 0; None is each matrix's norm in its first step.
        **options: :class:`Muon`'s, and the common ones.

    Raises:
        TypeError: an unknown keyword, or parameters that are not tensors.
        ValueError: a value out of range; a weight decay; a parameter with fewer than two dimensions, or one
            that is zero and is given no radius, by name. In a DTensor such a matrix is not detected; it stays
            zero.

    Tuning:
        - ``lr``: roughly the angle of a step in radians. Measured here: 0.032 on a small GPT, 18 times
          AdamW's, and 0.056 on digits (docs/learning_rates.md).
        - ``weight_decay``: there is none, since the norm is fixed.
        - ``momentum``: 0.95; other values are not measured here.
        - batch size: keep lr, and search around it. Measured here: with 16 times the batch and as many
          steps the best lr is 1.8 times as large on digits (docs/learning_rates.md).

    When not to use it:
        For matrices that start at zero, which have no norm to keep, and for layers whose norm must be
        learned. Otherwise as for :class:`~steepest.Muon`, which was better in the sweep: 2.756 bits per byte
        instead of 3.137.

    Source: Wen et al., "Fantastic Pretraining Optimizers and Where to Find Them II: Hyperball
    Optimization", arXiv 2606.16899 (2026).

    >>> weight = torch.nn.Parameter(torch.eye(2))
    >>> optimizer = Hyperball([weight], lr=0.5)
    >>> weight.grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> optimizer.step()
    >>> round(torch.linalg.matrix_norm(weight).item(), 4)  # √2, as before
    1.4142
    """

    @constructor
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        momentum: float = 0.95,
        *,
        radius: float | None = None,
        **options: Unpack[MuonOptions],
    ) -> None: ...
