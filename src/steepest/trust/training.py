"""A user's training as :func:`steepest.certify` runs it: made anew, stepped, and looked at."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import inspect
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_leaves_with_path

from steepest.trust.errors import CertifyRequestError

__all__ = ["NamedFunction", "Run", "Training", "digest", "indexable", "own_randomness", "seed_generators"]

_PLAIN = (bool, int, float, str, type(None), torch.dtype)


@dataclass(frozen=True)
class Training:
    """The model, optimizer, batches and loss that :func:`steepest.certify` takes."""

    make_model: Callable[[], torch.nn.Module]
    make_optimizer: Callable[[torch.nn.Module], Any]
    batches: Callable[[int], Any] | Sequence[Any]
    loss: Callable[[torch.nn.Module, Any], Tensor]

    def __call__(self) -> Training:
        """Return itself, as a named function returns the one that it names."""
        return self


def indexable(batches: Any, steps: int) -> Any:
    """Return a function or a sequence as it is, and of an iterable a list of the first ``steps``.

    Raises:
        CertifyRequestError: there are fewer.
    """
    if callable(batches):
        return batches
    # torch gives an IterableDataset the method that a sequence has.
    of_iterable = isinstance(batches, torch.utils.data.IterableDataset)
    if of_iterable or not (hasattr(batches, "__getitem__") and hasattr(batches, "__len__")):
        batches = list(itertools.islice(batches, steps))
    if len(batches) < steps:
        raise CertifyRequestError(f"{len(batches)} batches are too few for {steps} steps")
    return batches


@dataclass(frozen=True)
class NamedFunction:
    """A function of no arguments that returns a training, as ``package.module:function``."""

    name: str
    steps: int

    def __call__(self) -> Training:
        """Import the function and call it.

        Raises:
            CertifyRequestError: there is no such function, or it returns something else.
        """
        module, colon, function = self.name.partition(":")
        if not (module and colon and function):
            raise CertifyRequestError(f"name a function as package.module:function, not {self.name!r}")
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise CertifyRequestError(f"cannot import {module!r}: {error}") from error
        if not callable(make := getattr(found, function, None)):
            raise CertifyRequestError(f"the module {module!r} has no function {function!r}")
        parts = make()
        names = [field.name for field in fields(Training)]
        if isinstance(parts, Mapping) and set(parts) == set(names):
            parts = tuple(parts[name] for name in names)
        if not (isinstance(parts, tuple) and len(parts) == len(names)):
            raise CertifyRequestError(f"{self.name} must return a tuple or a dict of {', '.join(names)}")
        made = Training(*parts)
        return replace(made, batches=indexable(made.batches, self.steps))


@contextlib.contextmanager
def own_randomness() -> Iterator[None]:
    """Leave torch's generators, and Python's, as they are."""
    before = random.getstate()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(before)


def seed_generators(seed: int) -> None:
    """Seed torch's generators and Python's."""
    torch.manual_seed(seed)
    random.seed(seed)


class Run:
    """A model and its optimizer, made with a seed, and the steps they have taken."""

    def __init__(self, training: Training, seed: int) -> None:
        seed_generators(seed)
        self.training = training
        self.model = training.make_model()
        self.made = training.make_optimizer(self.model)
        """What ``make_optimizer`` returned: the optimizer, or it and a scheduler."""
        pair = self.made if isinstance(self.made, tuple) else (self.made, None)
        if len(pair) != 2:
            raise CertifyRequestError(
                "make_optimizer must return an optimizer, or a tuple of it and a scheduler, not a tuple of "
                f"{len(pair)}"
            )
        self.optimizer, self.scheduler = pair
        self.taken = 0

    def step(self) -> None:
        """Train on the next batch."""
        batches = self.training.batches
        batch = batches(self.taken) if callable(batches) else batches[self.taken]

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = self.training.loss(self.model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        if _needs_closure(self.optimizer):
            loss = self.optimizer.step(closure)
        else:
            loss = closure()
            self.optimizer.step()
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(loss.item())
        elif self.scheduler is not None:
            self.scheduler.step()
        self.taken += 1

    def values(self) -> dict[str, Any]:
        """Return tensors and plain values by what they are: first the model's, then the optimizer's."""
        values: dict[str, Any] = {f"parameter {name}": p for name, p in self.model.named_parameters()}
        values |= {f"buffer {name}": buffer for name, buffer in self.model.named_buffers()}
        names = {param: name for name, param in self.model.named_parameters()}
        for index, group in enumerate(self.optimizer.param_groups):
            for at, param in enumerate(group["params"]):
                who = names.setdefault(param, f"parameter {at} of group {index}")
                for key, value in self.optimizer.state.get(param, {}).items():
                    values |= _leaves(value, "state " + str(key), f" of {who}")
        for index, group in enumerate(self.optimizer.param_groups):
            for key, value in group.items():
                if key != "params":
                    values |= _leaves(value, f"option {key}", f" of group {index}")
        if self.scheduler is not None:
            for key, value in self.scheduler.state_dict().items():
                values |= _leaves(value, f"{key} of the scheduler", "")
        return values


def _needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether ``step`` cannot be called without one, as L-BFGS's."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def _leaves(value: Any, name: str, whose: str) -> dict[str, Any]:
    return {
        f"{name}{keystr(where)}{whose}": leaf
        for where, leaf in tree_leaves_with_path(value)
        if isinstance(leaf, (Tensor, *_PLAIN))
    }


def digest(value: Any) -> str:
    """Return a text that differs where dtype, shape or a bit does.

    >>> digest(torch.tensor(0.0)) == digest(torch.tensor(-0.0))
    False
    """
    if not isinstance(value, Tensor):
        return repr(value)
    own = value.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    content = (ctypes.c_char * own.numel()).from_address(own.data_ptr()) if own.numel() else b""
    code = hashlib.blake2b(content, digest_size=16).hexdigest()
    return f"{value.dtype} {tuple(value.shape)} {code}"
