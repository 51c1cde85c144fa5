"""Modules beyond the zoo: groups of channels, parameters of unknown modules, shared and complex ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import steepest
from loops import for_each
from steepest.views import rows, transposed


class Holder(nn.Module):
    """A module that nobody knows, with one parameter; before and after it, layers."""

    def __init__(self, name: str, *shape: int, dtype: torch.dtype = torch.float32, **extra: int) -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.ones(shape, dtype=dtype)))
        for key, value in extra.items():
            setattr(self, key, value)


class ExpertsMLP(Holder):
    """Called experts."""


class Expertise(Holder):
    """Not called experts."""


class PatchEmbedding(nn.Conv2d):
    """Called an embedding, and a convolution."""


class PixelNorm(nn.Linear):
    """Called a norm, and a linear layer."""


def kind_of(module: nn.Module) -> tuple[str, str, object]:
    """(rule, kind, view) of the module's first parameter, within a model."""
    model = nn.Sequential(nn.Linear(4, 4), module, nn.Linear(4, 2))
    first = next(name for name, _ in module.named_parameters())
    row = next(row for row in steepest.build(model, "muon").explain().rows if row.name == f"1.{first}")
    return row.rule, row.kind, row.view


@for_each(
    ("module", "expected"),
    [
        (nn.Conv2d(8, 8, 3, groups=8), ("adamw", "depthwise", "flatten")),
        (nn.Conv2d(8, 16, 3, groups=8), ("adamw", "depthwise", "flatten")),
        (nn.Conv2d(1, 8, 3), ("muon", "conv", "flatten")),
        (nn.Conv2d(8, 8, 3, groups=2), ("muon", "conv", ("rows", (4, 4)))),
        (nn.ConvTranspose1d(8, 4, 3), ("muon", "conv", transposed())),
        (nn.ConvTranspose2d(8, 4, 3, groups=2), ("muon", "conv", transposed(rows(4, 4)))),
        (nn.ConvTranspose3d(8, 4, 3), ("muon", "conv", transposed())),
        (nn.ConvTranspose2d(8, 8, 3, groups=8), ("adamw", "depthwise", "flatten")),
        (nn.ConvTranspose2d(8, 4, 3, groups=4), ("adamw", "depthwise", "flatten")),
        (nn.Conv3d(2, 4, 3), ("muon", "conv", "flatten")),
        (nn.Conv2d(1, 1, (1, 5)), ("adamw", "vector", "flatten")),
        (nn.Linear(4, 1), ("adamw", "vector", None)),
        (nn.Bilinear(2, 3, 4), ("muon", "linear", "flatten")),
        (nn.LSTMCell(4, 4), ("muon", "recurrent", ("rows", (4, 4, 4, 4)))),
        (nn.GRUCell(4, 4), ("muon", "recurrent", ("rows", (4, 4, 4)))),
        (nn.RNNCell(4, 4), ("muon", "recurrent", None)),
        (nn.LSTM(4, 1, proj_size=0), ("muon", "recurrent", ("rows", (1, 1, 1, 1)))),
        (nn.MultiheadAttention(4, 2, kdim=6, vdim=6), ("muon", "attention", None)),
        (nn.LayerNorm((3, 4)), ("adamw", "norm", None)),
        (nn.EmbeddingBag(5, 4), ("adamw", "embedding", None)),
        (PatchEmbedding(3, 8, 2), ("muon", "conv", "flatten")),
        (PixelNorm(4, 4), ("muon", "linear", None)),
        (nn.PReLU(4), ("adamw", "gain", None)),
        (Holder("gamma", 4, 1, 1), ("adamw", "gain", None)),
        (Holder("scale", 1, 4), ("adamw", "gain", None)),
        (Holder("temperature"), ("adamw", "gain", None)),
        (Holder("pos_embed", 7, 4), ("adamw", "table", None)),
        (Holder("relative_position_bias_table", 9, 2), ("adamw", "table", None)),
        (Holder("mask_token", 1, 1, 4), ("adamw", "gain", None)),
        (Holder("rel_pos_h", 7, 4), ("adamw", "table", None)),
        (Holder("query_embed", 7, 4), ("adamw", "table", None)),
        (Holder("query_tokens", 1, 7, 4), ("adamw", "table", None)),
        (Holder("latents", 7, 4), ("adamw", "table", None)),
        (Holder("token_embedding2", 7, 4), ("adamw", "table", None)),
        (Holder("query", 7, 4), ("adamw", "table", None)),
        (Holder("w_query", 4, 4), ("adamw", "unknown", None)),
        (Holder("query_kernel", 4, 4), ("adamw", "unknown", None)),
        (Holder("memory_kernel", 4, 4), ("adamw", "unknown", None)),
        (Holder("token_mix", 4, 4), ("adamw", "unknown", None)),
        (Holder("embed_proj", 4, 16), ("adamw", "unknown", None)),
        (Holder("attention_biases", 4, 9), ("adamw", "bias", None)),
        (Holder("b", 1, 4), ("adamw", "bias", None)),
        (Holder("b", 4), ("adamw", "bias", None)),
        (Holder("B", 4, 2), ("adamw", "unknown", None)),
        (Holder("A", 2, 4), ("adamw", "unknown", None)),
        (Holder("W_b", 4, 4), ("adamw", "unknown", None)),
        (Holder("lora_A", 2, 4), ("adamw", "lora", None)),
        (Holder("lora_magnitude_vector", 4), ("adamw", "gain", None)),
        (Holder("w_up", 3, 4), ("adamw", "unknown", None)),
        (Holder("w", 3, 4, 5), ("adamw", "unknown", None)),
        (Holder("w", 3, 4, 5, num_experts=3), ("muon", "experts", "batch")),
        (Holder("w", 3, 4, 5, num_experts=7), ("adamw", "unknown", None)),
        (ExpertsMLP("w1", 3, 4, 5), ("muon", "experts", "batch")),
        (Expertise("w1", 3, 4, 5), ("adamw", "unknown", None)),
        (Holder("w", 3, 4, dtype=torch.complex64), ("adamw", "complex", None)),
    ],
)
def test_the_owner_decides(module: nn.Module, expected: tuple[str, str, object]):
    rule, kind, view = kind_of(module)
    assert (rule, kind) == expected[:2]
    assert view == (expected[2] if rule == "muon" else None)


def test_a_shared_layer_is_stepped_once_and_all_its_names_are_told():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(4, 2))
    explanation = steepest.build(model, "muon").explain()
    assert {row.name: row.aliases for row in explanation.rows if row.aliases} == {
        "0.weight": ("2.weight",),
        "0.bias": ("2.bias",),
    }
    assert any("0.weight is also 2.weight" in note for note in explanation.notes)


def test_names_alone_do_not_make_a_norm_or_an_embedding():
    model = nn.ModuleDict({"norm": nn.Linear(4, 4), "embedding": nn.Linear(4, 4), "last": nn.Linear(4, 2)})
    rows = steepest.build(model, "muon").explain().rows
    assert {row.name for row in rows if row.rule == "muon"} == {"norm.weight", "embedding.weight"}


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixers = nn.ParameterList([torch.ones(4, 4), torch.ones(4, 4)])
        self.pos_embeds = nn.ParameterDict({"low": torch.ones(9, 4)})


def test_a_parameter_in_a_list_is_its_modules():
    rows = steepest.build(Listed(), "adamw").explain().rows
    assert {row.name: row.kind for row in rows} == {
        "mixers.0": "unknown",
        "mixers.1": "unknown",
        "pos_embeds.low": "table",
    }


def warnings_of(module: nn.Module) -> list[str]:
    """What is said of the module's parameter, within a model."""
    model = nn.Sequential(nn.Linear(4, 4), module, nn.Linear(4, 2))
    return [line for line in steepest.build(model, "muon").explain().warnings if "*." in line or "1." in line]


@pytest.mark.parametrize("name", ["memory", "latents", "query", "token_embed"])
def test_a_table_that_only_its_name_makes_one_is_warned_of(name: str):
    (warning,) = warnings_of(Holder(name, 4, 4))
    assert f"{name} (4, 4) is treated as a table, by its name alone, and goes to 'adamw'" in warning
    assert "overrides={" in warning


@pytest.mark.parametrize("name", ["w_query", "W_b", "B", "token_mix"])
def test_a_matrix_that_nobody_knows_is_decayed_and_warned_of(name: str):
    model = nn.Sequential(nn.Linear(4, 4), Holder(name, 4, 4), nn.Linear(4, 2))
    optimizer = steepest.build(model, "muon", weight_decay=0.25)
    row = next(row for row in optimizer.explain().rows if row.name.endswith(name))
    assert (row.rule, row.weight_decay) == ("adamw", 0.25)
    assert any("belongs to an unknown module" in line for line in warnings_of(Holder(name, 4, 4)))


def test_positions_are_no_guess_and_an_override_settles_one():
    assert not warnings_of(Holder("pos_embed", 7, 4))
    model = nn.Sequential(nn.Linear(4, 4), Holder("memory", 4, 4), nn.Linear(4, 2))
    for rule in ("muon", "adamw"):
        explanation = steepest.build(model, "muon", overrides={"*.memory": rule}).explain()
        assert not any("memory" in line for line in explanation.warnings)
