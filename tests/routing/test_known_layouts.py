"""Fused weights of known classes are cut by build(); tests/integrations asks the real modules.

Stand-ins for classes of Hugging Face and timm say so by the module in which they claim to be defined.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest.views import interleaved, matrices, rows, transposed

FLOAT64: dict[str, Any] = {"method": "svd"}


class GPTNeoXAttention(nn.Module):
    """Query, key and value of a head, then of the next."""

    __module__ = "transformers.models.gpt_neox.modeling_gpt_neox"

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.num_attention_heads = heads
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        fused = self.query_key_value(x).unflatten(-1, (self.num_attention_heads, 3, -1))
        return (fused[..., 0, :] * fused[..., 1, :].tanh() + fused[..., 2, :] ** 2).flatten(-2)


class Apart(nn.Module):
    """The same with separate matrices."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) * self.k(x).tanh() + self.v(x) ** 2


class Body(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attn = attention
        self.lm_head = nn.Linear(8, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.attn(x))


def renamed(cls: type[nn.Module], name: str, module: str) -> type[nn.Module]:
    return type(name, (cls,), {"__module__": module})


def view_of(model: nn.Module, weight: str, rule: str = "muon", **options: Any) -> Any:
    rows_ = steepest.build(model, rule, **options).explain().rows
    return next(row.view for row in rows_ if row.name.endswith(weight))


@pytest.mark.parametrize("rule", ["muon", "normuon", "scion"])
def test_heads_that_are_stored_one_after_another_step_as_separate_matrices(rule: str):
    fused, apart = Body(GPTNeoXAttention()).double(), Body(Apart()).double()
    cuts = matrices(fused.attn.query_key_value.weight.detach(), interleaved(2, rows(4, 4, 4)))
    for layer, block in zip(apart.attn.children(), cuts, strict=True):
        layer.weight.data = block.clone()
    apart.lm_head.load_state_dict(fused.lm_head.state_dict())
    x = torch.randn(6, 8, dtype=torch.float64)
    assert torch.allclose(fused(x), apart(x))
    for model in (fused, apart):
        optimizer = steepest.build(model, rule, lr=0.05, fallback={"rule": "sgd"}, **FLOAT64)
        for _ in range(4):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    stepped = matrices(fused.attn.query_key_value.weight.detach(), interleaved(2, rows(4, 4, 4)))
    for ours, theirs, before in zip(stepped, apart.attn.children(), cuts, strict=True):
        torch.testing.assert_close(ours, theirs.weight.detach(), rtol=1e-9, atol=1e-11)
        assert not torch.allclose(before, theirs.weight, atol=1e-3)


def test_explain_says_what_it_knows():
    explanation = steepest.build(Body(GPTNeoXAttention()), "muon").explain()
    row = explanation.rows[0]
    assert row.view == ("rows", (4, 4, 4), 2)
    assert row.why == "linear: Linear, hidden, query, key and value fused"
    assert not explanation.warnings
    assert "rows 3×4 interleaved ×2" in str(explanation)


class Falcon(nn.Module):
    __module__ = "transformers.models.falcon.modeling_falcon"

    def __init__(self, outputs: int, **attributes: Any) -> None:
        super().__init__()
        vars(self).update({"num_heads": 4, "head_dim": 2, **attributes})
        self.query_key_value = nn.Linear(8, outputs, bias=False)


Falcon.__name__ = "FalconAttention"


@pytest.mark.parametrize(
    ("outputs", "attributes", "view"),
    [
        (24, {"new_decoder_architecture": False, "multi_query": False}, ("rows", (2, 2, 2), 4)),
        (12, {"new_decoder_architecture": False, "multi_query": True}, ("rows", (8, 2, 2))),
        (16, {"new_decoder_architecture": True, "num_kv_heads": 2}, ("rows", (4, 2, 2), 2)),
        # Another version of the class: the sizes do not add up.
        (20, {"new_decoder_architecture": True, "num_kv_heads": 2}, None),
    ],
)  # fmt: skip
def test_falcons_three_layouts(outputs: int, attributes: dict[str, Any], view: Any):
    assert view_of(Body(Falcon(outputs, **attributes)), "query_key_value.weight") == view


def test_a_class_of_another_package_is_not_known_and_no_wrong_view_is_suggested():
    elsewhere = renamed(GPTNeoXAttention, "GPTNeoXAttention", "mine")
    # A subclass of the real one is known by its base.
    assert view_of(Body(elsewhere()), "query_key_value.weight") == interleaved(2, rows(4, 4, 4))
    copied = type("GPTNeoXAttention", (nn.Module,), {**vars(GPTNeoXAttention), "__module__": "mine"})

    def init(self: Any) -> None:
        nn.Module.__init__(self)
        self.query_key_value = nn.Linear(8, 24, bias=False)

    copied.__init__ = init
    (warning,) = steepest.build(Body(copied()), "muon").explain().warnings
    assert "attn.query_key_value.weight (24, 8) may be query, key and value in one, head by head" in warning
    assert "rows(8, 8, 8)" not in warning
    assert re.search(r"views=\{'attn.query_key_value.weight': interleaved\(HEADS, rows\(SIZE", warning)
    settled = steepest.build(
        Body(copied()), "muon", views={"attn.query_key_value.weight": interleaved(2, rows(4, 4, 4))}
    )
    assert not settled.explain().warnings


class Unknown(nn.Module):
    __module__ = "transformers.models.some.modeling_some"

    def __init__(self, layer: str, outputs: int) -> None:
        super().__init__()
        self.add_module(layer, nn.Linear(8, outputs, bias=False))


@pytest.mark.parametrize(
    ("layer", "outputs"), [("qkv", 24), ("qkv_proj", 32), ("up", 24), ("query_key_value", 24)]
)
def test_no_order_is_suggested_for_an_unknown_class_of_theirs(layer: str, outputs: int):
    (warning,) = steepest.build(Body(Unknown(layer, outputs)), "muon").explain().warnings
    assert f"attn.{layer}.weight ({outputs}, 8) may be" in warning
    assert not re.search(r"rows\([\d.]", warning)
    assert ("query, key and value" in warning) == ("q" in layer)
    assert (
        not steepest.build(Body(Unknown(layer, outputs)), "muon", views={"attn.*": None}).explain().warnings
    )


def test_an_input_projection_is_not_called_query_key_and_value():
    for outputs in (16, 32):  # Mamba's
        assert not steepest.build(Body(Unknown("in_proj", outputs)), "muon").explain().warnings
    mine = renamed(nn.Module, "Mine", "mine")()
    mine.in_proj = nn.Linear(8, 24, bias=False)
    (warning,) = steepest.build(Body(mine), "muon").explain().warnings
    assert "may be three matrices in one" in warning
    assert "rows(8, 8, 8)" in warning


def test_the_users_view_takes_precedence():
    given = {"attn.query_key_value.weight": None}
    assert view_of(Body(GPTNeoXAttention()), "query_key_value.weight", views=given) is None
    with pytest.raises(ValueError, match=r"shape \(24, 8\); rows\(4, 4\) 2 times covers 16 of dimension 0"):
        steepest.build(Body(GPTNeoXAttention()), "muon", views={"attn.*": interleaved(2, rows(4, 4))})


def test_rules_without_views_take_no_notice():
    assert view_of(Body(GPTNeoXAttention()), "query_key_value.weight", "lion") is None


def test_interleaved_heads_are_not_taken_for_contiguous_ones():
    """Adam-mini's blocks are contiguous rows."""

    class Attention(nn.Module):
        __module__ = "timm.models.maxxvit"

        def __init__(self, head_first: bool) -> None:
            super().__init__()
            self.num_heads, self.dim_head, self.head_first = 2, 4, head_first
            self.qkv = nn.Linear(8, 24, bias=False)

    Attention.__name__ = "AttentionCl"
    for head_first, blocks in ((True, "rows"), (False, ((4, 4), (8, 1)))):
        optimizer = steepest.build(Body(Attention(head_first)), "adam_mini")
        group = next(group for group in optimizer.param_groups if "attn.qkv.weight" in group["param_names"])
        assert group["blocks"] == blocks


class Experts(nn.Module):
    __module__ = "transformers.models.some.modeling_some"

    def __init__(self, *, is_transposed: bool, is_concatenated: bool) -> None:
        super().__init__()
        self.num_experts = 3
        self.is_transposed, self.is_concatenated = is_transposed, is_concatenated
        up, down = ((3, 8, 10), (3, 5, 8)) if is_transposed else ((3, 10, 8), (3, 8, 5))
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(up)), nn.Parameter(torch.randn(down))


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("rule", ["muon", "normuon"])
def test_experts_step_as_separate_gates_and_ups(rule: str, joined: bool, stored: bool):
    model = Body(Experts(is_transposed=stored, is_concatenated=joined)).double()
    param, dim = model.attn.gate_up_proj, 2 if stored else 1
    parts = [slice(0, 5), slice(5, 10)] if joined else [slice(0, 10, 2), slice(1, 10, 2)]

    def separate(tensor: Tensor) -> list[Tensor]:
        whole = tensor.detach().movedim(dim, 1)
        return [whole[:, part].clone() for part in parts]

    twins = [nn.Parameter(each) for each in separate(param)]
    optimizer = steepest.build(model, rule, lr=0.05, **FLOAT64)
    twin = steepest.create(rule, twins, lr=0.05, view="batch", **FLOAT64)
    for _ in range(3):
        param.grad = torch.randn(param.shape, dtype=torch.float64)
        for each, grad in zip(twins, separate(param.grad), strict=True):
            each.grad = grad
        optimizer.step()
        twin.step()
    for ours, theirs in zip(separate(param), twins, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-9, atol=1e-11)


def test_experts_in_another_order_or_of_other_sizes_are_left_whole():
    model = Body(Experts(is_transposed=True, is_concatenated=True))
    assert view_of(model, "gate_up_proj", overrides={"*_proj": {"view": "flatten"}}) == "flatten"
    model.attn.down_proj = nn.Parameter(torch.randn(3, 7, 9))  # 5 inputs are expected
    assert view_of(model, "gate_up_proj") == transposed()
    # A rule that merges dimensions sees each expert as one matrix.
    assert view_of(model, "gate_up_proj", "quad") == rows(1, 1, 1)


@pytest.mark.parametrize(
    ("name", "attributes", "outputs", "view"),
    [
        ("Attention", {}, 24, rows(8, 8, 8)),
        ("Attention", {"num_heads": 2, "key_dim": 3, "val_dim": 6}, 24, interleaved(2, rows(3, 3, 6))),
        ("AttentionCl", {"num_heads": 2, "head_first": True}, 24, interleaved(2, rows(4, 4, 4))),
        ("WindowAttentionGlobal", {"use_global": True}, 16, rows(8, 8)),
        ("SomethingNew", {}, 24, None),
    ],
)
def test_timms_attentions(name: str, attributes: dict[str, Any], outputs: int, view: Any):
    module = renamed(nn.Module, name, "timm.models.some")()
    vars(module).update(attributes)
    module.qkv = nn.Linear(8, outputs, bias=False)
    assert view_of(Body(module), "qkv.weight") == view


def test_a_checkpoint_from_before_the_layout_was_known_loads_with_none():
    whole = Body(GPTNeoXAttention())
    unknown = type("Unknown", (GPTNeoXAttention,), {})
    older = steepest.build(whole, "muon", views={"attn.*": None})
    saved = older.state_dict()
    for group in saved["param_groups"]:
        group.pop("views", None)  # as it was when nothing was known
        if group["rule"] == "muon":
            group["views"] = None
    with pytest.raises(ValueError, match=r"was saved with views=None, this optimizer has .*query_key_value"):
        steepest.build(Body(unknown()), "muon").load_state_dict(saved)
    steepest.build(Body(unknown()), "muon", views={"attn.*": None}).load_state_dict(saved)
