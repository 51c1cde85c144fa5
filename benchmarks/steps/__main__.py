"""`python -m benchmarks.steps`: all sections in order, saving each table at once."""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from steepest.lab.training.machine import describe
from steepest.lab.training.peak_memory import available_bytes
from steepest.model_shapes import MODELS, model_shapes

from .config import BenchConfig
from .groups import select_groups
from .results import Result, error_line, markdown
from .sections import ON_REQUEST, SECTIONS

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


def main(arguments: list[str] | None = None) -> list[Result]:
    """Run the command line and return the tables."""
    args = _parser().parse_args(arguments)
    device = torch.device(args.device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    optimizers = args.optimizers.split(",") if args.optimizers else None
    full = args.full or optimizers is not None
    blocks = args.blocks if args.blocks is not None else 1 if device.type == "cpu" else 0
    config = BenchConfig(
        models=[model_shapes(name) for name in args.model.split(",")],
        groups=select_groups(
            optimizers, eager=args.eager, compiled=args.compile, peers=args.peers, full=full, device=device
        ),
        device=device,
        dtype=getattr(torch, args.dtype),
        rounds=args.rounds,
        blocks=blocks or None,
        memory=int(args.memory * 2**30) if args.memory else int(0.6 * available_bytes(device)),
        full=full,
    )
    sections = args.sections.split(",") if args.sections else [s for s in SECTIONS if s not in ON_REQUEST]
    results: list[Result] = []
    # Streams, graphs and other packages' kernels use the current device.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for name in sections:
            try:
                for result in SECTIONS[name](config):
                    results.append(result)
                    print(markdown(result), end="\n\n", flush=True)
                    save(results, config, args.out)
            except Exception as error:
                results.append(Result(name, f"{name} failed", (), [], [error_line(error)]))
                print(markdown(results[-1]), end="\n\n", flush=True)
    save(results, config, args.out)
    return results


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.steps", description=__doc__)
    parser.add_argument("--model", default="gpt2-124m", help=f"of {', '.join(MODELS)}, separated by commas")
    parser.add_argument("--optimizers", help="names, separated by commas; default: all")
    names = ", ".join(SECTIONS)
    parser.add_argument("--sections", help=f"of {names}; default: all but {', '.join(sorted(ON_REQUEST))}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--rounds", type=int, default=9, help="for published results at least 9")
    parser.add_argument("--blocks", type=int, help="whose matrices are stepped; 0: all; default: 1 on a CPU")
    parser.add_argument("--memory", type=float, help="GiB of one measurement; default: 0.6 of what is free")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=Path("runs/steps"))
    parser.add_argument("--full", action="store_true", help="also what is slow and says little")
    for name in ("compile", "eager", "peers"):
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=True)
    return parser


def save(results: list[Result], config: BenchConfig, out: Path) -> None:
    """Write all tables so far as `steps.json` and `RESULTS.md`."""
    packages = {name: version for name in _PACKAGES if (version := _version(name))}
    machine: dict[str, Any] = {**describe(config.device), "packages": packages}
    settings = config.to_json()
    out.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine, "settings": settings, "results": [asdict(each) for each in results]}
    (out / "steps.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    head = (
        f"# {machine['cpu']}, {machine['threads']} of {machine['cores']} cores, {machine['device_name']}\n\n"
        f"{settings['dtype']}, {settings['rounds']} rounds; {machine['system']}, Python {machine['python']}, "
        f"steepest {machine['steepest']}, {', '.join(map(' '.join, packages.items()))}.\n\n"
    )
    text = head + "\n\n".join(markdown(result) for result in results) + "\n"
    (out / "RESULTS.md").write_text(text, encoding="utf-8")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


if __name__ == "__main__":
    main()
