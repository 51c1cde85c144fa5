"""The step within backward: each parameter is stepped, and its gradient freed, as soon as it is ready."""

from __future__ import annotations

import contextlib
import math
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steepest.engine.collect import describe
from steepest.engine.cuda_graphs import capturing
from steepest.engine.grad_check import both, check_gradients
from steepest.optimizer import Optimizer
from steepest.rule import Group, find_rule

__all__ = ["ReleasedGradients", "release_gradients"]

# As torch.nn.utils.clip_grad_norm_ has it: a norm of zero divides nothing.
_CLIP_EPS = 1e-6


@dataclass(slots=True)
class Place:
    """Where a parameter stands: its group, its index there, and its ordinal among all parameters."""

    group_index: int
    index: int
    ordinal: int


_live: weakref.WeakSet[ReleasedGradients] = weakref.WeakSet()


def release_gradients(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    clip_value: float | None = None,
    clip_norm: float | None = None,
) -> ReleasedGradients:
    r"""Step every parameter within ``backward()``, and free its gradient at once.

    The gradients of a whole model never exist together: at most a few do. The training loop stays as it
    is, ``backward()``, ``optimizer.step()``, schedulers, ``zero_grad()``: ``step()`` finds the work done,
    steps what backward did not reach, and *ends the step*, so it must be called. Every parameter takes
    the step that ``optimizer.step()`` would have given it, by the same code, once: a second gradient
    before ``step()`` is an error. What is stepped alone is not stacked with others, so that matrix rules
    agree to rounding; the other rules agree bit for bit.

    What is different, since the first parameters have moved when the last gradients are computed:

    - ``nonfinite="skip"`` passes over the *parameter* whose gradient is not finite; ``skipped_steps``
      counts the steps in which there was one. ``nonfinite="raise"``, which promises that nothing was
      changed, is refused, and so are rules whose step relates a group's tensors to one another (SGDSaI
      with ``normalize="max"``, PSGD with ``literal=True``).
    - Clipping after backward finds no gradients. ``clip_value`` is exact: gradient elements are clamped
      to ±``clip_value``. ``clip_norm`` scales by the norm of all gradients *of the last step*,

      .. math:: g \leftarrow g \cdot \min\bigl(1, c / (N_{t-1} + 10^{-6})\bigr)

      and in the first step by the norm of each parameter's own. N is measured before clipping, over
      what was stepped, and a step whose N is not finite leaves it as it was; it is kept in the param
      groups as ``last_grad_norm``, so that checkpoints have it.
    - The learning rate is the one during backward; what a pre-hook of ``step()`` does comes too late.
    - ``GradScaler`` is refused in its ``step()``: gradients that are scaled cannot be stepped with.
    - An error in backward leaves every parameter either stepped or as it was. To go on,
      ``zero_grad()`` and ``step()`` end the step that failed.

    To accumulate gradients, run all backward passes but the last within
    :meth:`ReleasedGradients.accumulate`. They are all kept then, and the memory is that of an ordinary
    step.

    Parameters that are added to the optimizer, or thawed, later are stepped by ``step()`` the first time
    and within backward from then on. ``compile`` means the same for each parameter alone: by default only
    those of 2²² elements or more are stepped in compiled code.

    State: the optimizer's, as ever; with ``clip_norm`` one number more for the whole optimizer.

    Args:
        model: the module whose backward passes step; it must hold all of the optimizer's parameters.
        optimizer: an optimizer of this library. Copies, pickles and state dicts of it are ordinary ones.
        clip_value: largest magnitude of a gradient's element, > 0. Of complex ones, of each part.
        clip_norm: c > 0, as above. One of the two at most.

    Returns:
        A handle, also a context manager: :meth:`~ReleasedGradients.remove` makes all ordinary again.

    Raises:
        TypeError: ``model`` is no module, ``optimizer`` none of this library.
        ValueError: a clip that is no number > 0; an optimizer or a parameter that is released already;
            a parameter that is not the model's; a rule or an option as above; a model within
            DistributedDataParallel or FullyShardedDataParallel.
            In a step's first gradient, before anything has moved: what ``step()`` raises it for, such as an
            option in a param group that the rule does not take.
        RuntimeError: in backward: a second gradient in one step; several processes, whose gradients
            would have to be averaged first.

    Source: the technique is torch's tutorial "How to save memory by fusing the optimizer step into the
    backward pass"; see also Lv et al., "Full Parameter Fine-tuning for Large Language Models with Limited
    Resources" (LOMO), arXiv 2306.09782 (2023).

    >>> from steepest import SignGSD
    >>> model = nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.zeros_(model.weight)
    >>> optimizer = SignGSD(model.parameters(), lr=0.5)
    >>> released = release_gradients(model, optimizer)
    >>> model(torch.tensor([1.0, -1.0])).sum().backward()
    >>> model.weight.tolist(), model.weight.grad
    ([[-0.5, 0.5]], None)
    >>> optimizer.step()
    >>> model.weight.tolist()
    [[-0.5, 0.5]]
    """
    return ReleasedGradients(model, optimizer, clip_value=clip_value, clip_norm=clip_norm)


class ReleasedGradients:
    """The handle of :func:`release_gradients`, which says what its arguments are and what it raises."""

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
                "release_gradients() takes an optimizer of steepest, whose step can be taken parameter by "
                f"parameter, got {type(optimizer).__module__}.{type(optimizer).__name__}"
            )
        for name, value in (("clip_value", clip_value), ("clip_norm", clip_norm)):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value < math.inf):
                raise ValueError(f"release_gradients(): {name} must be None or a number > 0, got {value!r}")
        if clip_value is not None and clip_norm is not None:
            raise ValueError("release_gradients(): choose one of clip_value and clip_norm")
        _refuse_wrapped(model)
        for index, group in enumerate(optimizer.param_groups):
            if why := _unsupported(index, group):
                raise ValueError(why)
        _check_params(model, optimizer)
        self._optimizer = optimizer
        self._clip_value, self._clip_norm = clip_value, clip_norm
        self._accumulating = False
        self._hooks: dict[int, tuple[Tensor, RemovableHandle]] = {}
        self._places: dict[int, Place] = {}
        self._stepped: set[int] = set()
        # A device's threads run the hooks of its parameters: only what is atomic may be done to these.
        self._squares: list[Tensor] = []
        self._taken: list[bool | Tensor] = []
        self._before_step_handle = optimizer.register_step_pre_hook(self._before_step)
        # GradScaler then calls step() itself, which can say what is wrong; see _before_step.
        optimizer.__dict__["_step_supports_amp_scaling"] = True
        self._attach()
        _live.add(self)

    # -- what a user calls

    def remove(self) -> None:
        """Make backward and ``step()`` ordinary again. Gradients that are still there stay."""
        if self not in _live:
            return
        for _, handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()
        self._before_step_handle.remove()
        self._optimizer.__dict__.pop("_step_supports_amp_scaling", None)
        _live.discard(self)

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Within it backward adds up gradients, as ever, and steps nothing.

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

        Measured with ``clip_norm`` alone; None without it and before the first step.
        """
        last = self._last_norm()
        norm = math.nan if last is None else float(last)
        return None if math.isnan(norm) else norm

    def __enter__(self) -> ReleasedGradients:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    # -- in backward

    # Compiled autograd would trace the hook, and with it every step, into the model's backward.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def _on_gradient(self, param: Tensor) -> None:
        if self._place(param) is None:
            return  # taken out of the optimizer: its gradient is somebody else's
        _refuse_several_processes()
        self._refuse_second(param)
        if not self._accumulating:
            _refuse_capture()
            self._step(param)

    def _step(self, param: Tensor) -> None:
        """The step of one parameter that has its whole gradient."""
        place = self._place(param)
        assert place is not None
        optimizer = self._optimizer
        if not self._stepped:
            optimizer._collector.check(type(optimizer).__name__, optimizer.param_groups)
        group = optimizer.param_groups[place.group_index]
        if why := _unsupported(place.group_index, group):
            raise RuntimeError(why)
        batch = optimizer._collector.one(
            optimizer.param_groups, place.group_index, place.index, place.ordinal, optimizer.state
        )
        (member,) = batch.members
        # Not in place: other gradients, of which backward still needs some, may lie in the same memory.
        if self._clip_value is not None:
            member.grad = member.grad.clamp(-self._clip_value, self._clip_value)
        elif self._clip_norm is not None:
            member.grad = self._clipped(member.grad)
        self._taken.append(optimizer._take([batch], check_gradients([batch])))
        self._stepped.add(id(param))
        param.grad = None

    def _clipped(self, grad: Tensor) -> Tensor:
        assert self._clip_norm is not None
        # Apple's GPUs have no float64.
        wide = torch.float32 if grad.device.type == "mps" else torch.float64
        own = torch.linalg.vector_norm(grad, dtype=wide)
        self._squares.append(own.square())
        last = self._last_norm()
        norm = own if last is None else torch.as_tensor(last, dtype=wide, device=grad.device)
        norm = torch.where(norm.isnan(), own, norm)
        factor = (self._clip_norm / (norm + _CLIP_EPS)).clamp(max=1)
        # Without dimensions it would take the factor's dtype.
        return (grad * factor).to(grad.dtype)

    def _last_norm(self) -> float | Tensor | None:
        norm: float | Tensor | None = self._optimizer.param_groups[0].get("last_grad_norm")
        return norm

    def _place(self, param: Tensor) -> Place | None:
        place = self._places.get(id(param))
        groups = self._optimizer.param_groups
        if place is None or not (
            place.group_index < len(groups)
            and place.index < len(groups[place.group_index]["params"])
            and groups[place.group_index]["params"][place.index] is param
        ):
            self._find_places()
            place = self._places.get(id(param))
        return place

    def _find_places(self) -> None:
        places: dict[int, Place] = {}
        ordinal = 0
        for group_index, group in enumerate(self._optimizer.param_groups):
            for index, param in enumerate(group["params"]):
                places.setdefault(id(param), Place(group_index, index, ordinal))
                ordinal += 1
        self._places = places

    def _refuse_second(self, param: Tensor) -> None:
        if id(param) in self._stepped:
            place = self._place(param)
            assert place is not None
            group = self._optimizer.param_groups[place.group_index]
            raise RuntimeError(
                f"{describe(group, place.group_index, place.index)} was stepped already and got another "
                "gradient: call optimizer.step() after each backward (after one that failed, zero_grad() "
                "and step()), and run all but the last of several within released.accumulate()"
            )

    # -- in step()

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
        """Step what backward did not, and settle what is counted and measured over the whole step."""
        self._find_places()
        groups = [group for group in self._optimizer.param_groups if not find_rule(group["rule"]).moves]
        params = {id(p): p for group in groups for p in group["params"] if p.grad is not None}
        for param in params.values():
            self._refuse_second(param)
        for param in params.values():
            self._step(param)
        self._stepped.clear()
        taken, self._taken = self._taken, []
        # step() counts it, together with what it finds itself.
        whole: bool | Tensor = True
        for each in taken:
            whole = both(whole, each)
        self._optimizer.__dict__["_taken_in_backward"] = whole
        squares, self._squares = self._squares, []
        if squares:
            self._keep_norm(torch.stack([each.to(squares[0].device) for each in squares]).sum().sqrt())
        self._attach()

    def _keep_norm(self, norm: Tensor) -> None:
        last = self._last_norm()
        kept: float | Tensor | None
        if norm.device.type == "cpu":
            kept = float(norm) if norm.isfinite() else last
        else:
            # Only the device knows whether there is one: NaN says that there is none yet.
            known = torch.as_tensor(math.nan if last is None else last).to(norm)
            kept = torch.where(norm.isfinite(), norm, known)
        if kept is not None:
            for group in self._optimizer.param_groups:
                group["last_grad_norm"] = kept

    def _attach(self) -> None:
        """Hook the parameters that need gradients and have no hook: all, and later the new ones."""
        self._find_places()
        current = {id(p): p for group in self._optimizer.param_groups for p in group["params"]}
        for gone in self._hooks.keys() - current.keys():
            self._hooks.pop(gone)[1].remove()
        for key, param in current.items():
            moves = find_rule(self._optimizer.param_groups[self._places[key].group_index]["rule"]).moves
            # What moves a target is left to step(): a layer may vote several times.
            if param.requires_grad and key not in self._hooks and not moves:
                handle = param.register_post_accumulate_grad_hook(_weakly(self._on_gradient))
                self._hooks[key] = (param, handle)


def _weakly(method: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """The method while its object lives.

    The garbage collector does not look into a tensor's hooks: one that held the handle, and so the
    parameters, would keep them for ever. The optimizer's own hook keeps the handle.
    """
    reference = weakref.WeakMethod(method)

    def hook(param: Tensor) -> None:
        if (living := reference()) is not None:
            living(param)

    return hook


# -- what cannot be released


def _unsupported(index: int, group: Group) -> str | None:
    """Why a group's parameters cannot be stepped one after the other; None if they can."""
    if group["nonfinite"] == "raise":
        return (
            f"group {index}: nonfinite='raise' promises that nothing was changed, which a step within "
            "backward cannot hold; 'skip' passes over single parameters"
        )
    if why := find_rule(group["rule"]).relates(group):
        return (
            f"group {index}: with {why} a step of {group['rule']!r} relates a group's tensors to one "
            "another, so that none can be stepped before the last gradient is there"
        )
    return None


def _refuse_wrapped(model: nn.Module) -> None:
    kinds: list[type] = [nn.parallel.DistributedDataParallel]
    # It can exist only where it is imported, and the import takes a second.
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
            "released gradients cannot be captured in a CUDA graph: which parameters were stepped is counted "
            "on the host, and their gradients are freed. remove() the release, or leave the step out of the "
            "graph"
        )


def _refuse_several_processes() -> None:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise RuntimeError(
            f"gradients are released in one of {distributed.get_world_size()} processes: each would step "
            "with its own before they are averaged. Use an ordinary step"
        )


def _check_params(model: nn.Module, optimizer: Optimizer) -> None:
    own = {id(param) for param in model.parameters()}
    for group_index, group in enumerate(optimizer.param_groups):
        for index, param in enumerate(group["params"]):
            who = describe(group, group_index, index)
            if id(param) not in own:
                raise ValueError(
                    f"{who} is the optimizer's but not the model's; pass one module that holds all of "
                    "them, such as nn.ModuleList([model, head])"
                )
            if any(id(param) in other._hooks for other in _live):
                raise ValueError(f"{who} is released already; remove() that first")
    if any(other._optimizer is optimizer for other in _live):
        raise ValueError("the optimizer's gradients are released already; remove() that first")
