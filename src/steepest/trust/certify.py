"""Certify that a training resumes to the bit: save, new process, load, go on = never stopped."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from steepest.trust.errors import CertifyRequestError
from steepest.trust.resume import MISSING, Resume, in_new_process, kept
from steepest.trust.training import (
    NamedFunction,
    Run,
    Training,
    digest,
    indexable,
    own_randomness,
    seed_generators,
)
from steepest.trust.verdict import Certificate, Difference, compare
from steepest.trust.ways import WAYS, Way, save

__all__ = ["certify", "certify_function"]


def certify(
    make_model: Callable[[], torch.nn.Module],
    make_optimizer: Callable[[torch.nn.Module], Any],
    batches: Callable[[int], Any] | Iterable[Any],
    loss: Callable[[torch.nn.Module, Any], Tensor],
    *,
    steps: int = 10,
    stop_after: int | None = None,
    via: Way = "torch.save",
    seed: int = 0,
    process: Literal["new", "same"] | None = None,
) -> Certificate:
    """Train without stopping, and with a checkpoint that another process goes on from; compare every bit.

    Compared after every step: parameters, buffers, the optimizer's state and options, the scheduler. Runs
    begin with torch's and Python's generators seeded; the process that resumes has another seed, so that
    what the checkpoint lacks cannot be right by chance. The generators' states are part of the checkpoint.

    Args:
        make_model: makes the model, on its device.
        make_optimizer: makes any torch optimizer for it; or, as a tuple, it and a learning-rate scheduler,
            which then steps after each of its steps. A step that needs a closure, as L-BFGS's, gets one
            (torch.distributed.checkpoint cannot save L-BFGS); ``ReduceLROnPlateau`` gets the loss.
        batches: a function of i that returns batch i, a sequence of batches, or an iterable (of which the
            first ``steps`` are kept).
        loss: returns the scalar whose gradients are computed.
        steps: of the training.
        stop_after: the steps before the checkpoint; 0 saves before the first. Default: half of them.
        via: ``"torch.save"`` (:func:`steepest.save_checkpoint`), or ``"dcp"`` or ``"dcp_flat"``,
            torch.distributed.checkpoint with the optimizer's state nested or flattened; or your own
            ``(save, load)``, each a function of a path that does not exist yet, the model, and what
            ``make_optimizer`` returned.
        seed: of the first run.
        process: ``"new"``: functions must be importable by their module and name, from another module than
            ``__main__``. ``"same"``: new objects in this process resume. Default: new if possible.

    Returns:
        The verdict, of which ``str()`` says what differs first, in which tensor, by how much, and the usual
        causes.

    Raises:
        ValueError: arguments that make no sense; too few batches; functions that no new process can import.
            It is a ``steepest.trust.CertifyRequestError``; errors of these functions are raised as they are.
        RuntimeError: the new process failed.

    >>> import steepest
    >>> certificate = certify(
    ...     lambda: torch.nn.Linear(4, 2),
    ...     lambda model: steepest.Lion(model.parameters(), lr=0.01),
    ...     lambda i: torch.full((3, 4), float(i)),
    ...     lambda model, batch: model(batch).square().mean(),
    ... )
    >>> certificate.identical
    True
    >>> print(certificate)
    identical: 5 steps, save (torch.save), new objects in the same process, load, 5 steps = 10 steps, in every
    bit of ... tensors and options
    """
    _check(steps, stop_after, via)
    if process not in (None, "new", "same"):
        raise CertifyRequestError(f"process must be 'new' or 'same', got {process!r}")
    training = Training(make_model, make_optimizer, indexable(batches, steps), loss)
    importable = process == "same" or _is_importable((training, via))
    if process == "new" and not importable:
        raise CertifyRequestError(
            "a new process cannot import these functions: define them at the top of a module other than the "
            "script that is run, or leave process out"
        )
    return _certify(training, steps, stop_after, via, seed, process or ("new" if importable else "same"))


def certify_function(
    name: str, *, steps: int = 10, stop_after: int | None = None, via: str = "torch.save", seed: int = 0
) -> Certificate:
    """Certify, in a new process, the training that ``package.module:function`` returns.

    The function takes no arguments and returns :func:`steepest.certify`'s first four, as a tuple or as a
    dict of ``make_model``, ``make_optimizer``, ``batches`` and ``loss``. They may be local to it: the new
    process calls it too, with the generators seeded alike.

    Args:
        name: of the function, such as ``"package.module:function"``.
        steps, stop_after, via, seed: see :func:`steepest.certify`.

    Raises:
        ValueError: there is no such function, or it returns something else, or as for
            :func:`steepest.certify`.
        RuntimeError: the new process failed.
    """
    _check(steps, stop_after, via)
    return _certify(NamedFunction(name, steps), steps, stop_after, via, seed, "new")


def _check(steps: int, stop_after: int | None, via: Any) -> None:
    if steps < 1:
        raise CertifyRequestError(f"steps must be at least 1, got {steps}")
    if stop_after is not None and not 0 <= stop_after < steps:
        raise CertifyRequestError(
            f"stop_after must be at least 0 and less than steps, got {stop_after} of {steps}"
        )
    is_pair = isinstance(via, tuple) and len(via) == 2 and all(map(callable, via))
    if not (is_pair or (isinstance(via, str) and via in WAYS)):
        raise CertifyRequestError(
            f"via must be one of {', '.join(WAYS)}, or a pair of functions, got {via!r}"
        )


def _is_importable(functions: Any) -> bool:
    """Return whether a new process, whose ``__main__`` is another, could unpickle them."""
    try:
        return b"__main__" not in pickle.dumps(functions)
    except (pickle.PicklingError, AttributeError, TypeError):
        return False


def _certify(
    source: Callable[[], Training], steps: int, stop_after: int | None, via: Way, seed: int, process: str
) -> Certificate:
    stop = steps // 2 if stop_after is None else stop_after
    with own_randomness(), tempfile.TemporaryDirectory(prefix="steepest-certify-") as name:
        seed_generators(seed)
        training, folder = source(), Path(name)
        expected: list[dict[str, str]] = []
        _straight(training, seed, steps, lambda step, values: expected.append(_digests(values)))
        differences: dict[str, Difference] = {}

        def note(step: int, values: Mapping[str, Any]) -> None:
            for each, code in _digests(values).items():
                if expected[step].get(each) != code:
                    differences.setdefault(each, Difference(step, each))

        run = _straight(training, seed, stop, note)
        deterministic = not differences
        if deterministic:
            save(via, folder / "checkpoint", run)
            resume = Resume(source, folder / "checkpoint", via, seed, stop, expected)
            found = in_new_process(resume, folder) if process == "new" else resume()
            if found:
                true: dict[str, Any] = {}

                def keep(step: int, values: Mapping[str, Any]) -> None:
                    note(step, values)
                    true.update({n: kept(v) for n, v in values.items() if found.get(n, (None,))[0] == step})

                _straight(training, seed, steps, keep)
                deterministic = not differences
                if deterministic:
                    for each, (step, value) in found.items():
                        differences[each] = compare(step, each, true.get(each, MISSING), value)
    # Python's sort keeps the order of kinds that the runs' values have.
    order = {each: at for at, each in enumerate(dict.fromkeys(n for digests in expected for n in digests))}
    ordered = sorted(differences.values(), key=lambda each: (each.step, order.get(each.name, len(order))))
    return Certificate(
        identical=not ordered,
        deterministic=deterministic,
        differences=tuple(ordered),
        steps=steps,
        stop_after=stop,
        via=via if isinstance(via, str) else "own functions",
        process=process,
        compared=len(expected[-1]),
    )


def _straight(
    training: Training, seed: int, steps: int, look: Callable[[int, Mapping[str, Any]], None]
) -> Run:
    """Train without stopping; ``look`` sees the values before the first step and after each."""
    run = Run(training, seed)
    look(0, run.values())
    for step in range(1, steps + 1):
        run.step()
        look(step, run.values())
    return run


def _digests(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: digest(value) for name, value in values.items()}
