from __future__ import annotations

from itertools import islice

import pytest
import torch
from torch import Tensor, nn

from steepest.lab import LabError
from steepest.lab.tasks.corpus import Corpus
from steepest.lab.tasks.text import as_tensor, bits_per_byte, evenly_spaced, text_task, windows

SMALL: dict[str, int] = {"width": 16, "depth": 1, "heads": 2, "context": 8}


def corpus(train: bytes = bytes(range(200)) * 2, held_out: bytes = bytes(range(200, 256))) -> Corpus:
    return Corpus("made up", train, held_out, held_out[::-1], 2, 1)


class Uniform(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return torch.zeros(*tokens.shape, 256)


class Oracle(nn.Module):
    """Predicts the current byte plus one with probability 1/4."""

    def forward(self, tokens: Tensor) -> Tensor:
        probabilities = torch.full((*tokens.shape, 256), 0.75 / 255)
        return probabilities.scatter(-1, (tokens.unsqueeze(-1) + 1) % 256, 0.25).log()


def test_a_uniform_model_needs_eight_bits_per_byte() -> None:
    inputs, targets = windows(as_tensor(bytes(range(256)), "cpu"), torch.tensor([0, 9, 100]), 30)
    assert bits_per_byte(Uniform(), inputs, targets) == pytest.approx(8.0, abs=1e-6)


@pytest.mark.parametrize("chunk", [1, 2, 64])
def test_a_probability_of_a_quarter_is_two_bits(chunk: int) -> None:
    inputs, targets = windows(as_tensor(bytes(range(256)), "cpu"), torch.tensor([0, 9, 100]), 30)
    assert bits_per_byte(Oracle(), inputs, targets, chunk) == pytest.approx(2.0, abs=1e-6)


def test_targets_are_the_next_bytes() -> None:
    inputs, targets = windows(as_tensor(bytes(range(50)), "cpu"), torch.tensor([0, 41]), 8)
    assert inputs.tolist() == [list(range(8)), list(range(41, 49))]
    assert targets.tolist() == [list(range(1, 9)), list(range(42, 50))]


@pytest.mark.parametrize(("length", "eval_bytes"), [(101, 100), (101, 40), (1000, 64), (9, 8), (9, 1)])
def test_evaluation_windows_are_disjoint_and_span_the_text(length: int, eval_bytes: int) -> None:
    _, targets = evenly_spaced(torch.arange(length), 8, eval_bytes)
    places = targets.flatten().tolist()
    assert len(set(places)) == len(places)
    assert len(places) <= max(eval_bytes, 8)
    if len(targets) > 1:
        assert min(places) == 1
        assert max(places) == length - 1


def test_the_seed_determines_the_data() -> None:
    task = text_task(corpus=corpus(), **SMALL, batch=4)

    def seen(seed: int) -> list[Tensor]:
        return [inputs for inputs, _ in islice(task.batches(seed), 3)]

    assert all(torch.equal(a, b) for a, b in zip(seen(1), seen(1), strict=True))
    assert not torch.equal(seen(1)[0], seen(2)[0])


def test_training_uses_every_training_byte_and_no_held_out_byte() -> None:
    task = text_task(corpus=corpus(), **SMALL, batch=64)
    seen: set[int] = set()
    for inputs, targets in islice(task.batches(0), 40):
        seen |= set(inputs.flatten().tolist()) | set(targets.flatten().tolist())
    assert seen == set(range(200))


def test_different_corpora_and_models_have_different_configs() -> None:
    configs = [
        text_task(corpus=corpus(), **SMALL).config,
        text_task(corpus=corpus(held_out=bytes(56)), **SMALL).config,
        text_task(corpus=corpus(), **{**SMALL, "width": 32}).config,
        text_task(corpus=corpus(), **SMALL, batch=9).config,
    ]
    assert all(a != b for at, a in enumerate(configs) for b in configs[:at])


@pytest.mark.parametrize("short", [corpus(train=bytes(89)), corpus(held_out=bytes(8))])
def test_a_text_that_is_too_short_is_rejected_with_the_required_length(short: Corpus) -> None:
    with pytest.raises(
        LabError, match=r"too short: \d+ bytes in made up, but a context of 8 needs about \d+"
    ):
        text_task(corpus=short, **SMALL)


def test_validation_and_test_are_measured_on_their_own_bytes() -> None:
    ones, twos = bytes([1]) * 100, bytes([2]) * 100
    task = text_task(corpus=Corpus("made up", bytes(1000), ones, twos, 3, 2), **SMALL)

    class Ones(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            logits = torch.zeros(*tokens.shape, 256)
            logits[..., 1] = 100.0
            return logits

    assert task.evaluate(Ones(), "validation")["bits per byte"] == pytest.approx(0, abs=1e-6)
    assert task.evaluate(Ones(), "test")["bits per byte"] == pytest.approx(
        100 / torch.log(torch.tensor(2.0)).item()
    )


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(LabError, match="heads"):
        text_task(corpus=corpus(), **{**SMALL, "heads": 3})
