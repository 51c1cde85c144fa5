"""explain(): the table, its totals, what it warns of, and that it outlives copies and checkpoints."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import steepest
from steepest.views import columns, rows, transposed

from .zoo import GPT, LoRA, MoE, ViT

GPT_TABLE = """\
tensor                    shape  rule   lr     decay  view      why
----------------------------------------------------------------------------------------------------
blocks.*.qkv.weight (2)   24×8   muon   0.001  0.1    rows 3×8  linear: Linear, hidden
blocks.*.proj.weight (2)  8×8    muon   0.001  0.1              linear: Linear, hidden
blocks.*.up.weight (2)    32×8   muon   0.001  0.1              linear: Linear, hidden
blocks.*.down.weight (2)  8×32   muon   0.001  0.1              linear: Linear, hidden
wte.weight                20×8   adamw  0.001  0.1              embedding: Embedding, a row for each
                                                                input, and the output layer
                                                                lm_head.weight (tied)
wpe.weight                6×8    adamw  0.001  0.1              embedding: Embedding, a row for each
                                                                input
"""


def built(**options: object) -> steepest.Optimizer:
    return steepest.build(
        GPT(), "muon", lr=1e-3, weight_decay=0.1, views={"blocks.*.qkv.weight": rows(8, 8, 8)}, **options
    )


def test_the_table():
    text = built().explain().table(100)
    assert text.startswith(GPT_TABLE)
    assert text.endswith(
        "total  tensors  parameters    state  frozen\n"
        "muon         8       1,536  6.0 KiB       0\n"
        "adamw       20         432  3.5 KiB       0\n"
        "note: wte.weight is also lm_head.weight: stepped once, under its first name\n"
        "note: norms, biases and gains have no weight decay; decay_vectors=True gives it to them"
    )


@pytest.mark.parametrize("width", [20, 80, 110, 200])
@pytest.mark.parametrize("model", [GPT, ViT, MoE, LoRA])
def test_no_line_is_wider_than_the_terminal(model: type[nn.Module], width: int, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    text = str(steepest.build(nn.ModuleDict({"a_long_name_" * 6: model()}), "muon").explain())
    assert max(map(len, text.splitlines())) <= max(width, 80)


def test_the_schedule_is_seen():
    optimizer = built()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert {row.lr for row in optimizer.explain().rows} == {5e-4}
    assert scheduler.get_last_lr() == [5e-4] * 3


def test_an_optimizer_made_by_hand_says_so():
    linear = nn.Linear(4, 4)
    groups = [{"params": [linear.weight]}, {"params": [linear.bias], "rule": "adamw"}]
    explanation = steepest.Optimizer(groups, rule="muon").explain()
    assert [(row.name, row.rule, row.kind) for row in explanation.rows] == [
        ("parameter 0 of group 0", "muon", "set by hand"),
        ("parameter 0 of group 1", "adamw", "set by hand"),
    ]
    assert "set by hand" in str(explanation)


def test_a_class_of_one_rule_was_not_set_by_hand():
    groups = [{"params": [*nn.Linear(4, 4).parameters()], "weight_decay": decay} for decay in (0.1, 0.0)]
    explanation = steepest.AdamW(groups).explain()
    assert {row.why for row in explanation.rows} == {"one rule for all tensors"}
    assert "by hand" not in str(explanation)


def test_unnamed_tensors_that_are_alike_share_a_line():
    """As in the groups that Hugging Face's Trainer makes for a class."""
    layers = [param for _ in range(32) for param in nn.Linear(4, 4).parameters()]
    odd = nn.Parameter(torch.ones(3, 4))
    groups = [{"params": layers[::2]}, {"params": [*layers[1::2], odd, nn.Parameter(torch.ones(4))]}]
    table = steepest.Lion(groups, lr=1e-3).explain().table(110)
    assert [line.split("  ")[0] for line in table.splitlines()[2:5]] == [
        "parameters 0–31 of group 0 (32)",
        "parameters 0–31, 33 of group 1 (33)",
        "parameter 32 of group 1",
    ]


def test_many_runs_of_unnamed_tensors_are_abridged():
    params = [nn.Parameter(torch.ones(*shape)) for _ in range(9) for shape in ((4, 4), (4, 4), (4,))]
    table = steepest.Lion(params).explain().table(110)
    assert "parameters 0, 1, 3, … of group 0 (18)" in table
    assert "parameters 2, 5, 8, … of group 0 (9)" in table


def test_a_group_added_later_is_set_by_hand_whatever_its_names():
    model, extra = nn.Linear(3, 3), nn.Linear(4, 4)
    optimizer = steepest.build(model, "muon")
    optimizer.add_param_group({"params": list(extra.named_parameters()), "rule": "lion"})
    first, second = optimizer.explain().rows[:2], optimizer.explain().rows[-2:]
    assert [row.name for row in first] == [row.name for row in second] == ["weight", "bias"]
    assert [row.kind for row in first] == ["linear", "bias"]
    assert [row.kind for row in second] == ["set by hand", "set by hand"]


# -- warnings


def test_warns_of_matrices_that_look_fused():
    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.ModuleDict(dict(layer())) for _ in range(2))

    def layer():
        yield "tripled", nn.Linear(4, 12)
        yield "wqkv", nn.Linear(4, 8)
        yield "gate_up_proj", nn.Linear(4, 10)
        yield "plain", nn.Linear(4, 8)

    doubt, *warnings = steepest.build(Unknown(), "muon").explain().warnings
    assert "no output layer was found" in doubt
    assert [warning.partition(" ")[0] for warning in warnings] == [
        "layers.*.tripled.weight",
        "layers.*.wqkv.weight",
        "layers.*.gate_up_proj.weight",
    ]
    assert "views={'layers.*.tripled.weight': rows(4, 4, 4)}" in warnings[0]
    assert "rows(...)" in warnings[1]
    assert "rows(5, 5)" in warnings[2]


def test_a_fused_suggestion_can_be_followed_as_it_is_written():
    warning = steepest.build(GPT(), "muon").explain().warnings[0]
    suggestion = warning.partition("views=")[2].partition("; ")[0]
    optimizer = steepest.build(GPT(), "muon", views=eval(suggestion, {"rows": rows}))
    assert not optimizer.explain().warnings


class Conv1D(nn.Module):
    """A linear layer stored [in, out], as GPT-2's in Hugging Face; theirs has ``nf``."""

    def __init__(self, into: int, out: int, **extra: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(into, out))
        self.bias = nn.Parameter(torch.ones(out))
        for name, value in extra.items():
            setattr(self, name, value)


@pytest.mark.parametrize("extra", [{"nf": 12}, {}], ids=["known", "of another library"])
def test_a_fused_projection_that_is_stored_transposed_is_cut_by_columns(extra: dict[str, int]):
    model = nn.ModuleDict(
        {"c_attn": Conv1D(4, 12, **extra), "c_fc": Conv1D(4, 16, nf=16), "lm_head": nn.Linear(4, 9)}
    )
    explanation = steepest.build(model, "muon").explain()
    assert {row.name: (row.kind, row.view) for row in explanation.rows if len(row.shape) == 2} == {
        "c_attn.weight": ("linear", transposed() if extra else None),
        "c_fc.weight": ("linear", transposed()),
        "lm_head.weight": ("output", None),
    }
    (warning,) = explanation.warnings
    suggestion = warning.partition("views=")[2].partition("; ")[0]
    assert suggestion == "{'c_attn.weight': transposed(columns(4, 4, 4))}"
    assert warning.endswith("if it is one matrix, pass transposed() there to confirm")
    given = eval(suggestion, {"transposed": transposed, "columns": columns})
    for views in (given, {"c_attn.weight": transposed()}):
        settled = steepest.build(model, "muon", views=views).explain()
        assert not settled.warnings
        assert {row.name: row.view for row in settled.rows}["c_attn.weight"] == views["c_attn.weight"]
    assert "columns 3×4 transposed" in str(steepest.build(model, "muon", views=given).explain())


def test_other_fused_projections_that_are_stored_transposed():
    model = nn.ModuleDict({"gate_up": Conv1D(4, 10, nf=10), "c_attn": Conv1D(4, 8, nf=8)})
    model["last"] = nn.Linear(4, 9)
    gate_up, cross = steepest.build(model, "muon", overrides={"last.*": "adamw"}).explain().warnings
    assert "views={'gate_up.weight': transposed(columns(5, 5))}" in gate_up
    assert "views={'c_attn.weight': transposed(columns(...))}" in cross


def test_warns_of_a_vector_that_is_given_to_a_rule_for_matrices():
    warnings = steepest.build(ViT(), "muon", overrides={"cls_token": "muon"}).explain().warnings
    assert any("cls_token (1, 1, 8) is a vector stored as a matrix" in warning for warning in warnings)


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.mix = nn.Parameter(torch.ones(4, 5))
        self.mixes = nn.Parameter(torch.ones(2, 4, 5))


def test_warns_of_modules_that_it_does_not_know():
    warnings = steepest.build(Unknown(), "muon").explain().warnings[1:]
    assert "mix (4, 5) belongs to an unknown module, and goes to 'adamw'" in warnings[0]
    assert "overrides={'mix': 'muon'}" in warnings[0]
    assert "overrides={'mixes': {'rule': 'muon', 'view': 'batch'}}" in warnings[1]
    overrides = {"mix": "muon", "mixes": {"rule": "muon", "view": "batch"}}
    explanation = steepest.build(Unknown(), "muon", overrides=overrides).explain()
    assert {row.name: (row.rule, row.view) for row in explanation.rows if row.name != "linear.bias"} == {
        "mix": ("muon", None),
        "mixes": ("muon", "batch"),
        "linear.weight": ("muon", None),
    }
    assert len(explanation.warnings) == 1


def test_psgd_merges_what_others_flatten():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 2, 1))
    for rule, view in (("quad", "merge"), ("procrustes", "merge"), ("muon", "flatten"), ("lion", None)):
        assert steepest.build(model, rule).explain().rows[0].view == view


def test_a_rule_that_has_frozen_tensors_alone_is_warned_of_and_shown_so():
    """As in LoRA where no factor is a hidden layer's matrix."""
    model = nn.Sequential(*(nn.Linear(4, 4).requires_grad_(False) for _ in range(3)), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match="^nothing goes to 'muon' but 3 frozen tensors: no trainable tensor"):
        optimizer = steepest.build(model, "muon")
    assert "(muon): 3 tensors (3 frozen), 48 parameters; " in repr(optimizer)
    assert "(adamw): 1 tensor, 8 parameters; " in repr(optimizer)


def test_frozen_tensors_are_listed_and_have_no_state():
    explanation = steepest.build(LoRA(), "muon").explain()
    frozen = {row.name: row.state_bytes for row in explanation.rows if row.frozen}
    assert frozen == {"wrapped.base.weight": 0, "wrapped.base.bias": 0}
    assert "Linear, hidden; frozen" in explanation.table(110)
    assert any(note.startswith("2 frozen tensors (72 parameters)") for note in explanation.notes)


# -- copies and checkpoints


def test_the_reasons_are_plain_data_that_copies_keep():
    optimizer = built(overrides={"*.bias": {"lr": 1.0}})
    before = optimizer.explain()
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other.explain() == before
        assert "embedding: Embedding" in str(before)
    assert pickle.loads(pickle.dumps(before)) == before


def test_no_reason_is_in_a_param_group_or_a_checkpoint():
    optimizer = built(overrides={"*.bias": {"lr": 1.0}})
    by_hand = steepest.Optimizer([nn.Parameter(torch.ones(2, 2))], rule="muon").param_groups[0]
    for group in (*optimizer.param_groups, *optimizer.state_dict()["param_groups"]):
        known = (
            set(steepest.rule.find_rule(group["rule"]).defaults()) | set(by_hand) | {"param_names", "name"}
        )
        assert set(group) <= known
    assert "embedding: " not in str(optimizer.state_dict())


def test_a_checkpoint_loads_without_the_reasons_and_leaves_ours():
    optimizer = built()
    before = optimizer.explain()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = built()
    again.load_state_dict(torch.load(file, weights_only=True))
    assert again.explain() == before
    groups = [
        {
            "params": list(zip(group["param_names"], group["params"], strict=True)),
            "rule": group["rule"],
            **({"views": group["views"]} if group.get("views") else {}),
        }
        for group in optimizer.param_groups
    ]
    by_hand = steepest.Optimizer(groups, rule="muon")
    by_hand.load_state_dict(optimizer.state_dict())
    assert {row.why for row in by_hand.explain().rows} == {"set by hand"}
    optimizer.load_state_dict(by_hand.state_dict())
    assert optimizer.explain() == before


def with_old_reasons(saved: dict) -> dict:
    """The state dict as the first releases wrote it: five keys of prose in every group."""
    for index, group in enumerate(saved["param_groups"]):
        count = len(group["params"])
        group |= {"why": ["linear: of old"] * count, "aliases": [[]] * count, "fallback": "lion"}
        group |= {"left_out": ["old"] * (index == 0), "doubts": ["an old doubt"] * (index == 0)}
    return saved


def test_keys_in_a_checkpoint_s_groups_that_read_like_reasons_change_no_explanation():
    optimizer, other = built(), built()
    train(optimizer)
    before = optimizer.explain()
    other.load_state_dict(with_old_reasons(optimizer.state_dict()))
    assert other.explain() == before
    assert str(other.state_dict()["state"]) == str(optimizer.state_dict()["state"])


def test_a_key_of_the_users_own_that_is_called_as_a_reason_was_is_kept():
    make = lambda: steepest.Lion([{"params": [nn.Parameter(torch.ones(2))], "why": "mine"}])  # noqa: E731
    optimizer, saved = make(), make().state_dict()
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["why"] == "mine"


def train(optimizer: steepest.Optimizer) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    optimizer.step()
