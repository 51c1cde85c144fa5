"""Layer-wise learning rates: lr·decay^(depth − i), with i by the model's lists of blocks."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import steepest
from loops import for_each

from .training import Block, Transformer, same_bits, take_steps


def _rates(optimizer: steepest.Optimizer) -> dict[str, float]:
    return {row.name: row.lr for row in optimizer.explain().rows}


def _beit_layer(name: str, depth: int) -> int:
    """BEiT's and MAE's numbering, for the names of :class:`Transformer`."""
    if name.startswith(("positions", "embed")):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else depth + 1


@pytest.mark.parametrize("rule", ["muon", "lion"])
def test_a_transformer_has_beit_s_rates(rule: str):
    options: dict[str, Any] = {"lr": 0.25, "fallback": {"rule": "adamw", "lr": 0.125}}
    plain = _rates(steepest.build(Transformer(), rule, **options))
    rates = _rates(steepest.build(Transformer(), rule, layer_decay=0.5, **options))
    assert rates.keys() == plain.keys()
    for name, rate in rates.items():
        assert rate == plain[name] * 0.5 ** (4 - _beit_layer(name, 3)), name


def test_without_lr_the_rules_defaults_are_scaled():
    plain = _rates(steepest.build(Transformer(), "muon", fallback="lion"))
    rates = _rates(steepest.build(Transformer(), "muon", fallback="lion", layer_decay=0.75))
    for name, rate in rates.items():
        assert rate == pytest.approx(plain[name] * 0.75 ** (4 - _beit_layer(name, 3)), rel=1e-12), name


def test_it_trains_as_groups_made_by_hand_do():
    model, twin = Transformer(), Transformer()
    ours = steepest.build(model, "adamw", lr=0.01, layer_decay=0.5, decay_vectors=True)
    by_layer: dict[int, list[Any]] = {}
    for name, param in twin.named_parameters():
        by_layer.setdefault(_beit_layer(name, 3), []).append((name, param))
    groups = [{"params": params, "lr": 0.01 * 0.5 ** (4 - at)} for at, params in by_layer.items()]
    take_steps(ours, model)
    take_steps(steepest.AdamW(groups, lr=0.01), twin)
    assert same_bits(model, twin)


@pytest.mark.parametrize("rule", ["muon", "adamw"])
def test_schedulers_keep_the_ratios(rule: str):
    optimizer = steepest.build(Transformer(), rule, lr=0.25, layer_decay=0.5)
    before = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [lr / 2 for lr in before]


def _depths(model: nn.Module) -> dict[str, int]:
    """Read the layers off rates of a power of two."""
    rates = _rates(steepest.build(model, "adamw", lr=1.0, layer_decay=0.5))
    return {name: round(-torch.log2(torch.tensor(rate)).item()) for name, rate in rates.items()}


class Stage(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.downsample = nn.Linear(8, 8)
        self.blocks = nn.Sequential(*(Block() for _ in range(count)))


class Stages(nn.Module):
    """As Swin and ConvNeXt are."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, 4)
        self.layers = nn.Sequential(Stage(1), Stage(2))
        self.head = nn.Linear(8, 3)


class Experts(nn.Module):
    """A block whose experts and sublayers are lists of modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList([Block(), nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))])
        self.experts = nn.ModuleList(Block() for _ in range(4))
        self.heads = nn.ModuleList(Block() for _ in range(2))


class TwoStacks(nn.Module):
    """Embedding, encoder, norm, decoder, and a head that is registered first."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 11)
        self.encoder = nn.ModuleList(Block() for _ in range(2))
        self.between = nn.LayerNorm(8)
        self.decoder = nn.ModuleList(Block() for _ in range(2))
        self.embed = nn.Embedding(11, 8)
        self.last_norm = nn.LayerNorm(8)


def test_the_blocks_of_stages_are_the_layers():
    depths = _depths(Stages())
    # 3 blocks: the head is layer 4, and a blank in front of a stage's blocks belongs to the block before.
    expected = {
        "patch_embed": 4,
        "layers.0.blocks.0": 3,
        "layers.1.blocks.0": 2,
        "layers.1.blocks.1": 1,
        "head": 0,
    }
    for prefix, depth in expected.items():
        assert {found for name, found in depths.items() if name.startswith(f"{prefix}.")} == {depth}, prefix
    assert depths["layers.0.downsample.weight"] == 4
    assert depths["layers.1.downsample.weight"] == 3


def test_lists_within_a_block_are_no_layers():
    depths = _depths(nn.Sequential(nn.Embedding(5, 8), nn.Sequential(Experts(), Experts()), nn.Linear(8, 5)))
    found = {".".join(name.split(".")[:2]): depth for name, depth in depths.items()}
    assert found == {"0.weight": 3, "1.0": 2, "1.1": 1, "2.weight": 0, "2.bias": 0}


def test_two_stacks_are_counted_one_after_the_other():
    depths = _depths(TwoStacks())
    assert depths["head.weight"] == depths["head.bias"] == depths["last_norm.weight"] == 0
    assert depths["embed.weight"] == 5
    assert depths["between.weight"] == depths["encoder.1.norm.weight"] == 3
    assert [depths[f"{name}.norm.weight"] for name in ("encoder.0", "decoder.0", "decoder.1")] == [4, 2, 1]


def test_modules_of_torch_and_wrapped_blocks_are_blocks():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 3, enable_nested_tensor=False)
    depths = _depths(nn.Sequential(nn.Embedding(9, 8), encoder, nn.Linear(8, 9)))
    assert [depths[f"1.layers.{at}.linear1.weight"] for at in range(3)] == [3, 2, 1]
    model = Transformer()
    expected = _depths(model)
    for at, block in enumerate(model.blocks):
        model.blocks[at] = torch.compile(block)
    assert [*_depths(model).values()] == [*expected.values()]


def test_factors_may_be_given_by_pattern_or_by_a_function():
    table = {"blocks.*": 0.5, "blocks.2.*": 0.75}
    rates = _rates(steepest.build(Transformer(), "lion", lr=1.0, layer_decay=table))
    assert rates["blocks.0.norm.weight"] == 0.5
    assert rates["blocks.2.norm.weight"] == 0.75
    assert rates["head.weight"] == 1.0
    by_name = _rates(steepest.build(Transformer(), "lion", lr=1.0, layer_decay=lambda name: len(name) / 64))
    assert by_name == {name: len(name) / 64 for name in rates}


def test_an_override_s_own_lr_is_taken_as_it_is():
    overrides = {"blocks.0.norm.weight": {"lr": 0.5}, "blocks.1.norm.weight": "lion"}
    optimizer = steepest.build(Transformer(), "adamw", lr=1.0, layer_decay=0.5, overrides=overrides)
    rates = _rates(optimizer)
    assert rates["blocks.0.norm.weight"] == 0.5
    assert rates["blocks.1.norm.weight"] == 1e-4 * 0.25
    assert rates["blocks.0.norm.bias"] == 0.125


def test_explain_shows_it():
    rows = {row.name: row for row in steepest.build(Transformer(), "muon", layer_decay=0.5).explain().rows}
    assert rows["embed.weight"].why.endswith("; layer 0 of 4")
    assert rows["blocks.1.mlp.0.weight"].why == "linear: Linear, hidden; layer 2 of 4"
    assert rows["head.bias"].why.endswith("; layer 4 of 4")
    assert rows["head.bias"].kind == "bias"
    by_pattern = steepest.build(Transformer(), "muon", layer_decay={"blocks.*": 0.125}).explain()
    assert "linear: Linear, hidden; lr by layer_decay (0.125)" in {row.why for row in by_pattern.rows}


def test_a_tensor_learning_rate_has_a_tensor_for_each_factor():
    lr = torch.tensor(0.25)
    optimizer = steepest.build(Transformer(), "adamw", lr=lr, layer_decay=0.5)
    found: dict[float, set[int]] = {}
    for group in optimizer.param_groups:
        found.setdefault(float(group["lr"]), set()).add(id(group["lr"]))
    assert sorted(found) == [0.25 * 0.5**at for at in range(4, -1, -1)]
    assert all(len(same) == 1 for same in found.values())
    assert found[0.25] == {id(lr)}


class Deep(nn.Module):
    """A block with lists of modules of one class, as an MLP may be built."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(2)))
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))


class Simple(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)


class Held(nn.Module):
    """An embedding, blocks in whatever holds them, and a head."""

    def __init__(self, blocks: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = blocks
        self.head = nn.Linear(8, 11)


class Attributes(nn.Module):
    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.block1, self.block2 = block(), block()
        self.head = nn.Linear(8, 11)


class Towers(nn.Module):
    """Two stacks of one class."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.document = (Held(nn.ModuleList([Deep(), Deep()])) for _ in range(2))


def _in_sequence(block: type[nn.Module], count: int) -> nn.Module:
    return nn.Sequential(nn.Embedding(11, 8), *(block() for _ in range(count)), nn.Linear(8, 11))


@for_each("block", [Block, Deep, Simple])
@for_each(
    ("make", "blocks", "count"),
    [
        (lambda block: Held(nn.ModuleDict({str(at): block() for at in range(3)})), "layers.{}.", 3),
        (
            lambda block: Held(nn.ModuleDict({f"block_{at}": block() for at in range(3)})),
            "layers.block_{}.",
            3,
        ),
        (lambda block: Held(nn.ModuleList([block()])), "layers.{}.", 1),
        (lambda block: Held(nn.ModuleDict({"0": block()})), "layers.{}.", 1),
        (
            lambda block: nn.ModuleDict({"embed": nn.Embedding(9, 8), "h": nn.ModuleList([block()])}),
            "h.{}.",
            1,
        ),
        (lambda block: nn.ModuleList([block(), block(), nn.LayerNorm(8)]), "{}.", 2),
        (
            lambda block: nn.Sequential(nn.Embedding(9, 8), Held(nn.ModuleList([block(), block()]))),
            "1.layers.{}.",
            2,
        ),
    ],
)
def test_blocks_are_found_in_every_kind_of_list_and_kept_whole(
    make: Any, blocks: str, count: int, block: type[nn.Module]
):
    model = make(block)
    expected = {}
    for name, _ in model.named_parameters():
        own = next((at + 1 for at in range(count) if name.startswith(blocks.format(at))), None)
        before = 0 if "embed" in name or name == "0.weight" else count + 1
        expected[name] = 0.5 ** (count + 1 - (before if own is None else own))
    assert _rates(steepest.build(model, "adamw", lr=1.0, layer_decay=0.5)) == expected


@pytest.mark.parametrize("block", [Block, Deep, Simple])
@pytest.mark.parametrize("count", [1, 3])
def test_blocks_between_an_embedding_and_a_head_are_kept_whole(block: type[nn.Module], count: int):
    model = _in_sequence(block, count)
    expected = {name: 0.5 ** (count + 1 - int(name.split(".")[0])) for name, _ in model.named_parameters()}
    assert _rates(steepest.build(model, "adamw", lr=1.0, layer_decay=0.5)) == expected


def test_blocks_of_alternating_classes_in_a_sequence_are_all_counted():
    kinds = [Simple, Block, Simple, Block]
    depths = _depths(nn.Sequential(nn.Embedding(9, 8), *(kind() for kind in kinds), nn.LayerNorm(8)))
    assert {int(name.split(".")[0]): depth for name, depth in depths.items()} == {
        at: 5 - at for at in range(6)
    }


def test_two_stacks_of_one_class_are_counted():
    depths = _depths(Towers())
    found = {".".join(name.split(".")[:3]): depth for name, depth in depths.items() if ".layers." in name}
    assert found == {"query.layers.0": 4, "query.layers.1": 3, "document.layers.0": 2, "document.layers.1": 1}


@pytest.mark.parametrize("block", [Block, Deep, Simple])
def test_blocks_in_no_list_are_refused(block: type[nn.Module]):
    with pytest.raises(ValueError, match=r"layer_decay: found no list of blocks in Attributes.*\{'encoder"):
        steepest.build(Attributes(block), "adamw", layer_decay=0.5)


@pytest.mark.parametrize(
    "model",
    [nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), Block()],
)
def test_a_model_without_blocks_is_refused(model: nn.Module):
    with pytest.raises(ValueError, match=r"layer_decay: found no list of blocks in "):
        steepest.build(model, "adamw", layer_decay=0.5)
    steepest.build(model, "adamw", layer_decay=lambda name: 0.5)


@pytest.mark.parametrize(
    ("error", "match", "decay"),
    [
        (ValueError, "layer_decay must be a number in .0, 1.", 0.0),
        (ValueError, "layer_decay must be a number in .0, 1.", 1.5),
        (TypeError, "layer_decay must be a number, a dict", True),
        (TypeError, "layer_decay must be a number, a dict", [0.5]),
        (ValueError, r"layer_decay\['blocks\.\*'\] must be a number", {"blocks.*": 2}),
        (ValueError, "layer_decay: 'block..' matches no parameter", {"block.*": 0.5}),
        (TypeError, "patterns of parameter names must be strings", {0: 0.5}),
        (ValueError, "the factor of 'positions' must be a number", lambda name: "0.5"),
    ],
)
def test_what_is_no_layer_decay_is_refused(error: type[Exception], match: str, decay: Any):
    with pytest.raises(error, match=match):
        steepest.build(Transformer(), "adamw", layer_decay=decay)


@pytest.mark.parametrize("decay", [np.float32(0.5), np.float64(0.5), Fraction(1, 2)], ids=repr)
def test_a_number_of_another_library_is_a_number(decay: Any):
    groups = steepest.build(Transformer(), "muon", lr=0.25, layer_decay=decay).param_groups
    expected = steepest.build(Transformer(), "muon", lr=0.25, layer_decay=0.5).param_groups
    assert [group["lr"] for group in groups] == [group["lr"] for group in expected]
    assert {type(group["lr"]) for group in groups} == {float}


def test_recipes_classes_and_dicts_take_it():
    options: dict[str, Any] = {"lr": 0.25, "layer_decay": 0.5}
    expected = [group["lr"] for group in steepest.build(Transformer(), "muon", **options).param_groups]
    made = [
        steepest.Recipe("muon", **options)(Transformer()).param_groups,
        steepest.Auto(Transformer(), "muon", **options).param_groups,
        steepest.param_groups(Transformer(), "muon", **options),
    ]
    assert [[group["lr"] for group in groups] for groups in made] == [expected] * 3
    assert steepest.plan(Transformer(), "muon", layer_decay=0.5).state_bytes > 0
