"""Which layers are outputs, and which only look like outputs."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
from torch import nn

import steepest
from loops import for_each

from .zoo import GPT, LSTM, BasicBlock, Llama, MoE, ResNet, ViT


def named(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def outputs(model: nn.Module) -> set[str]:
    rows = steepest.build(model, "adamw").explain().rows
    return {row.name.removesuffix(".weight") for row in rows if row.kind == "output"}


def linear(*sizes: int) -> nn.Linear:
    return nn.Linear(*sizes)


class Declaring(nn.Module):
    """A model that declares its output layer as Hugging Face's models do."""

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


def mlp(into: int, width: int, out: int) -> nn.Sequential:
    return nn.Sequential(linear(into, width), linear(width, out))


class QNet(nn.Module):
    def __init__(self, name: str = "last") -> None:
        super().__init__()
        self.first = linear(4, 8)
        self.add_module(name, linear(8, 2))


class FinalLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = linear(8, 3)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), linear(8, 16))


class DiT(nn.Module):
    """A model whose final layer has a conditioning linear map registered after the output."""

    def __init__(self) -> None:
        super().__init__()
        self.embedder, self.final_layer = linear(4, 8), FinalLayer()


class Mixed(nn.Module):
    """An output module of two linear maps without output names."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = linear(8, 3), linear(4, 8)


@for_each(
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
        (named(decoder=named(a=linear(4, 6), lm_head=linear(6, 9)), b=linear(4, 4)), {"decoder.lm_head"}),
        (named(body=linear(4, 4), classifier=named(one=linear(4, 6), two=linear(6, 3))), {"classifier.two"}),
        (named(body=linear(4, 6), fc=linear(6, 8), out=linear(8, 3)), {"out"}),
        (named(head=linear(4, 4), body=linear(4, 6), tail=linear(6, 3)), {"tail"}),
        (
            named(body=linear(4, 6), heads=nn.ModuleDict({"age": linear(6, 1), "kind": linear(6, 3)})),
            {"heads.age", "heads.kind"},
        ),
        (named(body=linear(4, 6), decoder=encoder()), set()),
        (
            named(body=linear(4, 6), policy_head=linear(6, 4), value_head=linear(6, 1)),
            {"policy_head", "value_head"},
        ),
        (named(body=linear(4, 6), bbox_head1=linear(6, 3), head2=linear(6, 2)), {"bbox_head1", "head2"}),
        (
            named(body=linear(4, 6), cls_preds=nn.ModuleList([linear(6, 3), linear(6, 3)])),
            {"cls_preds.0", "cls_preds.1"},
        ),
        (named(body=linear(4, 6), class_embed=linear(6, 3)), {"class_embed"}),
        (named(actor=mlp(4, 6, 2), critic=mlp(4, 6, 1)), {"actor.1", "critic.1"}),
        (DiT(), {"final_layer.linear"}),
        (nn.TransformerEncoderLayer(8, 2, 16), set()),
        # declared by the model
        (Declaring(), {"exit"}),
        (Undeclared(), {"last"}),
        # wrappers
        (nn.DataParallel(named(a=linear(4, 8), b=linear(8, 3))), {"module.b"}),
    ],
)
def test_which_layers_are_outputs(model: nn.Module, expected: set[str]):
    assert outputs(model) == expected


def test_a_linear_layer_with_one_output_is_an_output_layer_too():
    rows = steepest.build(named(a=linear(4, 8), b=linear(8, 1)), "muon").explain().rows
    assert {row.name: (row.rule, row.kind) for row in rows if row.name.endswith("weight")} == {
        "a.weight": ("muon", "linear"),
        "b.weight": ("adamw", "output"),
    }


def test_a_tied_output_layer_is_the_only_output():
    model = named(tok=nn.Embedding(9, 4), out=linear(4, 9), last=linear(4, 4))
    model.out.weight = model.tok.weight
    assert outputs(model) == set()


def test_an_override_decides():
    model = named(a=linear(4, 8), b=linear(8, 3))
    optimizer = steepest.build(model, "muon", overrides={"b.weight": "muon"})
    assert {row.rule for row in optimizer.explain().rows if len(row.shape) == 2} == {"muon"}


# -- ambiguities


def ambiguities(model: nn.Module, **options: object) -> tuple[str, ...]:
    return steepest.build(model, "muon", **options).explain().warnings


@pytest.mark.parametrize(
    ("model", "said", "suggested"),
    [
        # guessed from its position
        (QNet(), "last.weight is treated as", {"last.weight": "muon"}),
        (
            nn.ModuleDict({"policy": mlp(4, 6, 3), "value": mlp(4, 6, 2)}),
            "value.1.weight is treated as",
            {"value.1.weight": "muon"},
        ),
        # nothing found
        (encoder(), "no output layer was found", {"layers.1.linear2.weight": "adamw"}),
        (
            nn.TransformerEncoderLayer(8, 2, 16),
            "no output layer was found",
            {"linear2.weight": "adamw"},
        ),
        (
            nn.ModuleDict({"q1": QNet(), "q2": QNet()}),
            "no output layer was found",
            {"q1.last.weight": "adamw", "q2.last.weight": "adamw"},
        ),
        (
            nn.ModuleDict({"twins": nn.ModuleDict({"q1": QNet(), "q2": QNet()})}),
            "no output layer was found",
            {"twins.q1.last.weight": "adamw", "twins.q2.last.weight": "adamw"},
        ),
        # a name that did not decide
        (
            nn.ModuleDict({"output": linear(6, 3), "body": linear(4, 6), "lm_head": linear(6, 9)}),
            "output.weight is named like an output layer",
            {"output.weight": "adamw"},
        ),
        (
            nn.ModuleDict({"class_embed": linear(6, 3), "proj": linear(4, 5), "out": linear(5, 9)}),
            "class_embed.weight is named like an output layer",
            {"class_embed.weight": "adamw"},
        ),
        (
            named(body=linear(4, 8), head=Mixed()),
            "head.one.weight is named like an output layer, or is in a module that is",
            {"head.one.weight": "adamw"},
        ),
    ],
)  # fmt: skip
def test_ambiguities_are_reported_with_the_override_that_settles_them(
    model: nn.Module, said: str, suggested: dict[str, str]
):
    warnings = ambiguities(model)
    assert len(warnings) == 1
    assert said in warnings[0]
    line = "overrides={" + ", ".join(f"{name!r}: {rule!r}" for name, rule in suggested.items()) + "}"
    assert line in warnings[0]
    assert not ambiguities(model, overrides=suggested)
    assert not ambiguities(model, overrides=dict.fromkeys(suggested, "muon"))
    assert not steepest.build(model, "adamw").explain().warnings


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (mlp(4, 8, 2), "1"),
        (nn.Sequential(mlp(4, 8, 8), nn.ReLU(), mlp(8, 8, 2)), "2.1"),
        (named(net=mlp(4, 8, 2)), "net.1"),
    ],
    ids=["Sequential", "nested", "only child"],
)
def test_the_last_map_of_a_sequential_is_noted_and_no_warning(model: nn.Module, name: str):
    """Nothing is to be done about it: there the order of registration is the order of use."""
    optimizer = steepest.build(model, "muon")
    explanation = optimizer.explain()
    assert not explanation.warnings
    note = (
        f"{name}.weight is treated as the output layer because it is the model's last linear map, not "
        f"because of its name. If it is a hidden layer, pass overrides={{'{name}.weight': 'muon'}}"
    )
    assert note in explanation.notes
    assert "WARNING" not in str(explanation)
    settled = steepest.build(model, "muon", overrides={f"{name}.weight": "adamw"}).explain()
    assert not [text for text in settled.notes if "output" in text]
    again = steepest.build(model, "muon")
    again.load_state_dict(optimizer.state_dict())
    assert note in again.explain().notes


class Twin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q1, self.q2 = QNet("head"), QNet("head")


def test_outputs_of_twin_modules_are_named_in_the_warning():
    assert outputs(Twin()) == set()
    assert "overrides={'q1.head.weight': 'adamw', 'q2.head.weight': 'adamw'}" in ambiguities(Twin())[0]


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q1, self.q2, self.idle = mlp(4, 8, 2), mlp(4, 8, 2), nn.Sequential(nn.ReLU())


def test_a_guess_comes_with_the_other_layers_that_may_be_outputs():
    warning = ambiguities(Pair())[0]
    assert "q2.1.weight is treated as the output layer" in warning
    assert "overrides={'q2.1.weight': 'muon'}" in warning
    assert "overrides={'q1.1.weight': 'adamw'}" in warning


def test_an_output_registered_before_the_body_is_reported_besides_the_guess():
    guess, other = ambiguities(named(output=linear(6, 3), body=linear(4, 6), more=linear(6, 6)))
    assert "is treated as the output layer" in guess
    assert "output.weight is named like an output layer" in other


@pytest.mark.parametrize("model", [GPT, Llama, MoE, ViT, ResNet, LSTM])
def test_nothing_is_ambiguous_if_the_output_is_found(model: type[nn.Module]):
    assert not [text for text in ambiguities(model()) if "output" in text]


def test_ambiguities_survive_copies_and_a_loaded_state_dict():
    optimizer = steepest.build(Twin(), "muon")
    again = steepest.build(Twin(), "muon")
    again.load_state_dict(optimizer.state_dict())
    assert again.explain() == copy.deepcopy(optimizer).explain() == optimizer.explain()
