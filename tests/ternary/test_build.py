"""One optimizer for a model with ternary layers: built, explained, saved, copied, skipped."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import steepest
from steepest.rules.ternary_flip import TernaryFlipRule
from steepest.ternary import TernaryFlip, TernaryLinear, flip_stats, ternarize

from .models import accumulators, assert_same, has_votes, loss_of, mixed_model, small_model, snapshot, taken

OPTIONS = {"threshold": 2, "votes": "magnitude", "schedule": "annealed", "total_steps": 40}


def train(model, optimizer, steps, first=0):
    for index in range(first, first + steps):
        loss_of(model, index).backward()
        optimizer.step()
        optimizer.zero_grad()


def built(rule="lion", seed=0, **hyper):
    model = small_model(seed)
    return model, steepest.build(model, rule, ternary=OPTIONS, **hyper)


RULES = ["sgd", "adamw", "signgsd", "lion", "simba", "sgd_sai", "muon", "procrustes"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.filterwarnings("ignore:nothing goes to")
def test_it_equals_an_optimizer_and_a_trainer_side_by_side(rule):
    model, optimizer = built(rule)
    train(model, optimizer, 5)

    other = small_model()
    plain = steepest.build(other, rule, ternary=False)
    trainer = TernaryFlip(other, **OPTIONS)
    for index in range(5):
        loss_of(other, index).backward()
        for each in (plain, trainer):
            each.step()
            each.zero_grad()
    assert isinstance(plain, steepest.Optimizer)
    assert_same(snapshot(model), snapshot(other))
    assert flip_stats(optimizer) == trainer.stats()
    assert trainer.stats().total_flips > 0


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.filterwarnings("ignore:nothing goes to")
def test_resuming_is_never_having_stopped(rule):
    model, optimizer = built(rule)
    train(model, optimizer, 6)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    train(model, optimizer, 6, first=6)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert set(saved[1]) == {"state", "param_groups"}
    other, resumed = built(rule, seed=5)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert resumed.state[other[0].votes]["accumulator"].dtype == torch.int8
    train(other, resumed, 6, first=6)
    assert_same(snapshot(other), snapshot(model))
    assert_same(accumulators(resumed), accumulators(optimizer))
    assert taken(resumed) == 12


@pytest.mark.parametrize("way", ["both", "alone", "pickle"])
def test_copies_go_on_alike(way):
    model, optimizer = built()
    train(model, optimizer, 3)
    if way == "both":
        twin, other = copy.deepcopy((model, optimizer))
    elif way == "pickle":
        twin, other = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        other = copy.deepcopy(optimizer)
        twin = None
    layers = list(other.targets.layers.values())
    for mine, theirs in zip(optimizer.targets.layers.values(), layers, strict=True):
        assert mine is not theirs
        assert torch.equal(mine.packed, theirs.packed)
        assert torch.equal(mine.scale, theirs.scale)
    if twin is not None:
        for each, one in ((model, optimizer), (twin, other)):
            before = snapshot(model)
            train(each, one, 3, first=10)
            assert torch.equal(before["0.packed"], model[0].packed) == (each is twin)
        assert_same(snapshot(twin), snapshot(model))
    assert accumulators(other).keys() == {"0", "3"}
    for vote_buffer in other.targets.buffers.values():
        assert vote_buffer.options is other.param_groups[-1]


def test_explain_lists_every_ternary_tensor_with_its_rule_and_why():
    _model, optimizer = built()
    table = optimizer.explain()
    rows = {row.name: row for row in table.rows if row.rule == "ternary_flip"}
    assert rows.keys() == {"0.packed", "3.packed"}
    assert rows["3.packed"].shape == (7, 13)
    assert rows["3.packed"].state_bytes == 7 * 13 + 8
    assert "magnitude votes, threshold 2 annealed" in rows["0.packed"].why
    total = next(total for total in table.totals if total.rule == "ternary_flip")
    assert (total.tensors, total.parameters, total.state_bytes) == (2, 169, 169 + 16)
    kinds = {row.name: row.kind for row in table.rows}
    assert kinds["0.scale"] == kinds["3.scale"] == "gain"
    assert kinds["4.weight"] == "output"
    assert {row.weight_decay for row in table.rows if row.kind == "gain"} == {0.0}
    text = str(table)
    assert "ternary_flip" in text
    assert "nan" not in text


def test_binary_layers_are_built_explained_and_resumed():
    model = mixed_model()
    optimizer = steepest.build(model, "lion", ternary=OPTIONS)
    train(model, optimizer, 4)
    rows = {row.name: row for row in optimizer.explain().rows}
    assert "BinaryLinear, 1 bit a weight; moved by magnitude votes" in rows["3.packed"].why
    assert rows["3.scale"].kind == "gain"
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    train(model, optimizer, 4, first=4)
    other = mixed_model(seed=5)
    resumed = steepest.build(other, "lion", ternary=OPTIONS)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(other, resumed, 4, first=4)
    assert flip_stats(optimizer).layers[1].flips > 0
    assert_same(snapshot(other), snapshot(model))
    assert_same(accumulators(resumed), accumulators(optimizer))


def test_left_out_layers_are_explained():
    table = steepest.build(small_model(), "lion", ternary=False).explain()
    assert any("0.packed (ternary=False), 3.packed (ternary=False)" in note for note in table.notes)


def test_state_bytes_count_the_votes():
    model, optimizer = built("sgd")
    train(model, optimizer, 2)
    # SGD counts every tensor's steps.
    assert optimizer.state_bytes() == 169 + 16 + 8 * 8
    model, optimizer = built("lion")
    train(model, optimizer, 2)
    assert optimizer.state_bytes() == 169 + 16 + 4 * sum(p.numel() for p in model.parameters()) - 8


def test_closures_schedulers_and_hooks_work_as_always():
    model, optimizer = built("sgd", lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    schedule.step()
    assert calls == ["before", "after"]
    assert all(group["lr"] == pytest.approx(0.01) for group in optimizer.param_groups[:-1])
    assert taken(optimizer) == 1


def mend(model):
    """Make the gradients finite but for what stands for T."""
    for name, param in model.named_parameters():
        if not name.endswith("votes"):
            param.grad = torch.ones_like(param)


@pytest.mark.parametrize("where", ["float", "ternary"])
def test_a_gradient_that_is_not_finite_skips_all(where):
    model, optimizer = built(nonfinite="skip")
    train(model, optimizer, 3)
    before, state = snapshot(model), copy.deepcopy(optimizer.state_dict())
    loss_of(model, 3).backward()
    if where == "float":
        model[4].weight.grad[0, 0] = float("inf")
    else:
        # In the gradient of T alone: the scales' gradients are mended before the step.
        (model[0](torch.full((1, 6), float("inf"))).nan_to_num(0, 0, 0).sum() * 1.0).backward()
        mend(model)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert not has_votes(optimizer)
    assert_same(snapshot(model), before)
    for index, entries in optimizer.state_dict()["state"].items():
        assert_same(entries, state["state"][index])
    optimizer.zero_grad()
    train(model, optimizer, 1)
    assert taken(optimizer) == 4


def test_raising_names_the_layer_and_changes_nothing():
    model, optimizer = built(nonfinite="raise")
    train(model, optimizer, 1)
    before = snapshot(model)
    (model[0](torch.full((1, 6), float("inf"))).sum()).backward()
    mend(model)
    with pytest.raises(FloatingPointError, match=r"parameter '0\.votes'"):
        optimizer.step()
    assert_same(snapshot(model), before)


def test_grad_scaler_skips_and_goes_on():
    model, optimizer = built()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = snapshot(model)
    for index, factor in enumerate((torch.finfo(torch.float32).max, 1.0, 1.0)):
        (scaler.scale(loss_of(model, index)) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if index == 0:
            assert_same(snapshot(model), before)
            assert taken(optimizer) == 0
    assert taken(optimizer) == 2


def test_weights_flip_where_every_float_parameter_is_frozen():
    model = nn.Sequential(TernaryLinear(6, 4, bias=False), nn.LayerNorm(4))
    optimizer = steepest.build(model, "sgd_sai", lr=0.0, ternary={"threshold": 1})
    for name, param in model.named_parameters():
        param.requires_grad_(name == "0.votes")
    before = model[0].packed.clone()
    model(torch.randn(3, 6)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].packed, before)


def frozen_before():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    model[0].requires_grad_(False)
    ternarize(model)
    return model


def frozen_after():
    model = frozen_before()
    model[0].requires_grad_()
    assert model[0].votes.requires_grad
    assert model[0].requires_grad_(False) is model[0]
    return model


def frozen_by_its_flag():
    model = frozen_after()
    model[0].requires_grad_()
    model[0].votes.requires_grad_(False)
    return model


@pytest.mark.parametrize("made", [frozen_before, frozen_after, frozen_by_its_flag])
def test_a_frozen_layer_stays_until_it_is_thawed(made):
    torch.manual_seed(0)
    model = made()
    assert [model[0].votes.requires_grad, model[2].votes.requires_grad] == [False, True]
    optimizer = steepest.build(model, "lion", ternary={"threshold": 1})
    rows = {row.name: row for row in optimizer.explain().rows}
    assert [rows[f"{at}.packed"].frozen for at in (0, 2)] == [True, False]
    before = [model[at].packed.clone() for at in (0, 2)]
    train(model, optimizer, 1)
    assert [torch.equal(model[at].packed, was) for at, was in zip((0, 2), before, strict=True)] == [
        True,
        False,
    ]
    assert not accumulators(optimizer)["0"].any()
    model[0].votes.requires_grad_(True)
    train(model, optimizer, 1)
    assert not torch.equal(model[0].packed, before[0])


def test_votes_cast_before_a_layer_was_frozen_do_not_move_it():
    model = small_model()
    optimizer = steepest.build(model, "lion", ternary={"threshold": 1})
    before = model[0].packed.clone()
    loss_of(model, 0).backward()
    model[0].requires_grad_(False)
    optimizer.step()
    assert torch.equal(model[0].packed, before)
    assert copy.deepcopy(model)[0].votes.requires_grad is False


def test_a_scale_that_was_never_stepped_is_no_state_of_its_rule():
    # SGD-SaI relates the states of all tensors it has stepped; votes alone are none.
    model = small_model()
    optimizer = steepest.build(model, "sgd_sai", normalize="max", ternary={"threshold": 1})
    model[0].scale.requires_grad_(False)
    train(model, optimizer, 2)
    assert taken(optimizer) == 2


def test_foreign_state_dicts_are_refused_and_nothing_is_loaded():
    model, optimizer = built()
    train(model, optimizer, 2)
    good = copy.deepcopy(optimizer.state_dict())
    plain = steepest.build(small_model(), "lion", ternary=False).state_dict()
    index = good["param_groups"][-1]["params"][0]
    *groups, packed = good["param_groups"]

    def state(**changes):
        return {**good, "state": {**good["state"], index: {**good["state"][index], **changes}}}

    for bad, says in (
        (plain, "different number of parameter groups"),
        (
            state(accumulator=torch.zeros(3, 3, dtype=torch.int8)),
            r"'0\.votes' has shape .*nothing was loaded",
        ),
        (state(accumulator="lost"), r"'0\.votes' is a str .*nothing was loaded"),
        (state(momentum=torch.zeros(1)), "'momentum', which 'ternary_flip' does not know"),
        ({**good, "param_groups": [*groups, {**packed, "power": -1.0}]}, "power must be"),
        ({**good, "param_groups": [*groups, {**packed, "rule": "lion"}]}, "saved with rule 'lion'"),
        ({**good, "param_groups": [*groups, {**packed, "schedule": "custom"}]}, "nothing was loaded"),
    ):
        with pytest.raises(ValueError, match=says):
            optimizer.load_state_dict(bad)
        for at, entries in optimizer.state_dict()["state"].items():
            assert_same(entries, good["state"][at])
        assert optimizer.param_groups[-1]["power"] == 1


def old_layout(model, optimizer):
    """The state dict that the first releases made: accumulators in the state of the scales."""
    new = copy.deepcopy(optimizer.state_dict())
    *groups, packed = new["param_groups"]
    names = [name for group in groups for name in group["param_names"]]
    for at, name in zip(packed["params"], packed["param_names"], strict=True):
        entries = new["state"].pop(at)
        scale = new["state"].setdefault(names.index(name.replace("votes", "scale")), {})
        scale["votes"] = entries["accumulator"]
        scale["flip_step"] = entries["step"].to(torch.int64)
    options = {*TernaryFlipRule.hyper, "nonfinite", "compile", "seed"} - {"lr", "weight_decay"}
    groups[0]["ternary_flip"] = {name: packed[name] for name in options}
    return {"state": new["state"], "param_groups": groups}


@pytest.mark.parametrize("rule", ["sgd", "lion", "adamw"])
def test_checkpoints_of_the_first_releases_load(rule):
    model, optimizer = built(rule, nonfinite="skip")
    train(model, optimizer, 4)
    old = old_layout(model, optimizer)
    before = copy.deepcopy(old)
    other = copy.deepcopy(model)
    resumed = steepest.build(other, rule, ternary={"threshold": 7})
    resumed.load_state_dict(old)
    assert old["param_groups"] == before["param_groups"]
    train(model, optimizer, 4, first=4)
    train(other, resumed, 4, first=4)
    assert_same(snapshot(other), snapshot(model))
    assert_same(accumulators(resumed), accumulators(optimizer))
    assert taken(resumed) == 8
    assert "ternary_flip" not in resumed.param_groups[0]
    assert resumed.param_groups[-1]["threshold"] == OPTIONS["threshold"]


def test_gradients_released_in_backward_leave_the_votes_to_the_step():
    found = []
    for released in (False, True):
        model, optimizer = built()
        if released:
            steepest.release_gradients(model, optimizer)
        train(model, optimizer, 4)
        assert taken(optimizer) == 4
        found.append(snapshot(model))
    assert_same(*found)


@pytest.mark.parametrize("bad", ["parameters", "votes", "both", "neither"])
def test_with_released_gradients_a_bad_step_is_counted_once(bad):
    model, optimizer = built(nonfinite="skip")
    steepest.release_gradients(model, optimizer)
    if bad in ("votes", "both"):
        # In the gradient of T alone.
        scale = model[0].scale.requires_grad_(False)
        model[0](torch.full((1, 6), float("inf"))).nan_to_num(0, 0, 0).sum().backward()
        scale.requires_grad_(True)
        model[0].bias.grad = None
    factor = float("nan") if bad in ("parameters", "both") else 1.0
    (model[4](torch.ones(3, 7)).sum() * factor).backward()
    optimizer.step()
    assert optimizer.skipped_steps == (bad != "neither")
    optimizer.zero_grad()
    train(model, optimizer, 1)
    assert optimizer.skipped_steps == (bad != "neither")


def test_nonfinite_of_a_group_changed_later_is_the_votes_too():
    model, optimizer = built()
    assert optimizer.param_groups[-1]["nonfinite"] == "ignore"
    train(model, optimizer, 1)
    before = model[0].packed.clone()
    for way, times in (("skip", 1), ("raise", 1)):
        optimizer.param_groups[-1]["nonfinite"] = way
        model[0](torch.full((1, 6), float("inf"))).nan_to_num(0, 0, 0).sum().backward()
        mend(model)
        if way == "raise":
            with pytest.raises(FloatingPointError, match=r"parameter '0\.votes'"):
                optimizer.step()
        else:
            optimizer.step()
        assert optimizer.skipped_steps == times
        assert torch.equal(model[0].packed, before)
        optimizer.zero_grad()


def test_the_votes_own_nonfinite_stays_as_set():
    model = small_model()
    optimizer = steepest.build(model, "sgd", lr=0.1, nonfinite="skip", ternary={"nonfinite": "ignore"})
    train(model, optimizer, 2)
    assert optimizer.param_groups[-1]["nonfinite"] == "ignore"
    twin, again = copy.deepcopy((model, optimizer))
    again.load_state_dict(optimizer.state_dict())
    train(twin, again, 1, first=2)
    assert again.param_groups[-1]["nonfinite"] == "ignore"


def test_options_changed_later_are_not_those_of_a_state_dict_made_before():
    _, optimizer = built("sgd")
    saved = optimizer.state_dict()
    before = optimizer.param_groups[-1]["threshold"]
    optimizer.param_groups[-1]["threshold"] = before + 1
    assert saved["param_groups"][-1]["threshold"] == before
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[-1]["threshold"] == before


def test_an_optimizer_whose_layers_have_gone_loads_nothing():
    model, optimizer = built()
    train(model, optimizer, 1)
    saved = optimizer.state_dict()
    later = TernaryFlip(model)
    with pytest.raises(RuntimeError, match="layer '0' belongs to another TernaryFlip"):
        optimizer.load_state_dict(saved)
    loss_of(model, 0).backward()
    assert has_votes(later)


def test_options_that_nothing_takes_are_refused():
    with pytest.raises(ValueError, match=r"Sequential has no ternary layers; .*ternarize\(model\)"):
        steepest.build(nn.Sequential(nn.Linear(2, 2)), "lion", ternary={"threshold": 3})
    with pytest.raises(TypeError, match="treshold"):
        steepest.build(small_model(), "lion", ternary={"treshold": 3})
    with pytest.raises(ValueError, match="threshold must be"):
        steepest.build(small_model(), "lion", ternary={"threshold": 0})
    for wrong in ("magnitude", 1, ["sign"]):
        with pytest.raises(TypeError, match=r"ternary must be a dict .*, got"):
            steepest.build(small_model(), "lion", ternary=wrong)
    plain = nn.Sequential(nn.Linear(2, 2))
    assert isinstance(steepest.build(plain, "lion", ternary=False), steepest.Optimizer)
    with pytest.raises(ValueError, match="ternary=True, but Sequential has no ternary layers"):
        steepest.build(plain, "lion", ternary=True)
    assert steepest.build(small_model(), "lion", ternary=True).param_groups[-1]["votes"] == "sign"
    model = small_model()
    optimizer = steepest.Optimizer([model[0].votes], rule="ternary_flip")
    loss_of(model, 0).backward()
    with pytest.raises(
        ValueError, match="is not the vote buffer of a ternary layer, as 'ternary_flip' needs"
    ):
        optimizer.step()
    with pytest.raises(ValueError, match="takes the votes of ternary layers"):
        steepest.Optimizer(model.parameters(), rule="ternary_flip")
    with pytest.raises(ValueError, match="unknown optimizer 'ternary_flip'"):
        steepest.create("ternary_flip", model.parameters())
    assert "ternary_flip" not in steepest.list_optimizers()
    with pytest.raises(ValueError, match="votes of ternary layer '3' are not among"):
        optimizer.watch(TernaryFlip(model).targets)
    with pytest.raises(ValueError, match="this Lion trains no ternary weights"):
        flip_stats(steepest.build(plain, "lion"))


def test_distributed_checkpoints_hold_the_votes():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model, optimizer = built()
    train(model, optimizer, 3)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    assert saved["state"]["0.votes"]["accumulator"].dtype == torch.int8
    other, resumed = built()
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, resumed, saved)
    train(model, optimizer, 3, first=3)
    train(other, resumed, 3, first=3)
    assert_same(snapshot(other), snapshot(model))


@pytest.mark.parametrize("rule", ["adamw", "lion", "sgd"])
def test_a_distributed_checkpoint_resumes_exactly_in_a_fresh_optimizer(rule, tmp_path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, optimizer = built(rule)
    train(model, optimizer, 3)
    saved = get_state_dict(model, optimizer)
    dcp.save({"model": saved[0], "optimizer": saved[1]}, checkpoint_id=tmp_path, no_dist=True)
    train(model, optimizer, 3, first=3)

    other, resumed = built(rule, seed=5)
    before = snapshot(other)
    found = get_state_dict(other, resumed)
    # Torch has taken a step to fill the state.
    assert_same(snapshot(other), before)
    assert taken(resumed) == 0
    assert not any(a.any() for a in accumulators(resumed).values())
    dcp.load({"model": found[0], "optimizer": found[1]}, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(other, resumed, model_state_dict=found[0], optim_state_dict=found[1])
    assert taken(resumed) == 3
    train(other, resumed, 3, first=3)
    assert_same(snapshot(other), snapshot(model))
    assert_same(accumulators(resumed), accumulators(optimizer))


def test_a_fresh_optimizers_state_dict_takes_everything_back():
    _model, optimizer = built()
    saved = optimizer.state_dict()
    assert not saved["state"]
    other, resumed = built()
    train(other, resumed, 2)
    resumed.load_state_dict(saved)
    assert taken(resumed) == flip_stats(resumed).step == 0
    assert not any(a.any() for a in accumulators(resumed).values())


def test_a_schedule_that_fails_later_leaves_everything_as_it_was():
    answers = iter([2.0, 2.0])

    def schedule(step):
        return next(answers)

    model = small_model()
    optimizer = steepest.build(model, "adamw", ternary={"schedule": schedule})
    train(model, optimizer, 2)
    before, state = snapshot(model), copy.deepcopy(optimizer.state_dict()["state"])
    loss_of(model, 2).backward()
    with pytest.raises(StopIteration):
        optimizer.step()
    assert_same(snapshot(model), before)
    for at, entries in optimizer.state_dict()["state"].items():
        assert_same(entries, state[at])


class Masked(TernaryLinear):
    pass


def test_subclasses_are_known_and_others_of_the_name_are_not():
    model = nn.Sequential(Masked(6, 4), nn.ReLU(), Masked(4, 2))
    optimizer = steepest.build(model, "lion", ternary={"threshold": 1})
    kinds = {row.name: row.kind for row in optimizer.explain().rows}
    assert kinds["0.scale"] == "gain"
    assert "0.packed" in kinds

    stranger = type("TernaryLinear", (nn.Module,), {})()
    stranger.scale = nn.Parameter(torch.ones(4, 4))
    rows = steepest.build(nn.Sequential(stranger, nn.Linear(4, 4)), "lion").explain().rows
    assert not any("TernaryLinear's weights" in row.why for row in rows)


def test_the_main_rules_seed_and_nonfinite_are_the_votes_too():
    optimizer = steepest.build(small_model(), "lion", seed=7, nonfinite="skip")
    assert (optimizer.param_groups[-1]["seed"], optimizer.param_groups[-1]["nonfinite"]) == (7, "skip")


def test_a_transformer_from_float_to_trained():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(11, 16), nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16), nn.LayerNorm(16),
        nn.Linear(16, 11),
    )  # fmt: skip
    ternarize(model)
    optimizer = steepest.build(
        model, "adamw", lr=0.01, ternary={"threshold": 4, "total_steps": 150, "schedule": "annealed"}
    )
    losses = []
    for _ in range(150):
        tokens = torch.randint(0, 11, (32,))
        loss = nn.functional.cross_entropy(model(tokens), (3 * tokens + 1) % 11)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert flip_stats(optimizer).flips == 0


def test_replaced_parameters_are_refused_by_name():
    model, optimizer = built()
    train(model, optimizer, 2)
    saved = optimizer.state_dict()
    model.load_state_dict({name: each.clone() for name, each in model.state_dict().items()}, assign=True)
    before, counts = snapshot(model), copy.deepcopy(accumulators(optimizer))
    loss_of(model, 2).backward()
    for act in (optimizer.step, lambda: optimizer.load_state_dict(saved)):
        with pytest.raises(RuntimeError, match=r"layer '0' are not the tensor .*assign=True"):
            act()
    assert_same(snapshot(model), before)
    assert_same(accumulators(optimizer), counts)
    # Made anew, it goes on from the checkpoint.
    again = steepest.build(model, "lion", ternary=OPTIONS)
    again.load_state_dict(saved)
    train(model, again, 1, first=2)
    assert flip_stats(again).step == 3
