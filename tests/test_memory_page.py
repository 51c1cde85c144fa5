"""What docs/memory.md shows runs, and its arithmetic is the optimizers' own."""

import re
from pathlib import Path

import pytest
import torch

import steepest

TEXT = (Path(__file__).parents[1] / "docs" / "memory.md").read_text(encoding="utf-8")


def test_its_python_runs(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    exec(compile(block, "memory.md", "exec"), {})
    norm, skipped = capsys.readouterr().out.split()
    assert float(norm) > 0
    assert skipped == "0"


@pytest.mark.parametrize("name", ["AdamW", "Lion", "SignGSD"])
def test_its_bytes_add_up(name):
    weight = torch.nn.Parameter(torch.ones(1000))
    optimizer = getattr(steepest, name)([weight])
    weight.grad = torch.ones(1000)
    optimizer.step()
    state = round(optimizer.state_bytes() / 1000)
    assert f"| {name} | 4 | 4 | {state} | {8 + state} |" in TEXT
    assert re.search(rf"\| {name}, gradients released \| 4 \| – \| {state} \| \**{4 + state}\** \|", TEXT)


def test_its_calls_of_build_work():
    least, offloaded = re.findall(r"`(steepest\.build\(.*?\))`", TEXT)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    groups = eval(least, {"steepest": steepest, "model": model}).param_groups
    assert {group["state_dtype"] for group in groups} == {"int8"}
    groups = eval(offloaded, {"steepest": steepest, "model": model}).param_groups
    assert {(group["rule"], group["state_device"]) for group in groups} >= {("adamw", "cpu"), ("muon", None)}


@pytest.mark.parametrize(
    ("words", "name", "options"),
    [
        ("Lion, Signum, SGD, SGDSaI, Muon and kin", "Muon", {}),
        ("AdamW", "AdamW", {}),
        ("AdamW with AMSGrad, AdEMAMix", "AdamW", {"amsgrad": True}),
    ],
)
def test_bytes_of_every_format_are_the_optimizers_own(words, name, options):
    found = []
    for state_dtype, master in [
        (torch.float32, None),
        (torch.bfloat16, None),
        ("int8", None),
        ("int8", "split8"),
        ("int8", "split16"),
    ]:
        dtype = torch.float32 if master is None else torch.bfloat16
        weight = torch.nn.Parameter(torch.ones(64, 128, dtype=dtype))
        weight.grad = torch.ones_like(weight)
        optimizer = getattr(steepest, name)([weight], state_dtype=state_dtype, master=master, **options)
        optimizer.step()
        entries = [entry for entry in optimizer.state[weight].values() if entry.dim() > 0]
        found.append(sum(entry.nbytes for entry in entries) / weight.numel())
    assert f"| {words} | " + " | ".join(f"{each:g}" for each in found) + " |" in TEXT
