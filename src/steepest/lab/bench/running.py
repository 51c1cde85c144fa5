"""A whole run: the sections one after the other, kept as they come."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path

import torch

from ..errors import LabError
from ..machine import describe
from .families import families
from .material import available_bytes
from .results import Record, markdown
from .section import Section, Setting
from .sections import SECTIONS
from .shapes import shape_list
from .watch import Silent, Watcher

ROUNDS = 9
JSON, REPORT, PICTURE = "bench.json", "RESULTS.md", "bench.png"
DEFAULT_MODELS = ("gpt2-124m",)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_SHARE_OF_MEMORY = 0.6
_BLOCKS_ON_CPU = 1
_PACKAGES = (
    "torch",
    "triton",
    "lion-pytorch",
    "sgd-sai",
    "pytorch_optimizer",
    "heavyball",
    "torch-optimi",
    "quad-torch",
)


def bench(
    models: Sequence[str] = DEFAULT_MODELS,
    optimizers: Sequence[str] | None = None,
    *,
    sections: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
    dtype: str = "float32",
    rounds: int = ROUNDS,
    blocks: int | None = None,
    eager: bool = True,
    compiled: bool = True,
    peers: bool = True,
    memory: float | None = None,
    full: bool = False,
    out: Path | None = None,
    watcher: Watcher | None = None,
) -> Record:
    """Measure, section by section; an interrupt ends it with what has been found so far.

    Args:
        models: Names of `SHAPE_LISTS`.
        optimizers: Names of `steepest.list_optimizers()`; all by default. The sections `machine`,
            `symmetric` and `ternary` have none.
        sections: Names of `SECTIONS`; all by default.
        device: A CPU or CUDA device.
        dtype: Of parameters and gradients: one of `DTYPES`.
        rounds: Rounds of every measurement; what counts is 9 or more.
        blocks: Matrix rules step the hidden matrices of so many of a model's blocks. By default 1 on a CPU,
            where all of them would take minutes a step, and all elsewhere. 0 means all.
        eager: Measure steepest's optimizers eagerly.
        compiled: And compiled.
        peers: And other packages' beside them, as far as they are installed.
        memory: GiB that the tensors of one measurement may take; by default a part of what is free.
        full: Leave nothing out: the first steps of all rules, the largest model timed, peers that repeat
            others. So is whatever is asked for by name in `optimizers`.
        out: A folder for the record as JSON and as Markdown, written anew after each section.
        watcher: Is told how it goes.

    Raises:
        LabError: a request that cannot be served.
    """
    device = torch.device(device)
    if rounds < 1:
        raise LabError(f"rounds must be at least 1, got {rounds}")
    if blocks is not None and blocks < 0:
        raise LabError(f"blocks must be at least 1, or 0 for all, got {blocks}")
    if memory is not None and not memory > 0:
        raise LabError(f"memory must be positive, in GiB, got {memory}")
    if dtype not in DTYPES:
        raise LabError(f"no dtype {dtype!r}: give {', '.join(DTYPES)}")
    if not models:
        raise LabError("no model to benchmark: name at least one")
    chosen = _sections(sections)
    if blocks is None and device.type == "cpu":
        blocks = _BLOCKS_ON_CPU
    full = full or optimizers is not None
    setting = Setting(
        models=[shape_list(name) for name in models],
        families=families(optimizers, eager=eager, compiled=compiled, peers=peers, full=full, device=device),
        device=device,
        dtype=DTYPES[dtype],
        rounds=rounds,
        blocks=blocks or None,
        memory=int(memory * 2**30) if memory else int(_SHARE_OF_MEMORY * available_bytes(device)),
        full=full,
    )
    watcher = Silent() if watcher is None else watcher
    machine = {**describe(device), "packages": _versions()}
    record = Record(machine, {**setting.plain(), "sections": [section.name for section in chosen]})
    watcher.planned(sum(section.pieces(setting) for section in chosen))
    try:
        # Streams, graphs and other packages' kernels are of the current device.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            for section in chosen:
                for result in section.run(setting, watcher):
                    record.results.append(result)
                    _keep(record, out)
    except KeyboardInterrupt:
        record.interrupted = True
        _keep(record, out)
    finally:
        watcher.closed()
    return record


def _sections(names: Sequence[str] | None) -> list[Section]:
    for name in names or ():
        if name not in SECTIONS:
            raise LabError(f"no section {name!r}; there are {', '.join(SECTIONS)}")
    return [section for name, section in SECTIONS.items() if names is None or name in names]


def _keep(record: Record, out: Path | None) -> None:
    if out is None:
        return
    record.save(out / JSON)
    (out / REPORT).write_text(report(record), encoding="utf-8")


def report(record: Record) -> str:
    """The whole record as Markdown."""
    machine, settings = record.machine, record.settings
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    lines = [
        f"# {machine['cpu']}, {machine['threads']} of {machine['cores']} cores, {machine['device_name']}",
        "",
        f"{settings['dtype']}, {settings['rounds']} rounds; {machine['system']}, Python {machine['python']}, "
        f"steepest {machine['steepest']}, {packages}.",
        "",
    ]
    if record.interrupted:
        lines += ["Interrupted: what follows is what had been measured by then.", ""]
    return "\n".join(lines) + "\n" + "\n\n".join(markdown(result) for result in record.results) + "\n"


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
