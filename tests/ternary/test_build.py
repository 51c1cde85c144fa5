"""One optimizer for a model with ternary layers: built, explained, saved, copied, skipped."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import steepest
from steepest.ternary import TernaryFlip, TernaryLinear, TernaryOptimizer, ternarize

from .models import assert_same, loss_of, mixed_model, small_model, snapshot

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
    assert type(plain) is steepest.Optimizer
    assert_same(snapshot(model), snapshot(other))
    assert optimizer.flip.stats() == trainer.stats()
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
    assert resumed.flip.accumulators["0"] is resumed.state[other[0].scale]["votes"]
    train(other, resumed, 6, first=6)
    assert_same(snapshot(other), snapshot(model))
    assert_same(resumed.flip.accumulators, optimizer.flip.accumulators)
    assert int(resumed.flip.taken) == 12


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
    layers = list(other.flip.layers.values())
    for mine, theirs in zip(optimizer.flip.layers.values(), layers, strict=True):
        assert mine is not theirs
        assert torch.equal(mine.packed, theirs.packed)
        assert torch.equal(mine.scale, theirs.scale)
    if twin is not None:
        for each, one in ((model, optimizer), (twin, other)):
            before = snapshot(model)
            train(each, one, 3, first=10)
            assert torch.equal(before["0.packed"], model[0].packed) == (each is twin)
        assert_same(snapshot(twin), snapshot(model))
    assert other.flip.accumulators["0"] is other.state[layers[0].scale]["votes"]
    assert other.param_groups[0]["ternary_flip"] is other.flip.options


def test_explain_lists_every_ternary_tensor_with_its_rule_and_why():
    _model, optimizer = built()
    table = optimizer.explain()
    rows = {row.name: row for row in table.rows if row.rule == "ternary_flip"}
    assert rows.keys() == {"0.packed", "3.packed"}
    assert rows["3.packed"].shape == (7, 13)
    assert rows["3.packed"].state_bytes == 7 * 13
    assert "magnitude votes, threshold 2 annealed" in rows["0.packed"].why
    total = next(total for total in table.totals if total.rule == "ternary_flip")
    assert (total.tensors, total.parameters, total.state_bytes) == (2, 169, 169)
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
    assert optimizer.flip.stats().layers[1].flips > 0
    assert_same(snapshot(other), snapshot(model))
    assert_same(resumed.flip.accumulators, optimizer.flip.accumulators)


def test_left_out_layers_are_explained():
    table = steepest.build(small_model(), "lion", ternary=False).explain()
    assert any("0.packed (ternary=False), 3.packed (ternary=False)" in note for note in table.notes)


def test_state_bytes_count_the_votes():
    model, optimizer = built("sgd")
    assert optimizer.state_bytes() == 169 + 8
    train(model, optimizer, 2)
    # SGD counts every tensor's steps.
    assert optimizer.state_bytes() == 169 + 8 + 4 * 8
    model, optimizer = built("lion")
    train(model, optimizer, 2)
    assert optimizer.state_bytes() == 169 + 8 + 4 * sum(p.numel() for p in model.parameters())


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
    assert all(group["lr"] == pytest.approx(0.01) for group in optimizer.param_groups)
    assert int(optimizer.flip.taken) == 1


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
        for param in model.parameters():
            param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert not optimizer.flip.has_votes
    assert_same(snapshot(model), before)
    for index, entries in optimizer.state_dict()["state"].items():
        assert_same(entries, state["state"][index])
    optimizer.zero_grad()
    train(model, optimizer, 1)
    assert int(optimizer.flip.taken) == 4


def test_raising_names_the_layer_and_changes_nothing():
    model, optimizer = built(nonfinite="raise")
    train(model, optimizer, 1)
    before = snapshot(model)
    (model[0](torch.full((1, 6), float("inf"))).sum()).backward()
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    with pytest.raises(FloatingPointError, match="ternary layer '0'"):
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
            assert int(optimizer.flip.taken) == 0
    assert int(optimizer.flip.taken) == 2


def test_weights_flip_where_every_float_parameter_is_frozen():
    model = nn.Sequential(TernaryLinear(6, 4, bias=False), nn.LayerNorm(4))
    optimizer = steepest.build(model, "sgd_sai", lr=0.0, ternary={"threshold": 1})
    for param in model.parameters():
        param.requires_grad_(False)
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
    assert model[0].trainable
    assert model[0].requires_grad_(False) is model[0]
    return model


def frozen_by_its_flag():
    model = frozen_after()
    model[0].requires_grad_()
    model[0].trainable = False
    return model


@pytest.mark.parametrize("made", [frozen_before, frozen_after, frozen_by_its_flag])
def test_a_frozen_layer_stays_until_it_is_thawed(made):
    torch.manual_seed(0)
    model = made()
    assert [model[0].trainable, model[2].trainable] == [False, True]
    optimizer = steepest.build(model, "lion", ternary={"threshold": 1})
    rows = {row.name: row for row in optimizer.explain().rows}
    assert [rows[f"{at}.packed"].frozen for at in (0, 2)] == [True, False]
    before = [model[at].packed.clone() for at in (0, 2)]
    train(model, optimizer, 1)
    assert [torch.equal(model[at].packed, was) for at, was in zip((0, 2), before, strict=True)] == [
        True,
        False,
    ]
    assert not optimizer.flip.accumulators["0"].any()
    model[0].trainable = True
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
    assert copy.deepcopy(model)[0].trainable is False


def test_a_scale_that_was_never_stepped_is_no_state_of_its_rule():
    # SGD-SaI relates the states of all tensors it has stepped; votes alone are none.
    model = small_model()
    optimizer = steepest.build(model, "sgd_sai", normalize="max", ternary={"threshold": 1})
    model[0].scale.requires_grad_(False)
    train(model, optimizer, 2)
    assert int(optimizer.flip.taken) == 2


def test_foreign_state_dicts_are_refused_and_nothing_is_loaded():
    model, optimizer = built()
    train(model, optimizer, 2)
    good = copy.deepcopy(optimizer.state_dict())
    plain = steepest.build(small_model(), "lion", ternary=False).state_dict()
    no_votes = copy.deepcopy(good)
    index = next(i for i, state in good["state"].items() if "votes" in state)
    del no_votes["state"][index]["votes"]
    wrong = copy.deepcopy(good)
    wrong["state"][index]["votes"] = torch.zeros(3, 3, dtype=torch.int8)
    for bad, says in (
        (plain, "without ternary weights"),
        (no_votes, "no votes of ternary layer"),
        (wrong, "the accumulator of ternary layer"),
    ):
        with pytest.raises(ValueError, match=f"{says}.*nothing was loaded"):
            optimizer.load_state_dict(bad)
        for index_, entries in optimizer.state_dict()["state"].items():
            assert_same(entries, good["state"][index_])


def test_gradients_released_in_backward_leave_the_votes_to_the_step():
    found = []
    for released in (False, True):
        model, optimizer = built()
        if released:
            steepest.release_gradients(model, optimizer)
        train(model, optimizer, 4)
        assert int(optimizer.flip.taken) == 4
        found.append(snapshot(model))
    assert_same(*found)


@pytest.mark.parametrize("bad", ["parameters", "votes", "both", "neither"])
def test_with_released_gradients_a_bad_step_is_counted_once(bad):
    model, optimizer = built(nonfinite="skip")
    steepest.release_gradients(model, optimizer)
    if bad in ("votes", "both"):
        # In the gradient of T alone: those of parameters do not see these votes.
        scale = model[0].scale.requires_grad_(False)
        model[0](torch.full((1, 6), float("inf"))).nan_to_num(0, 0, 0).sum().backward(inputs=[model[0].bias])
        x = torch.full((1, 6), float("inf"), requires_grad=True)
        torch.autograd.grad(model[0](x).nan_to_num(0, 0, 0).sum(), x)
        scale.requires_grad_(True)
    factor = float("nan") if bad in ("parameters", "both") else 1.0
    (model[4](torch.ones(3, 7)).sum() * factor).backward()
    optimizer.step()
    assert optimizer.skipped_steps == (bad != "neither")
    optimizer.zero_grad()
    train(model, optimizer, 1)
    assert optimizer.skipped_steps == (bad != "neither")


def test_nonfinite_of_a_group_changed_later_is_the_votes_too():
    model, optimizer = built()
    assert optimizer.flip.options["nonfinite"] == "ignore"
    train(model, optimizer, 1)
    before = model[0].packed.clone()
    for way, times in (("skip", 1), ("raise", 1)):
        optimizer.param_groups[0]["nonfinite"] = way
        model[0](torch.full((1, 6), float("inf"))).nan_to_num(0, 0, 0).sum().backward()
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        if way == "raise":
            with pytest.raises(FloatingPointError, match="ternary layer '0'"):
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
    assert optimizer.flip.options["nonfinite"] == "ignore"
    twin, again = copy.deepcopy((model, optimizer))
    again.load_state_dict(optimizer.state_dict())
    train(twin, again, 1, first=2)
    assert again.flip.options["nonfinite"] == "ignore"


def test_incomplete_state_dicts_are_refused_by_name_and_nothing_is_loaded():
    model, optimizer = built()
    train(model, optimizer, 3)
    good = optimizer.state_dict()
    index = next(i for i, s in good["state"].items() if "votes" in s)
    group = good["param_groups"][0]
    options = group["ternary_flip"]

    def state(**changes):
        return {**good, "state": {**good["state"], index: {**good["state"][index], **changes}}}

    def with_options(value):
        return {**good, "param_groups": [{**group, "ternary_flip": value}, *good["param_groups"][1:]]}

    weights, before = snapshot(model), copy.deepcopy(good)
    for bad, says in (
        ({"state": good["state"]}, "no 'param_groups'"),
        ({"param_groups": good["param_groups"]}, "no 'state'"),
        (state(votes="lost"), "layer '0' in the state dict is a str, not a tensor"),
        (state(flip_step=-1), "step must be an integer ≥ 0, got -1"),
        (with_options(None), "are a NoneType"),
        (with_options({k: v for k, v in options.items() if k != "power"}), "have no 'power'"),
        (with_options({**options, "thresold": 3}), "no option 'thresold'.*threshold"),
    ):
        with pytest.raises(ValueError, match=says):
            optimizer.load_state_dict(bad)
        assert_same(snapshot(model), weights)
        for at, entries in optimizer.state_dict()["state"].items():
            assert_same(entries, before["state"][at])
        assert optimizer.flip.options == options


def test_options_changed_later_are_not_those_of_a_state_dict_made_before():
    _, optimizer = built("sgd")
    saved = optimizer.state_dict()
    before = optimizer.flip.options["threshold"]
    optimizer.flip.options["threshold"] = before + 1
    assert saved["param_groups"][0]["ternary_flip"]["threshold"] == before
    optimizer.load_state_dict(saved)
    assert optimizer.flip.options["threshold"] == before


def test_an_optimizer_whose_layers_have_gone_loads_nothing():
    model, optimizer = built()
    train(model, optimizer, 1)
    saved = optimizer.state_dict()
    later = TernaryFlip(model)
    with pytest.raises(RuntimeError, match="layer '0' belongs to another TernaryFlip"):
        optimizer.load_state_dict(saved)
    loss_of(model, 0).backward()
    assert later.has_votes


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
    assert type(steepest.build(plain, "lion", ternary=False)) is steepest.Optimizer
    with pytest.raises(ValueError, match="ternary=True, but Sequential has no ternary layers"):
        steepest.build(plain, "lion", ternary=True)
    assert steepest.build(small_model(), "lion", ternary=True).flip.options["votes"] == "sign"
    model = small_model()
    rest = [p for p in model.parameters() if p is not model[3].scale]
    with pytest.raises(ValueError, match="scales of ternary layer '3'"):
        TernaryOptimizer(rest, flip=TernaryFlip(model), rule="lion")


def test_distributed_checkpoints_hold_the_votes():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model, optimizer = built()
    train(model, optimizer, 3)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    assert saved["state"]["0.scale"]["votes"].dtype == torch.int8
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
    assert int(resumed.flip.taken) == 0
    assert not any(a.any() for a in resumed.flip.accumulators.values())
    dcp.load({"model": found[0], "optimizer": found[1]}, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(other, resumed, model_state_dict=found[0], optim_state_dict=found[1])
    assert int(resumed.flip.taken) == 3
    train(other, resumed, 3, first=3)
    assert_same(snapshot(other), snapshot(model))
    assert_same(resumed.flip.accumulators, optimizer.flip.accumulators)


def test_a_fresh_optimizers_state_dict_has_the_votes_and_its_state_is_empty():
    _model, optimizer = built()
    saved = optimizer.state_dict()
    assert not optimizer.state
    assert sum("votes" in state for state in saved["state"].values()) == 2
    other, resumed = built()
    train(other, resumed, 2)
    resumed.load_state_dict(saved)
    assert int(resumed.flip.taken) == 0
    assert not any(a.any() for a in resumed.flip.accumulators.values())


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


def test_votes_that_follow_their_layer_stay_in_the_state(monkeypatch):
    # No second device here: the meta device stands for it, which cannot compute flips.
    from steepest.ternary import trainer

    model, optimizer = built("sgd")
    train(model, optimizer, 2)
    monkeypatch.setattr(trainer, "flip_layer", lambda *_, **__: torch.zeros((), dtype=torch.int64))
    loss_of(model, 2).backward()
    model[0].packed = model[0].packed.to("meta")
    optimizer.step()
    votes = optimizer.state[model[0].scale]["votes"]
    assert votes.device.type == "meta"
    assert votes is optimizer.flip.accumulators["0"]
    assert optimizer.state_dict()["state"][0]["votes"] is votes


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
    assert (optimizer.flip.options["seed"], optimizer.flip.options["nonfinite"]) == (7, "skip")


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
    assert optimizer.flip.stats().flips == 0


def test_replaced_parameters_are_refused_by_name():
    model, optimizer = built()
    train(model, optimizer, 2)
    saved = optimizer.state_dict()
    model.load_state_dict({name: each.clone() for name, each in model.state_dict().items()}, assign=True)
    before, counts = snapshot(model), copy.deepcopy(optimizer.flip.accumulators)
    loss_of(model, 2).backward()
    for act in (optimizer.step, optimizer.state_dict, lambda: optimizer.load_state_dict(saved)):
        with pytest.raises(RuntimeError, match=r"layer '0' are another tensor .*assign=True"):
            act()
    assert_same(snapshot(model), before)
    assert_same(optimizer.flip.accumulators, counts)
    # Made anew, it goes on from the checkpoint.
    again = steepest.build(model, "lion", ternary=OPTIONS)
    again.load_state_dict(saved)
    train(model, again, 1, first=2)
    assert again.flip.stats().step == 3
