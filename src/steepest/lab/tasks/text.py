"""The text task: train a byte-level GPT on files; the metric is bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LabError
from ..models.gpt import GPT, GPTConfig, Positions
from ..records import Metric
from .corpus import Corpus, from_path, standard_library
from .task import Task

Windows = tuple[Tensor, Tensor]

_MIN_WINDOWS = 10


def text_task(
    path: Path | None = None,
    *,
    corpus: Corpus | None = None,
    width: int = 64,
    depth: int = 2,
    heads: int = 4,
    context: int = 64,
    positions: Positions = "rotary",
    tied: bool = False,
    batch: int = 8,
    eval_bytes: int = 8_192,
    device: str | torch.device = "cpu",
) -> Task[Windows]:
    """Create a task that trains a byte-level GPT on text.

    The metric is bits per byte (8 for a uniform prediction).

    Args:
        path: A file or directory with text; by default the source of Python's standard library.
        corpus: The text itself, instead of a path.
        width, depth, heads, context, positions, tied: See `GPTConfig`. By default the model has 0.13 million
            parameters.
        batch: Number of windows of `context` bytes per step.
        eval_bytes: Number of validation bytes for the metric, in evenly spaced windows; of test bytes,
            four times as many.

    Raises:
        LabError: there is no text, or too little for the context; or the sizes do not fit together.
    """
    config = GPTConfig(width, depth, heads, context, positions, tied)
    if corpus is None:
        corpus = standard_library() if path is None else from_path(path)
    minimum = _MIN_WINDOWS * (context + 1)
    if len(corpus.train) < minimum or min(len(corpus.validation), len(corpus.test)) <= context:
        total = len(corpus.train) + len(corpus.validation) + len(corpus.test)
        raise LabError(
            f"the text is too short: {total} bytes in {corpus.source}, but a context of {context} needs "
            f"about {math.ceil(max(minimum / 0.9, 20 * (context + 2)))}"
        )
    train = as_tensor(corpus.train, device)
    held_out: dict[str, Windows] = {
        "validation": evenly_spaced(as_tensor(corpus.validation, device), context, eval_bytes),
        "test": evenly_spaced(as_tensor(corpus.test, device), context, 4 * eval_bytes),
    }

    def batches(seed: int) -> Iterator[Windows]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            starts = torch.randint(len(train) - context, (batch,), generator=generator)
            yield windows(train, starts, context)

    def loss(model: nn.Module, batch: Windows) -> Tensor:
        inputs, targets = batch
        return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())

    return Task(
        name="text",
        make=lambda seed: GPT(config).to(device),
        batches=batches,
        loss=loss,
        evaluate=lambda model, split: {"bits per byte": bits_per_byte(model, *held_out[split])},
        metrics=(Metric(name="bits per byte"),),
        config={
            "corpus": corpus.source,
            "corpus_fingerprint": corpus.fingerprint,
            "train_bytes": len(corpus.train),
            "files": corpus.files,
            "held_out_files": corpus.held_out_files,
            "validation_bytes": held_out["validation"][1].numel(),
            "test_bytes": held_out["test"][1].numel(),
            "batch": batch,
            **asdict(config),
        },
    )


def bits_per_byte(model: nn.Module, inputs: Tensor, targets: Tensor, chunk: int = 64) -> float:
    """Return the mean over all positions of -log₂ of the probability that the model gives to the next byte.

    The model maps `chunk` windows of byte values (windows, positions) to logits (windows, positions, 256) at
    a time; `targets` are the bytes after each of `inputs`.
    """
    nats = 0.0
    for x, y in zip(torch.split(inputs, chunk), torch.split(targets, chunk), strict=True):
        nats += F.cross_entropy(model(x).flatten(0, 1).float(), y.flatten(), reduction="sum").item()
    return nats / targets.numel() / math.log(2)


def as_tensor(text: bytes, device: str | torch.device) -> Tensor:
    """Convert bytes to a uint8 tensor."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)


def windows(text: Tensor, starts: Tensor, context: int) -> Windows:
    """Return inputs and targets of shape (len(starts), context); a target is the byte after its input."""
    index = (starts.unsqueeze(1) + torch.arange(context + 1)).to(text.device)
    selected = text[index].long()
    return selected[:, :-1], selected[:, 1:]


def evenly_spaced(text: Tensor, context: int, eval_bytes: int) -> Windows:
    """Return non-overlapping windows with about `eval_bytes` targets in total, spread over the whole text."""
    available = (len(text) - 1) // context
    count = max(1, min(available, eval_bytes // context))
    starts = torch.linspace(0, len(text) - 1 - context, count, dtype=torch.float64).floor().long()
    return windows(text, starts, context)
