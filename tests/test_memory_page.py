"""What docs/memory.md shows runs, and its arithmetic is the optimizers' own."""

import re
from pathlib import Path

import pytest
import torch

import steepest
from pages import run_python

TEXT = (Path(__file__).parents[1] / "docs" / "memory.md").read_text(encoding="utf-8")


def test_its_python_runs(capsys):
    run_python("docs/memory.md")
    norm, skipped = capsys.readouterr().out.split()
    assert float(norm) > 0
    assert skipped == "0"


FORMATS = {
    "float32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {"rounding": "stochastic"}),
    "least": (torch.bfloat16, {"memory": "least"}),
}


def test_its_bytes_add_up():
    table = TEXT[TEXT.index("| | formats |") : TEXT.index("![")]
    name, seen = "", []
    for line in table.splitlines()[2:-1]:
        rule, formats, weights, gradients, state, together, _, released, _ = line.strip("|").split("|")
        name = rule.strip() or name
        seen.append((name, formats.strip()))
        dtype, options = FORMATS[formats.strip()]
        model = torch.nn.Linear(64, 128, bias=False, dtype=dtype)
        optimizer = steepest.build(model, name.lower().replace("sgdsai", "sgd_sai"), **options)
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
        entries = [entry for entry in optimizer.state[model.weight].values() if entry.dim() > 0]
        own = sum(entry.nbytes for entry in entries) / model.weight.numel()
        size = dtype.itemsize
        assert [float(weights), float(gradients), float(state)] == [size, size, own]
        assert [float(together), float(released)] == [2 * size + own, size + own]
    assert len(seen) == len(set(seen)) == 13


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
        ("Lion, Signum, SGD, SGDSaI, Muon and its variants", "Muon", {}),
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
