"""Run the benchmark: all sections in order, saving each result at once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path

import torch

from ..errors import LabError
from ..machine import describe
from .callbacks import Callback
from .groups import select_groups
from .params import available_bytes
from .results import Record, markdown
from .section import BenchConfig, Section
from .sections import ON_REQUEST, SECTIONS
from .shapes import model_shapes

ROUNDS = 9
JSON, REPORT, PLOT = "bench.json", "RESULTS.md", "bench.png"
DEFAULT_MODELS = ("gpt2-124m",)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_MEMORY_FRACTION = 0.6
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
    "dion",
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
    callback: Callback | None = None,
) -> Record:
    """Run the sections; an interrupt ends the run but keeps the results so far.

    Args:
        models: Names from `MODELS`.
        optimizers: Names from `steepest.list_optimizers()`; by default all. The sections `machine`,
            `symmetric`, `polar`, `ternary` and `sharded` ignore them.
        sections: Names from `SECTIONS`; by default all but those in `ON_REQUEST`.
        device: A CPU or CUDA device.
        dtype: Dtype of parameters and gradients: one of `DTYPES`.
        rounds: Rounds per measurement; results for publication need at least 9.
        blocks: Number of a model's blocks whose hidden matrices the matrix rules update; 0 means all. By
            default 1 on a CPU, where a step of all blocks would take minutes, and all elsewhere.
        eager: Measure steepest's optimizers in eager mode.
        compiled: Measure them compiled.
        peers: Also measure other packages' optimizers that are installed.
        memory: GiB that the tensors of one measurement may take; by default a part of the free memory.
        full: Run all measurements: the first steps of all rules, the steps of the largest model,
            redundant peers. Optimizers named in `optimizers` are always measured in full.
        out: A directory for the record as JSON and Markdown, rewritten after each result.
        callback: Receives progress events.

    Raises:
        LabError: the request is invalid.
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
    selected = _sections(sections)
    if blocks is None and device.type == "cpu":
        blocks = _BLOCKS_ON_CPU
    full = full or optimizers is not None
    config = BenchConfig(
        models=[model_shapes(name) for name in models],
        groups=select_groups(
            optimizers, eager=eager, compiled=compiled, peers=peers, full=full, device=device
        ),
        device=device,
        dtype=DTYPES[dtype],
        rounds=rounds,
        blocks=blocks or None,
        memory=int(memory * 2**30) if memory else int(_MEMORY_FRACTION * available_bytes(device)),
        full=full,
    )
    callback = Callback() if callback is None else callback
    machine = {**describe(device), "packages": _versions()}
    record = Record(machine, {**config.to_json(), "sections": [section.name for section in selected]})
    callback.on_start(sum(section.work_units(config) for section in selected))
    try:
        # Streams, graphs and other packages' kernels use the current device.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            for section in selected:
                for result in section.run(config, callback):
                    record.results.append(result)
                    _save(record, out)
    except KeyboardInterrupt:
        record.interrupted = True
        _save(record, out)
    finally:
        callback.on_end()
    return record


def _sections(names: Sequence[str] | None) -> list[Section]:
    for name in names or ():
        if name not in SECTIONS:
            raise LabError(f"no section {name!r}; there are {', '.join(SECTIONS)}")
    wanted = SECTIONS.keys() - ON_REQUEST if names is None else names
    return [section for name, section in SECTIONS.items() if name in wanted]


def _save(record: Record, out: Path | None) -> None:
    if out is None:
        return
    record.save(out / JSON)
    (out / REPORT).write_text(report(record), encoding="utf-8")


def report(record: Record) -> str:
    """Format the whole record as Markdown."""
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
        lines += ["The run was interrupted; these are the results so far.", ""]
    return "\n".join(lines) + "\n" + "\n\n".join(markdown(result) for result in record.results) + "\n"


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
