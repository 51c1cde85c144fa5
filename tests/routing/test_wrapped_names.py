"""Patterns match with and without what wrappers add to names, and names stay as the model says."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import steepest
from steepest.routing.wrappers import unwrapped

from .training import Block, Transformer


class Wrapper(nn.Module):
    """What DistributedDataParallel and FSDP1 do to names."""

    def __init__(self, inner: nn.Module, name: str) -> None:
        super().__init__()
        self.add_module(name, inner)


class LoraLinear(nn.Module):
    """A layer of PEFT, by its names."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base_layer.out_features, bias=False)})


class ModulesToSave(nn.Module):
    """A layer that PEFT trains whole beside its adapters, by its names."""

    def __init__(self, original_module: nn.Linear) -> None:
        super().__init__()
        self.original_module = original_module.requires_grad_(False)
        trained = copy.deepcopy(original_module).requires_grad_(True)
        self.modules_to_save = nn.ModuleDict({"my_adapter": trained})


def _peft(model: Transformer) -> nn.Module:
    for block in model.blocks:
        block.mlp[0] = LoraLinear(block.mlp[0])
    model.head = ModulesToSave(model.head)
    return Wrapper(Wrapper(model, "model"), "base_model")


def _checkpointed(model: Transformer) -> nn.Module:
    for at, block in enumerate(model.blocks):
        model.blocks[at] = checkpoint_wrapper(block)
    return model


def _inner(model: Transformer) -> nn.Module:
    for at, block in enumerate(model.blocks):
        model.blocks[at] = Wrapper(block, "_fsdp_wrapped_module")
    return torch.compile(Wrapper(model, "module"))


WRAPPED: dict[str, Callable[[Transformer], nn.Module]] = {
    "plain": lambda model: model,
    "DDP": lambda model: Wrapper(model, "module"),
    "compile": lambda model: torch.compile(model),
    "DDP of compile": lambda model: Wrapper(torch.compile(model), "module"),
    "FSDP1 in compile": _inner,
    "checkpoint": _checkpointed,
    "PEFT": _peft,
    "DDP of PEFT": lambda model: Wrapper(_peft(model), "module"),
}


@pytest.mark.parametrize("way", WRAPPED)
def test_overrides_and_views_match_by_the_model_s_own_names(way: str):
    model = WRAPPED[way](Transformer())
    names = [name for name, _ in model.named_parameters()]
    optimizer = steepest.build(
        model,
        "muon",
        overrides={"blocks.1.mlp.0.weight": "lion", "blocks.*.norm.bias": {"weight_decay": 0.5}},
        views={"blocks.0.mlp.0.weight": steepest.views.rows(8, 8)},
        layer_decay={"blocks.0.*": 0.5},
    )
    rows = {row.name: row for row in optimizer.explain().rows}
    assert set(rows) == set(names)
    wanted = [name for name in names if "blocks.1." in name and ".mlp.0." in name and name.endswith("weight")]
    lion = [name for name, row in rows.items() if row.rule == "lion"]
    assert lion == [name for name in wanted if "lora" not in name]
    assert len(lion) == 1
    decayed = [name for name, row in rows.items() if row.weight_decay == 0.5]
    assert len(decayed) == 3
    assert all(name.endswith("norm.bias") for name in decayed)
    cut = [name for group in optimizer.param_groups for name in group.get("views") or () if ".mlp." in name]
    assert len(cut) == 1
    assert cut[0] in names
    assert {row.lr for name, row in rows.items() if "blocks.0." in name and row.rule == "muon"} == {5e-4}


@pytest.mark.parametrize("way", WRAPPED)
def test_the_names_as_they_are_match_too(way: str):
    model = WRAPPED[way](Transformer())
    names = [name for name, _ in model.named_parameters()]
    optimizer = steepest.build(model, "adamw", overrides={name: {"eps": 1e-6} for name in names[::2]})
    found = {
        name for group in optimizer.param_groups if group["eps"] == 1e-6 for name in group["param_names"]
    }
    assert found == set(names[::2])


def test_a_later_pattern_wins_however_it_is_spelled():
    model = Wrapper(Transformer(), "module")
    table = {"head.bias": {"lr": 0.5}, "module.head.bias": {"lr": 0.25}}
    for overrides, lr in ((table, 0.25), (dict(reversed(table.items())), 0.5)):
        rows = steepest.build(model, "adamw", overrides=overrides).explain().rows
        assert {row.lr for row in rows if row.name == "module.head.bias"} == {lr}


def test_a_typo_is_still_refused_with_the_closest_name():
    model = Wrapper(Transformer(), "module")
    with pytest.raises(ValueError, match=r"'haed.bias' matches no parameter.*did you mean 'head.bias'"):
        steepest.build(model, "adamw", overrides={"haed.bias": "lion"})


def test_a_suggestion_is_the_name_of_a_parameter_that_trains():
    model = _peft(Transformer())
    with pytest.raises(ValueError, match=r"did you mean 'head.weight'\?"):
        steepest.build(model, "adamw", overrides={"haed.weight": "lion"})
    for typo in ("head.original_modul.weight", "*.original_modul.weight"):
        with pytest.raises(ValueError, match="matches no parameter") as caught:
            steepest.build(model, "adamw", overrides={typo: "lion"})
        assert "original_module" not in str(caught.value)


def test_a_frozen_copy_of_the_output_layer_raises_no_question():
    optimizer = steepest.build(_peft(Transformer()), "muon")
    rows = {row.name.partition("head.")[2]: row for row in optimizer.explain().rows if "head." in row.name}
    assert rows["modules_to_save.my_adapter.weight"].kind == "output"
    assert rows["original_module.weight"].frozen
    assert not [text for text in optimizer.explain().warnings if "head" in text]


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("lm_head.modules_to_save.default.weight", "lm_head.weight"),
        ("modules_to_save.default.weight", "weight"),
        ("score.original_module.dense.bias", "score.dense.bias"),
        ("q.lora_A.default.weight", "q.lora_A.weight"),
        ("q.lora_magnitude_vector.mine.weight", "q.lora_magnitude_vector.weight"),
        ("embed.lora_embedding_B.default", "embed.lora_embedding_B"),
        # No adapters: names of other libraries, and of a model of one's own.
        ("q.lora_A.weight", "q.lora_A.weight"),
        ("q.lora_down.weight", "q.lora_down.weight"),
        ("my_modules_to_save.default.weight", "my_modules_to_save.default.weight"),
        ("modules_to_save.weight", "modules_to_save.weight"),
    ],
)
def test_peft_s_adapters_leave_the_name(name: str, own: str):
    assert unwrapped(name) == own


def test_a_module_that_is_called_as_wrappers_are_is_found_under_its_name():
    model = nn.ModuleDict({"module": nn.ModuleDict({"a": Block()}), "b": Block()})
    overrides = {"module.a.norm.weight": "lion", "b.norm.weight": "sgd"}
    rows = {row.name: row.rule for row in steepest.build(model, "adamw", overrides=overrides).explain().rows}
    assert rows["module.a.norm.weight"] == "lion"
    assert rows["b.norm.weight"] == "sgd"
