"""Which layers are outputs, and which only look so."""

from __future__ import annotations

from collections import OrderedDict

import pytest
from torch import nn

import steepest

from .zoo import BasicBlock


def named(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def heads(model: nn.Module) -> set[str]:
    rows = steepest.build(model, "adamw").explain().rows
    return {row.name.removesuffix(".weight") for row in rows if row.kind == "head"}


def linear(*sizes: int) -> nn.Linear:
    return nn.Linear(*sizes)


class Declaring(nn.Module):
    """Hugging Face's way to say which layer it is."""

    def __init__(self) -> None:
        super().__init__()
        self.tok = nn.Embedding(9, 4)
        self.exit, self.last = linear(4, 9), linear(4, 4)

    def get_output_embeddings(self) -> nn.Module:
        return self.exit


class Undeclared(Declaring):
    def get_output_embeddings(self) -> nn.Module:
        raise NotImplementedError


def encoder() -> nn.TransformerEncoder:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        # position
        (named(a=linear(4, 8), b=linear(8, 3)), {"b"}),
        (named(a=nn.Embedding(9, 4), b=nn.LSTM(4, 4), c=linear(4, 9)), {"c"}),
        (named(a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 2, 1)), {"b"}),
        (linear(4, 4), set()),
        (named(a=linear(4, 4), b=nn.GRU(4, 4)), set()),
        (encoder(), set()),
        (nn.ModuleList([linear(4, 4), linear(4, 4), linear(4, 2)]), {"2"}),
        (named(a=BasicBlock(3, 4), b=BasicBlock(4, 4)), set()),
        (named(a=named(x=linear(4, 8)), b=named(y=linear(8, 3))), {"b.y"}),
        (named(a=linear(4, 8), b=nn.MultiheadAttention(8, 2)), set()),
        # names
        (named(lm_head=linear(4, 9), body=linear(4, 4)), {"lm_head"}),
        (named(body=encoder(), head=linear(8, 3)), {"head"}),
        (named(body=linear(4, 4), classifier=named(one=linear(4, 6), two=linear(6, 3))), {"classifier.two"}),
        (named(body=linear(4, 6), fc=linear(6, 8), out=linear(8, 3)), {"out"}),
        (named(head=linear(4, 4), body=linear(4, 6), tail=linear(6, 3)), {"tail"}),
        (
            named(body=linear(4, 6), heads=nn.ModuleDict({"age": linear(6, 1), "kind": linear(6, 3)})),
            {"heads.age", "heads.kind"},
        ),
        (named(body=linear(4, 6), decoder=encoder()), set()),
        # the model's own word
        (Declaring(), {"exit"}),
        (Undeclared(), {"last"}),
        # wrappers
        (nn.DataParallel(named(a=linear(4, 8), b=linear(8, 3))), {"module.b"}),
    ],
)  # fmt: skip
def test_the_output(model: nn.Module, expected: set[str]):
    assert heads(model) == expected


def test_an_output_of_one_number_is_a_head_too():
    rows = steepest.build(named(a=linear(4, 8), b=linear(8, 1)), "muon").explain().rows
    assert {row.name: (row.rule, row.kind) for row in rows if row.name.endswith("weight")} == {
        "a.weight": ("muon", "linear"),
        "b.weight": ("adamw", "head"),
    }


def test_a_tied_head_is_the_only_output():
    model = named(tok=nn.Embedding(9, 4), out=linear(4, 9), last=linear(4, 4))
    model.out.weight = model.tok.weight
    assert heads(model) == set()


def test_an_override_has_the_last_word():
    model = named(a=linear(4, 8), b=linear(8, 3))
    optimizer = steepest.build(model, "muon", overrides={"b.weight": "muon"})
    assert {row.rule for row in optimizer.explain().rows if len(row.shape) == 2} == {"muon"}
