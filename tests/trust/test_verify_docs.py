"""What docs/verify.md says that verification says; the figures may be another processor's."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import steepest
from pages import run_python

from .test_verify_failures import ClippedMuon, Wrapper
from .training import backward, train

TEXT = (Path(__file__).parents[2] / "docs" / "verify.md").read_text(encoding="utf-8")
SHOWN = [
    " ".join(block.split())
    for block in re.findall(r"^    p(?:.+\n)+", TEXT.split("## What the errors look like")[1], re.M)
]


def model_of_three() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))


def another_optimizer(model: nn.Sequential) -> Any:
    optimizer = steepest.Lion(model.named_parameters())
    return optimizer, lambda: train(model, Wrapper(optimizer)), {}


def clipped(model: nn.Sequential) -> Any:
    optimizer = ClippedMuon({"2.weight": model[2].weight}.items())
    return optimizer, lambda: train(model, optimizer), {}


def scaled(model: nn.Sequential) -> Any:
    weight = model[2].weight
    optimizer = steepest.Muon({"2.weight": weight}.items(), weight_decay=0.0)
    kept = []
    optimizer.register_step_pre_hook(lambda *_: kept.append(weight.detach().clone()))
    optimizer.register_step_post_hook(lambda *_: weight.data.lerp_(kept[-1], 0.1))
    return optimizer, lambda: train(model, optimizer), {}


def no_rate(model: nn.Sequential) -> Any:
    groups = [
        {"params": list(model[:3].named_parameters())},
        {"params": list(model[4].named_parameters("4")), "lr": 0.0},
    ]
    optimizer = steepest.Lion(groups)
    return optimizer, lambda: train(model, optimizer, 2), {}


def lost(model: nn.Sequential) -> Any:
    model.bfloat16()
    optimizer = steepest.Lion(model.named_parameters(), lr=1e-8, weight_decay=0.0)
    return optimizer, lambda: train(model, optimizer, 2), {}


def divided_twice(model: nn.Sequential) -> Any:
    optimizer = steepest.SGD(model.named_parameters(), lr=0.01)

    def steps() -> None:
        for part in range(8):
            backward(model, part, 1 / 8)
        for param in model.parameters():
            param.grad /= 8
        optimizer.step()

    return optimizer, steps, {}


def forgotten(model: nn.Sequential) -> Any:
    optimizer = steepest.Lion(list(model.named_parameters())[:-1])
    return optimizer, lambda: train(model, optimizer), {"model": model}


CASES = [another_optimizer, clipped, scaled, no_rate, lost, divided_twice, forgotten]


def test_every_message_is_tested():
    assert len(SHOWN) == len(CASES)


@pytest.mark.parametrize(("make", "shown"), list(zip(CASES, SHOWN, strict=False)), ids=lambda x: str(x)[:20])
def test_the_message_is_the_one_shown(make: Callable[[nn.Sequential], Any], shown: str):
    optimizer, steps, options = make(model_of_three())
    with pytest.raises(steepest.VerificationError) as raised, steepest.verify(optimizer, **options):
        steps()
    said, shown = (re.sub(r"(?<!['\d])\d+(\.\d+)?(e-\d+)?", "#", each) for each in (str(raised.value), shown))
    start, cut, _ = shown.partition("…")
    assert said.startswith(start) if cut else said == shown


def test_its_python_runs_and_changes_no_step():
    def given() -> dict[str, Any]:
        model = model_of_three()
        optimizer = steepest.Lion(model.named_parameters(), lr=0.01)
        batches = [(torch.randn(8, 6), torch.randint(4, (8,))) for _ in range(2)]
        steps = partial(train, model, optimizer, 20)
        return {
            "model": model,
            "optimizer": optimizer,
            "batches": batches,
            "loss": cross_entropy,
            "train": steps,
        }

    names, plain = run_python("docs/verify.md", {"steepest": steepest, **given()}), given()
    for inputs, labels in plain["batches"]:
        cross_entropy(plain["model"](inputs), labels).backward()
        plain["optimizer"].step()
        plain["optimizer"].zero_grad()
    plain["train"]()
    assert all(map(torch.equal, names["model"].parameters(), plain["model"].parameters()))
    assert names["history"].steps == [10, 20]
    assert all(0 < cosine < 1 for cosine in names["history"]["0.weight"]["cosine"])
