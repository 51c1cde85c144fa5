"""Optimizer in backward: step each parameter, and free its gradient, as soon as the gradient is ready."""

from __future__ import annotations

import contextlib
import math
import sys
import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steepest.distributed.local import is_dtensor, is_pending
from steepest.engine.collect import describe
from steepest.engine.cuda_graphs import capturing
from steepest.engine.grad_check import both, check_gradients
from steepest.engine.param_check import check_materialized
from steepest.engine.update import PLAIN
from steepest.freed_gradient import FreedGradient, warn_once
from steepest.hyperparameters import optional, positive
from steepest.optimizer import Optimizer
from steepest.rule import Group, find_rule

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs

__all__ = ["ReleasedGradients", "is_released", "release_gradients"]

# As in torch.nn.utils.clip_grad_norm_, against a division by zero.
_CLIP_EPS = 1e-6
_live: weakref.WeakSet[ReleasedGradients] = weakref.WeakSet()


def release_gradients(
    model: nn.Module, optimizer: Optimizer, *, clip_value: float | None = None, clip_norm: float | None = None
) -> ReleasedGradients:
    r"""Step every parameter within ``backward()``, and free its gradient at once.

    At most a few gradients exist at a time, never those of the whole model. The training loop stays as it is:
    ``step()`` steps the parameters that backward did not reach and *ends the step*, so it must be called.
    Every parameter takes the same step as in ``optimizer.step()``, once: a second gradient before ``step()``
    is an error. Results are bitwise equal, but matrix rules, whose matrices are not stacked here, agree only
    to rounding.

    Some things differ, because the first parameters move before the last gradients are computed:

    - ``nonfinite="skip"`` skips only *parameters* whose gradients are not finite; ``skipped_steps`` counts
      the steps with such a parameter. ``nonfinite="raise"`` is refused, and so are rules whose step depends
      on all tensors of a group (SGDSaI with ``normalize="max"``, PSGD with ``literal=True``).
    - Clipping after backward has no effect; in the first step, whatever reads a freed gradient is warned of
      it once: until ``step()``, ``grad`` is a placeholder there, of zeros that take no memory, and None from
      the second step on. ``clip_value`` is exact: gradient elements are clamped to
      ±``clip_value``. ``clip_norm`` scales by the norm of all gradients *of the last step*,

      .. math:: g \leftarrow g \cdot \min\bigl(1, c / (N_{t-1} + 10^{-6})\bigr)

      and in the first step by the norm of each parameter's own gradient. N is measured before clipping,
      over all stepped parameters; a step with a non-finite N does not update it. Param groups, and so
      checkpoints, store it as ``last_grad_norm``.
    - Backward uses the learning rate of that moment; a pre-hook of ``step()`` runs too late to change it.
    - ``GradScaler.step()`` raises an error.
    - With several processes, only sharded parameters (DTensors) of element rules are stepped in backward, as
      ``fully_shard`` makes them: their gradients are reduced by then. Whatever needs all of a tensor's shards
      is refused: other rules, ``nonfinite="skip"``, ``clip_norm``.
    - After an error in backward, every parameter is either stepped or unchanged. To continue, end the failed
      step with ``zero_grad()`` and ``step()``.

    To accumulate gradients, in the memory of an ordinary step, run all backward passes but the last within
    :meth:`ReleasedGradients.accumulate`. ``step()`` steps parameters that were added or unfrozen later the
    first time, and backward from then on. ``compile`` applies to each parameter separately: by default only
    those of 2²² elements or more are stepped in compiled code.

    State: the optimizer's; with ``clip_norm``, one more number for the whole optimizer.

    Args:
        model: a module that holds all of the optimizer's parameters.
        optimizer: an optimizer of this library. Copies, pickles and state dicts of it are ordinary ones.
        clip_value: largest magnitude > 0 of a gradient's element, or of each part of a complex one.
        clip_norm: c > 0, as above; cannot be combined with ``clip_value``.

    Returns:
        A handle, also a context manager; :meth:`~ReleasedGradients.remove` restores ordinary steps.

    Raises:
        TypeError: ``model`` is not a module, or ``optimizer`` is not of this library.
        ValueError: a clip that is not a number > 0; a parameter that is released already, or not the model's;
            a rule or an option refused above; a model within DistributedDataParallel or
            FullyShardedDataParallel. On a step's first gradient, before anything moves: as in ``step()``.
        RuntimeError: in backward: a second gradient in one step; a parameter that is not sharded, in several
            processes, whose gradients would have to be averaged first; a gradient of a sharded parameter
            that must be redistributed first.

    Source: the technique is torch's tutorial "How to save memory by fusing the optimizer step into the
    backward pass"; see also Lv et al., "Full Parameter Fine-tuning for Large Language Models with Limited
    Resources" (LOMO), arXiv 2306.09782 (2023).

    >>> from steepest import SignGSD
    >>> model = nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.zeros_(model.weight)
    >>> optimizer = SignGSD(model.parameters(), lr=0.5)
    >>> released = release_gradients(model, optimizer)
    >>> model(torch.tensor([1.0, -1.0])).sum().backward()
    >>> model.weight.tolist()
    [[-0.5, 0.5]]
    >>> optimizer.step()
    >>> model.weight.tolist(), model.weight.grad
    ([[-0.5, 0.5]], None)
    """
    return ReleasedGradients(model, optimizer, clip_value=clip_value, clip_norm=clip_norm)


def is_released(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer's parameters are stepped in backward at present."""
    return any(each._optimizer is optimizer for each in _live)


class ReleasedGradients:
    """The handle returned by :func:`release_gradients`, which documents the arguments and errors."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        clip_value: float | None = None,
        clip_norm: float | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"release_gradients() takes the model first, got a {type(model).__name__}")
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                "release_gradients() takes an optimizer of steepest, "
                f"got {type(optimizer).__module__}.{type(optimizer).__name__}"
            )
        optional(positive()).check("release_gradients()", "clip_value", clip_value)
        optional(positive()).check("release_gradients()", "clip_norm", clip_norm)
        if clip_value is not None and clip_norm is not None:
            raise ValueError("release_gradients(): choose one of clip_value and clip_norm")
        _refuse_wrapped(model)
        if why := _unsupported(optimizer.param_groups, clip_norm):
            raise ValueError(why)
        _check_params(model, optimizer)
        self._optimizer = optimizer
        self._clip_value, self._clip_norm = clip_value, clip_norm
        self._accumulating = False
        self._hooks: dict[int, tuple[Tensor, RemovableHandle]] = {}
        # Group, index in it, and ordinal among all parameters when last looked up.
        self._places: dict[int, tuple[int, int, int]] = {}
        self._stepped: set[int] = set()
        self._refused: set[int] = set()
        # In the first step, gradients are watched, since clipping them would have no effect: clip_grad_norm_
        # says nothing where there are none. Whoever clips here knows what is clipped.
        self._watching = clip_value is None and clip_norm is None
        self._warn = warn_once()
        # Threads, one per device, run the hooks: use only atomic operations on these lists.
        self._squares: list[Tensor] = []
        self._taken: list[bool | Tensor] = []
        self._before_step_handle = optimizer.register_step_pre_hook(self._before_step)
        # Makes GradScaler call step() itself, so that _before_step can raise a clear error.
        optimizer.__dict__["_step_supports_amp_scaling"] = True
        self._attach()
        _live.add(self)

    def remove(self) -> None:
        """Restore ordinary backward and ``step()``; gradients that exist now stay."""
        if self not in _live:
            return
        self._forget_freed()
        for _, handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()
        self._before_step_handle.remove()
        self._optimizer.__dict__.pop("_step_supports_amp_scaling", None)
        _live.discard(self)

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Let backward accumulate gradients within this context, without a step.

        >>> from steepest import SGD
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> optimizer = SGD(model.parameters(), lr=1.0)
        >>> with release_gradients(model, optimizer) as released:
        ...     with released.accumulate():
        ...         model(torch.ones(1)).backward()
        ...     model(torch.ones(1)).backward()
        ...     optimizer.step()
        >>> model.weight.item()
        -2.0
        """
        before, self._accumulating = self._accumulating, True
        try:
            yield
        finally:
            self._accumulating = before

    @property
    def grad_norm(self) -> float | None:
        """The norm of all gradients of the last step, before clipping (waits for the device).

        None without ``clip_norm`` and before the first step.
        """
        norm = float(self._last_norm())
        return None if math.isnan(norm) else norm

    def __enter__(self) -> ReleasedGradients:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    # Compiled autograd would trace the hook, and with it every step, into the model's backward.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def _on_gradient(self, param: Tensor) -> None:
        _refuse_unreduced(param)
        self._refuse_second(param)
        if not self._accumulating:
            self._step(param)

    def _step(self, param: Tensor) -> None:
        """Step one parameter whose gradient is complete."""
        if not self._stepped:
            self._begin_step()
        if not self._is_at_its_place(param):
            self._find_places()
        place = self._places.get(id(param))
        if place is None:
            return  # removed from the optimizer, which must leave its gradient alone
        optimizer = self._optimizer
        _refuse_pending(param, optimizer.param_groups, *place[:2])
        batch = optimizer._collector.one(optimizer.param_groups, *place, optimizer.state)
        (member,) = batch.members
        # Not in place: the gradient may share memory with others that backward still needs.
        if self._clip_value is not None:
            member.grad = member.grad.clamp(-self._clip_value, self._clip_value)
        elif self._clip_norm is not None:
            member.grad = self._clipped(member.grad, self._clip_norm)
        self._taken.append(optimizer._take([batch], check_gradients([batch])))
        self._stepped.add(id(param))
        grad, param.grad = param.grad, None
        if self._watching and grad is not None and type(param) in PLAIN:
            group, at = optimizer.param_groups[place[0]], place[1]
            param.grad = FreedGradient(grad, partial(self._warn, describe(group, place[0], at)))

    def _begin_step(self) -> None:
        """Check, before anything moves, that backward can step."""
        groups = self._optimizer.param_groups
        _refuse_capture()
        self._optimizer._collector.check(type(self._optimizer).__name__, groups)
        check_materialized(groups)
        if why := _unsupported(groups, self._clip_norm):
            raise RuntimeError(why)

    def _find_places(self) -> None:
        ordinals = count()
        places: dict[int, tuple[int, int, int]] = {}
        for group_index, group in enumerate(self._optimizer.param_groups):
            for index, param in enumerate(group["params"]):
                places.setdefault(id(param), (group_index, index, next(ordinals)))
        self._places = places

    def _is_at_its_place(self, param: Tensor) -> bool:
        group_index, index, _ = self._places.get(id(param), (-1, -1, -1))
        groups = self._optimizer.param_groups
        at = groups[group_index]["params"] if 0 <= group_index < len(groups) else []
        return 0 <= index < len(at) and at[index] is param

    def _clipped(self, grad: Tensor, limit: float) -> Tensor:
        # Apple's GPUs have no float64.
        wide = torch.float32 if grad.device.type == "mps" else torch.float64
        own = torch.linalg.vector_norm(grad, dtype=wide)
        self._squares.append(own.square())
        norm = torch.as_tensor(self._last_norm(), dtype=wide, device=grad.device)
        factor = (limit / (torch.where(norm.isnan(), own, norm) + _CLIP_EPS)).clamp(max=1)
        # The product of a 0-dim gradient has the factor's dtype.
        return (grad * factor).to(grad.dtype)

    def _last_norm(self) -> float | Tensor:
        """Return the norm of the last step's gradients, or NaN if there is none yet."""
        norm: float | Tensor = self._optimizer.param_groups[0].get("last_grad_norm", math.nan)
        return norm

    def _refuse_second(self, param: Tensor) -> None:
        if id(param) in self._stepped:
            self._refused.add(id(param))
            group_index, index, _ = self._places[id(param)]
            raise RuntimeError(
                f"{describe(self._optimizer.param_groups[group_index], group_index, index)} was stepped "
                "already and got another gradient: call optimizer.step() after each backward (after one that "
                "failed, zero_grad() and step()), and run all but the last of several within accumulate(). "
                "Where a Trainer runs them, let each take a step: gradient_accumulation_steps=1 in Hugging "
                "Face's, accumulate_grad_batches=1 in Lightning's"
            )

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        _refuse_capture()
        if hasattr(optimizer, "grad_scale"):
            raise RuntimeError(
                "GradScaler cannot be used with released gradients: parameters were stepped in backward "
                "with gradients still scaled. Train in bfloat16, or remove() the release"
            )
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._end_step()
            return None

        def evaluated() -> Any:
            loss = closure()
            self._end_step()
            return loss

        return (args[0], evaluated), {}

    @torch.no_grad()
    def _end_step(self) -> None:
        """Step what backward did not reach, and update the counts and norms of the whole step."""
        self._forget_freed()
        left = [param for param in self._params().values() if param.grad is not None]
        for param in left:
            _refuse_unreduced(param)
            self._refuse_second(param)
        watching, self._watching = self._watching and not self._stepped, False
        for param in left:
            self._step(param)
        self._watching = watching
        self._stepped.clear()
        self._refused.clear()
        # step() counts it together with its own result.
        taken: bool | Tensor = True
        while self._taken:
            taken = both(taken, self._taken.pop())
        self._optimizer.__dict__["_taken_in_backward"] = taken
        if self._squares:
            norm = torch.stack([each.to(self._squares[0].device) for each in self._squares]).sum().sqrt()
            self._squares.clear()
            last = torch.as_tensor(self._last_norm(), dtype=norm.dtype, device=norm.device)
            kept = torch.where(norm.isfinite(), norm, last)
            for group in self._optimizer.param_groups if not kept.is_cpu or kept.isfinite() else []:
                group["last_grad_norm"] = float(kept) if kept.is_cpu else kept
        self._attach()

    def _forget_freed(self) -> None:
        for param, _ in self._hooks.values():
            # A second gradient was added to some, which step() must refuse as backward did.
            if isinstance(param.grad, FreedGradient) and id(param) not in self._refused:
                param.grad = None

    def _params(self) -> dict[int, Any]:
        """Return the parameters to step in backward: none with targets, since a layer may vote repeatedly."""
        groups = [group for group in self._optimizer.param_groups if not find_rule(group["rule"]).moves]
        return {id(param): param for group in groups for param in group["params"]}

    def _attach(self) -> None:
        """Hook the parameters that require gradients and have no hook yet."""
        # The garbage collector does not look into a tensor's hooks: a strong reference to the handle would
        # keep the parameters alive forever. The optimizer's own hook keeps the handle alive.
        living = weakref.ref(self)

        def hook(param: Tensor) -> None:
            if (released := living()) is not None:
                released._on_gradient(param)

        params = self._params()
        for gone in self._hooks.keys() - params.keys():
            self._hooks.pop(gone)[1].remove()
        for key, param in params.items():
            if param.requires_grad and key not in self._hooks:
                self._hooks[key] = (param, param.register_post_accumulate_grad_hook(hook))


def _is_sharded(param: Tensor) -> TypeIs[DTensor]:
    """Return whether several processes hold a parameter together."""
    return type(param) not in PLAIN and is_dtensor(param) and param.device_mesh.size() > 1


def _unsupported(groups: Sequence[Group], clip_norm: float | None) -> str | None:
    """Return why a group's parameters cannot be stepped one at a time; None if all can."""
    for index, group in enumerate(groups):
        if group["nonfinite"] == "raise":
            return (
                f"group {index}: nonfinite='raise' guarantees that nothing has changed, which a step within "
                "backward cannot do; 'skip' skips single parameters"
            )
        if why := find_rule(group["rule"]).relates(group):
            return (
                f"group {index}: with {why} a step of {group['rule']!r} depends on all tensors of a group, "
                "so none can be stepped before the last gradient is ready"
            )
        if why := _unsupported_shards(group, index, clip_norm):
            return why
    return None


def _unsupported_shards(group: Group, group_index: int, clip_norm: float | None) -> str | None:
    """Return why a group's sharded parameters cannot be stepped without the other processes."""
    rule = find_rule(group["rule"])
    sharded = [] if rule.moves else [at for at, param in enumerate(group["params"]) if _is_sharded(param)]
    if not sharded:
        return None
    who = describe(group, group_index, sharded[0])
    alone = "the processes cannot communicate within backward"
    if rule.scope != "element":
        return f"{who} is a DTensor: {rule.name!r} needs whole tensors, and {alone}; element rules do not"
    if group["nonfinite"] == "skip":
        return (
            f"{who} is a DTensor: nonfinite='skip' would skip it on some processes only, because {alone}; "
            "use an ordinary step, or nonfinite='ignore'"
        )
    if clip_norm is not None:
        return f"{who} is a DTensor: clip_norm needs the norm of all shards, and {alone}; use clip_value"
    return None


def _refuse_pending(param: Tensor, groups: Sequence[Group], group_index: int, index: int) -> None:
    grad = param.grad
    if _is_sharded(param) and is_dtensor(grad) and is_pending(grad, param):
        placements = ["(" + ", ".join(map(str, each.placements)) + ")" for each in (grad, param)]
        raise RuntimeError(
            f"{describe(groups[group_index], group_index, index)} has the placements {placements[1]} and its "
            f"gradient {placements[0]}: the processes cannot redistribute it within backward; use an "
            "ordinary step"
        )


def _refuse_wrapped(model: nn.Module) -> None:
    kinds: list[type] = [nn.parallel.DistributedDataParallel]
    # Importing this takes a second; an FSDP module can exist only where it is imported.
    if (fsdp := sys.modules.get("torch.distributed.fsdp")) is not None:
        kinds.append(fsdp.FullyShardedDataParallel)
    for name, module in model.named_modules():
        if isinstance(module, tuple(kinds)):
            where = f"module {name!r}" if name else "the model"
            raise ValueError(
                f"{where} is a {type(module).__name__}: it averages gradients after the hooks that would "
                "step with them; use an ordinary step"
            )


def _refuse_capture() -> None:
    if capturing():
        raise RuntimeError(
            "released gradients cannot be captured in a CUDA graph: the host counts which parameters were "
            "stepped, and their gradients are freed. Call remove() on the handle of release_gradients(), or "
            "leave the step out of the graph"
        )


def _refuse_unreduced(param: Tensor) -> None:
    distributed = torch.distributed
    if _is_sharded(param):
        return  # fully_shard calls hooks after it has reduced the gradient
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise RuntimeError(
            f"gradients are released in one of {distributed.get_world_size()} processes: each would step "
            "with its own gradients, before they are averaged. Use an ordinary step"
        )


def _check_params(model: nn.Module, optimizer: Optimizer) -> None:
    own = {id(param) for param in model.parameters()}
    released = {key for other in _live for key in other._hooks}
    for group_index, group in enumerate(optimizer.param_groups):
        for index, param in enumerate(group["params"]):
            if id(param) not in own:
                raise ValueError(
                    f"{describe(group, group_index, index)} is the optimizer's but not the model's; pass one "
                    "module that holds all of them, such as nn.ModuleList([model, head])"
                )
            if id(param) in released:
                who = describe(group, group_index, index)
                raise ValueError(f"{who} is released already; remove() that first")
    if is_released(optimizer):
        raise ValueError("the optimizer's gradients are released already; remove() that first")
