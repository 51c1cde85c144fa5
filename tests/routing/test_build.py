"""build's arguments: rates and decay of the two rules, overrides, views, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import steepest
from loops import for_each
from steepest.views import columns, rows

from .zoo import GPT, MLP, LoRA, MoE, SASRec, ViT


def by_name(optimizer: steepest.Optimizer) -> dict[str, dict]:
    return {name: group for group in optimizer.param_groups for name in group["param_names"]}


# -- learning rates and weight decay


def test_the_main_rules_groups_come_first():
    groups = steepest.build(ViT(), "muon", lr=1e-3, overrides={"head.*": "lion"}).param_groups
    assert [group["rule"] for group in groups] == ["muon", "adamw", "adamw", "lion", "lion"]


def test_rate_and_decay_carry_over_between_rules_that_move_as_far():
    groups = by_name(
        steepest.build(GPT(), "muon", lr=3e-4, weight_decay=0.2, weight_decay_method="independent")
    )
    for name in ("wte.weight", "blocks.0.up.weight"):
        found = groups[name]["lr"], groups[name]["weight_decay"], groups[name]["weight_decay_method"]
        assert found == (3e-4, 0.2, "independent")


@pytest.mark.parametrize(("main", "fallback"), [({"scale": "spectral"}, "adamw"), ({}, "lion")])
def test_they_do_not_carry_over_between_others(main: dict, fallback: str):
    groups = by_name(steepest.build(GPT(), "muon", lr=3e-2, weight_decay=0.2, fallback=fallback, **main))
    own = steepest.create(fallback, [torch.zeros(1)]).param_groups[0]
    assert (groups["wte.weight"]["lr"], groups["wte.weight"]["weight_decay"]) == (
        own["lr"],
        own["weight_decay"],
    )


@pytest.mark.parametrize(
    ("rule", "options", "carries"),
    [
        ("adamw", {}, True),
        ("muon", {}, True),
        ("muon", {"extra_scale": 5.0}, False),
        ("normuon", {}, True),
        ("normuon", {"scale": "spectral"}, False),
        ("hyperball", {}, False),
        ("polargrad", {"scale": "match_rms_adamw"}, False),
        ("scion", {"scale": "match_rms_adamw"}, False),
        ("quad", {}, True),
        ("procrustes", {}, True),
        ("procrustes", {"lr_style": None}, False),
        ("lion", {}, False),
    ],
)
def test_only_rules_that_move_like_adamw_hand_their_rate_on(rule: str, options: dict, carries: bool):
    overrides = {"wte.weight": {"rule": "normuon" if rule == "adamw" else "adamw"}}
    groups = by_name(steepest.build(GPT(), rule, lr=0.03, overrides=overrides, **options))
    assert (groups["wte.weight"]["lr"] == 0.03) is carries
    if rule not in ("adamw", "quad", "procrustes", "lion"):
        assert (groups["wpe.weight"]["lr"] == 0.03) is carries


def test_an_overrides_own_options_say_whether_the_rate_is_right_for_it():
    overrides = {"*.up.weight": {"rule": "muon", "scale": "spectral"}, "*.down.weight": "muon"}
    groups = by_name(steepest.build(GPT(), "adamw", lr=0.03, overrides=overrides))
    assert groups["blocks.0.up.weight"]["lr"] == 1e-3
    assert groups["blocks.0.down.weight"]["lr"] == 0.03


def test_the_fallbacks_own_rate_and_options_win():
    fallback = {"rule": "adamw", "betas": (0.8, 0.9), "weight_decay": 0.0}
    groups = by_name(
        steepest.build(GPT(), "muon", lr=1.0, weight_decay=0.1, fallback=fallback, fallback_lr=0.5)
    )
    wte = groups["wte.weight"]
    assert (wte["lr"], wte["betas"], wte["weight_decay"]) == (0.5, (0.8, 0.9), 0.0)
    assert groups["blocks.0.up.weight"]["lr"] == 1.0


def test_without_a_rate_each_rule_has_its_default():
    groups = by_name(steepest.build(GPT(), "muon", fallback="lion"))
    assert (groups["blocks.0.up.weight"]["lr"], groups["wte.weight"]["lr"]) == (1e-3, 1e-4)


def test_common_options_are_everyones():
    groups = steepest.build(GPT(), "muon", lr=1e-3, nonfinite="skip", seed=7).param_groups
    assert {(group["nonfinite"], group["seed"]) for group in groups} == {("skip", 7)}


def test_a_tensor_rate_is_kept_as_it_is():
    lr = torch.tensor(1e-3)
    assert all(group["lr"] is lr for group in steepest.build(GPT(), "muon", lr=lr).param_groups)


class Exempt(nn.Module):
    """timm's and Mamba's ways to say that a tensor is not to be decayed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.second.weight._no_weight_decay = True
        self.decay = nn.Parameter(torch.ones(4, 3))
        self.decay._no_weight_decay = True

    def no_weight_decay(self) -> set[str]:
        return {"first.weight"}


def test_what_the_model_exempts_is_not_decayed_unless_an_override_says_so():
    optimizer = steepest.build(Exempt(), "muon", weight_decay=0.1, decay_vectors=True)
    decay = {row.name: row.weight_decay for row in optimizer.explain().rows}
    assert {name for name in decay if decay[name] == 0} == {"first.weight", "second.weight", "decay"}
    groups = by_name(steepest.build(Exempt(), "muon", overrides={"first.weight": {"weight_decay": 0.3}}))
    assert groups["first.weight"]["weight_decay"] == 0.3
    assert groups["decay"]["rule"] == "adamw"


class Unrelated(nn.Linear):
    """Has a method of timm's name, and means something else by it."""

    def no_weight_decay(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_a_no_weight_decay_that_takes_arguments_is_not_called():
    rows = steepest.build(nn.Sequential(Unrelated(4, 4), nn.Linear(4, 2)), "muon").explain().rows
    assert {row.weight_decay > 0 for row in rows if row.kind != "bias"} == {True}


# -- overrides


def test_an_override_gives_a_rule_or_options_and_later_ones_win():
    model = GPT()
    overrides = {
        "blocks.*": {"weight_decay": 0.5},
        "blocks.*.proj.weight": "lion",
        "blocks.1.proj.weight": {"lr": 7.0},
    }
    groups = by_name(steepest.build(model, "muon", lr=1e-3, overrides=overrides))
    one, other = groups["blocks.0.proj.weight"], groups["blocks.1.proj.weight"]
    assert (one["rule"], one["lr"], one["weight_decay"]) == ("lion", 1e-4, 0.5)
    assert (other["rule"], other["lr"]) == ("lion", 7.0)
    assert (groups["blocks.0.up.weight"]["rule"], groups["blocks.0.up.weight"]["weight_decay"]) == (
        "muon",
        0.5,
    )


def test_an_override_back_to_a_rule_of_the_model_has_its_options():
    groups = by_name(steepest.build(LoRA(), "muon", lr=0.25, momentum=0.5, overrides={"*.lora_?": "muon"}))
    assert (groups["wrapped.lora_A"]["lr"], groups["wrapped.lora_A"]["momentum"]) == (0.25, 0.5)
    groups = by_name(steepest.build(GPT(), "muon", fallback_lr=0.125, overrides={"*.up.weight": "adamw"}))
    assert groups["blocks.0.up.weight"]["lr"] == 0.125


def test_an_override_by_any_name_of_a_tied_tensor():
    groups = by_name(steepest.build(GPT(), "muon", overrides={"lm_head.weight": "lion"}))
    assert groups["wte.weight"]["rule"] == "lion"


def test_explain_says_which_override_it_was_and_what_it_replaced():
    optimizer = steepest.build(GPT(), "muon", overrides={"lm_head.*": "lion"})
    why = {row.name: row.why for row in optimizer.explain().rows}
    assert why["wte.weight"].startswith("override: 'lm_head.*', otherwise embedding: Embedding")


# -- views


def test_views_are_globs_and_none_takes_the_matrix_whole():
    optimizer = steepest.build(
        GPT(), "muon", views={"blocks.*.qkv.weight": rows(8, 8, 8), "blocks.1.qkv.weight": None}
    )
    view = {row.name: row.view for row in optimizer.explain().rows}
    assert view["blocks.0.qkv.weight"] == ("rows", (8, 8, 8))
    assert view["blocks.1.qkv.weight"] is None
    assert not optimizer.explain().warnings


def test_a_given_view_replaces_the_known_one():
    given = rows(16, 8)
    optimizer = steepest.build(SASRec(), "muon", views={"*.in_proj_weight": given})
    assert {row.view for row in optimizer.explain().rows if row.kind == "attention"} == {given}


def test_experts_are_a_batch_for_muon_and_a_view_for_psgd():
    view = {row.name: row.view for row in steepest.build(MoE(), "procrustes").explain().rows}
    assert view["layers.0.experts.up"] == ("rows", (1, 1, 1))
    optimizer = steepest.build(MoE(), "muon", views={"*.experts.up": columns(8, 8)})
    group = by_name(optimizer)["layers.0.experts.up"]
    assert (group["view"], group["views"]) == ("batch", {"layers.0.experts.up": columns(8, 8)})


def test_a_view_of_a_tensor_whose_rule_sees_no_matrices_is_told():
    optimizer = steepest.build(GPT(), "lion", views={"*.qkv.weight": rows(8, 8, 8)})
    unused = {row.name for row in optimizer.explain().rows if row.why.endswith("its view is not used")}
    assert unused == {"blocks.0.qkv.weight", "blocks.1.qkv.weight"}


def test_a_view_must_fit():
    with pytest.raises(ValueError, match=r"'blocks.0.up.weight' has shape \(32, 8\); rows\(8, 8\) covers 16"):
        steepest.build(GPT(), "muon", views={"blocks.0.up.weight": rows(8, 8)})


# -- refusals


@for_each(
    ("error", "match", "options"),
    [
        (ValueError, r"unknown rule 'muom' \(did you mean 'muon'\?\)", {"rule": "muom"}),
        (ValueError, r"unknown rule 'adam' \(did you mean 'adamw'\?\)", {"fallback": "adam"}),
        (ValueError, "unknown rule 'lino'", {"overrides": {"wte.*": "lino"}}),
        (ValueError, "fallback='normuon' is for the matrices", {"fallback": "normuon"}),
        (ValueError, "'orthogonalized' needs OrthogonalizedOptimizer.orthogon", {"rule": "orthogonalized"}),
        (ValueError, "'orthogonalized' needs", {"overrides": {"*.up.weight": "orthogonalized"}}),
        (ValueError, "fallback names no rule", {"fallback": {"lr": 1.0}}),
        (TypeError, "fallback must be a rule's name or a dict", {"fallback": 3}),
        (TypeError, r"overrides\['wte.\*'\] must be a rule's name", {"overrides": {"wte.*": None}}),
        (TypeError, r"overrides must be a dict .*got \['a'\]", {"overrides": ["a"]}),
        (TypeError, r"views must be a dict .*got \['a'\]", {"views": ["a"]}),
        (TypeError, r"'momentun' \(did you mean 'momentum'\?\)", {"momentun": 0.9}),
        (TypeError, "'betas': it is no option of 'muon'. Options of the fallback", {"betas": (0.9, 0.9)}),
        (TypeError, "fallback: 'beta' is no option of 'adamw'", {"fallback": {"rule": "adamw", "beta": 1}}),
        (TypeError, r"overrides\['wte.\*'\]: 'lrr' is no option", {"overrides": {"wte.*": {"lrr": 1}}}),
        (TypeError, "'views' is no option", {"overrides": {"wte.*": {"views": {}}}}),
        (ValueError, "momentum must be a number", {"momentum": 1.5}),
        (ValueError, "lr must be", {"lr": -1.0}),
        (ValueError, "fallback: lr must be", {"fallback_lr": -1.0}),
        (ValueError, "lr must be", {"overrides": {"wte.*": {"lr": -1.0}}}),
        (ValueError, "'wte.wight' matches no .*mean 'wte.weight'", {"overrides": {"wte.wight": "sgd"}}),
        (ValueError, r"views: '\*.qvk.weight' .*mean '\*.qkv.weight'", {"views": {"*.qvk.weight": None}}),
        (ValueError, "'ln_f.weight' has shape .*takes matrices", {"overrides": {"ln_f.weight": "muon"}}),
    ],
)
def test_mistakes_are_named(error: type[Exception], match: str, options: dict):
    with pytest.raises(error, match=match):
        steepest.build(GPT(), **options)


def test_an_unknown_rule_lists_those_with_a_class():
    with pytest.raises(ValueError, match="unknown rule") as error:
        steepest.build(GPT(), "nope")
    assert str(error.value).partition("known: ")[2].split(", ") == steepest.list_optimizers()


def test_a_group_added_without_parameter_names_says_what_to_write():
    optimizer, late = steepest.build(MLP(), "lion"), nn.Linear(2, 2)
    before = len(optimizer.param_groups)
    for params in (late.parameters(), [late.weight], late.weight):
        with pytest.raises(ValueError, match=r"no names.*named_parameters\('layer'\)"):
            optimizer.add_param_group({"params": params})
    assert len(optimizer.param_groups) == before
    optimizer.add_param_group({"params": list(late.named_parameters("layer"))})
    assert optimizer.param_groups[-1]["param_names"] == ["layer.weight", "layer.bias"]


def test_a_bad_fallback_is_found_even_where_it_is_not_used():
    with pytest.raises(ValueError, match="fallback: eps must be"):
        steepest.build(GPT(), "lion", fallback={"rule": "adamw", "eps": -1})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            MLP().parameters(),
            "build() takes the model itself, not its parameters, got generator: pass the model",
        ),
        (
            [*MLP().parameters()],
            "build() takes the model itself, not its parameters, got list: pass the model",
        ),
        (MLP().state_dict(), "build() takes the model itself, not its parameters, got OrderedDict: pass the"),
        (MLP, "build() takes a model, got the class MLP: pass an instance of it"),
        ("model.pt", "build() takes a torch.nn.Module, got str"),
        (None, "build() takes a torch.nn.Module, got NoneType"),
    ],
    ids=["parameters()", "list", "state dict", "class", "path", "None"],
)
def test_only_modules(given: Any, words: str):
    with pytest.raises(TypeError) as refused:
        steepest.build(given)
    assert str(refused.value).startswith(words)
    assert ("steepest.Lion(params)" in str(refused.value)) == ("parameters" in words)


@pytest.mark.parametrize("model", [nn.ReLU(), MLP().requires_grad_(False)])
def test_nothing_to_train(model: nn.Module):
    with pytest.raises(ValueError, match="no parameter to train"):
        steepest.build(model)


def test_muon_without_any_hidden_matrix_warns():
    with pytest.warns(UserWarning, match="nothing goes to 'muon'"):
        steepest.build(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5)), "muon")


def test_memory_is_simba_s_own_option_unless_it_is_the_least():
    """Both have the name; no value is both."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    for memory in ("counts", "momentum"):
        assert steepest.build(model, "simba", memory=memory).param_groups[0]["memory"] == memory
    assert steepest.build(model, "simba", memory="least").param_groups[0]["state_dtype"] == "int8"
    with pytest.raises(ValueError, match="memory must be None or 'least', got 'momentum'"):
        steepest.build(model, "lion", memory="momentum")
    with pytest.raises(ValueError, match="memory must be"):
        steepest.build(model, "simba", memory="more")
