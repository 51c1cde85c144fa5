"""Text: a byte-level GPT learns to predict the next byte of files; judged in bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..corpus import Corpus, standard_library
from ..errors import LabError
from ..models.gpt import GPT, GPTConfig
from ..task import Task

Windows = tuple[Tensor, Tensor]

_LEAST_WINDOWS = 10


def text_task(
    corpus: Corpus | None = None,
    model: GPTConfig | None = None,
    *,
    batch: int = 8,
    judged_bytes: int = 8_192,
    device: str | torch.device = "cpu",
) -> Task[Windows]:
    """A byte-level GPT on text.

    Args:
        corpus: The text; by default the Python standard library's own source.
        model: The GPT's shape; by default 0.27 million parameters.
        batch: Windows of `model.context` bytes per step.
        judged_bytes: How many held-out bytes the metric is taken over, in windows spread evenly.
        device: Where to train.

    Returns:
        The task; its metric is validation bits per byte (8 is knowing nothing).

    Raises:
        LabError: the text is too short for the model's context.
    """
    corpus = standard_library() if corpus is None else corpus
    config = GPTConfig() if model is None else model
    context = config.context
    least = _LEAST_WINDOWS * (context + 1)
    if len(corpus.train) < least or len(corpus.held_out) <= context:
        have = len(corpus.train) + len(corpus.held_out)
        raise LabError(
            f"the text is too short: {have} bytes in {corpus.source}, "
            f"about {math.ceil(least / 0.9 + 1)} are needed for a context of {context}"
        )
    train = as_tensor(corpus.train, device)
    held_out = evenly_spaced(as_tensor(corpus.held_out, device), context, judged_bytes)

    def make(seed: int) -> nn.Module:
        return GPT(config).to(device)

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
        make=make,
        batches=batches,
        loss=loss,
        evaluate=lambda model: bits_per_byte(model, *held_out),
        metric="validation bits per byte",
        unit="bits/byte",
        config={
            "corpus": corpus.source,
            "corpus_fingerprint": corpus.fingerprint,
            "train_bytes": len(corpus.train),
            "held_out_bytes": len(corpus.held_out),
            "files": corpus.files,
            "held_out_files": corpus.held_out_files,
            "judged_bytes": held_out[1].numel(),
            "batch": batch,
            **asdict(config),
        },
    )


def bits_per_byte(model: nn.Module, inputs: Tensor, targets: Tensor, chunk: int = 64) -> float:
    """Mean over all positions of -log₂ of the probability the model gave to the byte that came.

    Args:
        model: Maps byte values (windows, positions) to logits (windows, positions, 256).
        inputs: Byte values of shape (windows, positions).
        targets: What followed each, of the same shape.
        chunk: Windows per call of the model.
    """
    nats = 0.0
    for x, y in zip(torch.split(inputs, chunk), torch.split(targets, chunk), strict=True):
        nats += F.cross_entropy(model(x).flatten(0, 1).float(), y.flatten(), reduction="sum").item()
    return nats / targets.numel() / math.log(2)


def as_tensor(text: bytes, device: str | torch.device) -> Tensor:
    """The bytes as a uint8 tensor."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)


def windows(text: Tensor, starts: Tensor, context: int) -> Windows:
    """Inputs and targets of shape (len(starts), context): the bytes from each start, and the next ones."""
    index = (starts.unsqueeze(1) + torch.arange(context + 1)).to(text.device)
    taken = text[index].long()
    return taken[:, :-1], taken[:, 1:]


def evenly_spaced(text: Tensor, context: int, judged_bytes: int) -> Windows:
    """Non-overlapping windows that cover about `judged_bytes` targets, spread over the whole text."""
    fitting = (len(text) - 1) // context
    count = max(1, min(fitting, judged_bytes // context))
    starts = torch.linspace(0, len(text) - 1 - context, count, dtype=torch.float64).floor().long()
    return windows(text, starts, context)
