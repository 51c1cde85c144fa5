"""TernaryFlip beside an optimizer: which passes vote, when votes are dropped, who owns a layer."""

import contextlib
import copy
import gc
import io
import pickle
import threading

import pytest
import torch
from torch import nn

from steepest.compile import available
from steepest.rules.ternary_flip import TernaryFlipRule
from steepest.ternary import BinaryLinear, TernaryFlip, TernaryLinear, chunks, planes, targets
from steepest.ternary.vote_buffer import VoteBuffer

from .models import accumulators, assert_same, has_votes, loss_of, mixed_model, small_model, snapshot, taken


def pending(trainer):
    return [vote_buffer.pending for vote_buffer in trainer.targets.buffers.values()]


def train(model, optimizer, trainer, steps, first=0):
    for index in range(first, first + steps):
        loss_of(model, index).backward()
        for each in (optimizer, trainer):
            each.step()
            each.zero_grad()


def test_votes_of_micro_batches_add_up():
    model = small_model()
    trainer = TernaryFlip(model, 3)
    apart = []
    for index in range(3):
        loss_of(model, index).backward()
        apart.append(pending(trainer))
        trainer.zero_grad()
    for index in range(3):
        loss_of(model, index).backward()
    for layer, total in enumerate(pending(trainer)):
        assert torch.equal(total, sum(each[layer] for each in apart))
        assert total.abs().max() == 3


def test_more_votes_than_a_byte_holds_are_counted():
    layer = TernaryLinear(2, 1, bias=False)
    layer.set_ternary(torch.zeros(1, 2))
    layer.scale.data.fill_(1.0)
    trainer = TernaryFlip(layer, 300, accumulator=torch.int16)
    for count in range(1, 201):
        layer(torch.tensor([[1.0, -1.0]])).sum().backward()
        assert pending(trainer)[0].tolist() == [[-count, count]]
    assert pending(trainer)[0].dtype == torch.int16
    trainer.step()
    assert accumulators(trainer)[""].tolist() == [[-200, 200]]


def test_the_pull_toward_zero_has_room_beside_the_most_votes_of_a_byte():
    layer = TernaryLinear(1, 1, bias=False)
    layer.set_ternary(torch.tensor([[-1]]))
    layer.scale.data.fill_(1.0)
    trainer = TernaryFlip(layer, 1000, accumulator=torch.int16, zero_pull=1.0)
    for _ in range(127):
        layer(torch.full((1, 1), -1.0)).sum().backward()
    trainer.step()
    assert accumulators(trainer)[""].item() == 128


def test_passes_in_several_threads_vote_one_after_the_other(monkeypatch):
    found = []
    for threads in (1, 2):
        torch.manual_seed(0)
        layer = TernaryLinear(16, 16)
        trainer = TernaryFlip(layer, votes="magnitude")
        x, cast = torch.randn(4, 16), VoteBuffer.add
        # Both threads are between the count of a pass and its votes, if nothing keeps one of them out.
        meeting = threading.Barrier(threads)

        def late(*arguments, meeting=meeting, cast=cast):
            with contextlib.suppress(threading.BrokenBarrierError):
                meeting.wait(timeout=0.2)
            cast(*arguments)

        def passes(count=2 // threads, layer=layer, x=x):
            for _ in range(count):
                layer(x).square().sum().backward()

        monkeypatch.setattr(VoteBuffer, "add", late)
        running = [threading.Thread(target=passes) for _ in range(threads)]
        for each in running:
            each.start()
        for each in running:
            each.join()
        monkeypatch.undo()
        assert trainer.targets.buffers[""].passes == 2
        found.append(trainer.targets.buffers[""].pending)
    assert torch.equal(*found)


def test_votes_exist_between_backward_and_step_alone():
    model = small_model()
    trainer = TernaryFlip(model)
    assert pending(trainer) == [None, None]
    loss_of(model, 0).backward()
    assert all(votes.dtype == torch.int8 for votes in pending(trainer))
    trainer.step()
    assert pending(trainer) == [None, None]
    loss_of(model, 0).backward()
    trainer.zero_grad()
    assert pending(trainer) == [None, None]


def test_a_layer_without_votes_is_left_alone():
    model = small_model()
    trainer = TernaryFlip(model, 1, zero_pull=1.0)
    model[3](torch.randn(4, 13)).square().sum().backward()
    before = snapshot(model)
    trainer.step()
    assert torch.equal(model[0].packed, before["0.packed"])
    assert not torch.equal(model[3].packed, before["3.packed"])
    assert next(layer.flips for layer in trainer.stats().layers) == 0
    trainer.step()
    assert taken(trainer) == 2


def test_evaluation_and_inference_do_not_vote():
    model = small_model()
    trainer = TernaryFlip(model)
    model.eval()
    loss_of(model, 0).backward()
    model.train()
    with torch.no_grad():
        loss_of(model, 0)
    assert not has_votes(trainer)


def test_without_a_trainer_ternary_weights_stay():
    model = small_model()
    before = snapshot(model)
    optimizer = torch.optim.AdamW(model.parameters())
    for index in range(3):
        loss_of(model, index).backward()
        optimizer.step()
    for name, value in snapshot(model).items():
        assert torch.equal(value, before[name]) == name.endswith(("packed", "votes", "_extra_state")), name


@pytest.mark.parametrize("make", [small_model, mixed_model])
def test_training_learns_more_than_the_float_parameters_can(make):
    def final(trained):
        model = make()
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        trainer = TernaryFlip(model, 8, schedule="annealed", total_steps=400) if trained else None
        for index in range(400):
            optimizer.zero_grad()
            loss_of(model, index, rows=32).backward()
            optimizer.step()
            if trainer is not None:
                trainer.step()
        model.eval()
        with torch.no_grad():
            return sum(loss_of(model, 5000 + index, rows=64).item() for index in range(10))

    assert final(trained=True) < 0.8 * final(trained=False)


def test_frozen_scales_and_inputs_without_gradient_keep_no_layer_from_voting():
    layer = TernaryLinear(4, 3, bias=False)
    layer.scale.requires_grad_(False)
    trainer = TernaryFlip(layer)
    layer(torch.randn(5, 4)).sum().backward()
    assert has_votes(trainer)
    assert layer.scale.grad is None


def test_a_layer_used_twice_votes_twice():
    layer = TernaryLinear(4, 4, bias=False)
    trainer = TernaryFlip(layer)
    layer(layer(torch.randn(5, 4))).sum().backward()
    assert trainer.targets.buffers[""].passes == 2


def test_the_last_trainer_owns_the_layers_and_the_first_says_so():
    model = small_model()
    first = TernaryFlip(model)
    second = TernaryFlip(model)
    loss_of(model, 0).backward()
    assert not has_votes(first)
    assert has_votes(second)
    with pytest.raises(RuntimeError, match="layer '0' belongs to another TernaryFlip"):
        first.step()


def test_a_trainer_that_is_gone_takes_no_votes():
    model = small_model()
    trainer = TernaryFlip(model)
    del trainer
    gc.collect()
    loss_of(model, 0).backward()
    assert model[4].weight.grad is not None


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_train_on_alike_and_apart(way):
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = TernaryFlip(model, 2, votes="magnitude")
    train(model, optimizer, trainer, 3)
    loss_of(model, 50).backward()
    if way == "deepcopy":
        twin, twin_trainer = copy.deepcopy((model, trainer))
    else:
        twin, twin_trainer = pickle.loads(pickle.dumps((model, trainer)))
    trainer.step()
    assert not torch.equal(model[0].packed, twin[0].packed)
    twin_trainer.step()
    assert_same(snapshot(twin), snapshot(model))
    loss_of(model, 51).backward()
    loss_of(twin, 51).backward()
    for one, other in zip(pending(trainer), pending(twin_trainer), strict=True):
        assert torch.equal(one, other)
        assert one.data_ptr() != other.data_ptr()


def test_a_copy_of_the_model_alone_votes_nowhere():
    model = small_model()
    trainer = TernaryFlip(model)
    loss_of(copy.deepcopy(model), 0).backward()
    assert not has_votes(trainer)


@pytest.mark.parametrize("votes", ["sign", "magnitude"])
@pytest.mark.parametrize("accumulator", [torch.int8, torch.int16])
@pytest.mark.parametrize("make", [small_model, mixed_model])
def test_resuming_is_never_having_stopped(make, votes, accumulator):
    options = {
        "threshold": 4, "votes": votes, "accumulator": accumulator, "schedule": "annealed",
        "total_steps": 30, "zero_pull": 0.05 if make is small_model else 0.0, "max_flip_fraction": 0.2,
        "seed": 3,
    }  # fmt: skip
    model = make()
    optimizer, trainer = torch.optim.AdamW(model.parameters(), lr=0.01), TernaryFlip(model, **options)
    train(model, optimizer, trainer, 10)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), trainer.state_dict()], file)
    train(model, optimizer, trainer, 10, first=10)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = make(seed=77)
    # Made with other options: the saved ones count.
    resumed = torch.optim.AdamW(other.parameters(), lr=0.5), TernaryFlip(other, 100, seed=9)
    for each, state in zip((other, *resumed), saved, strict=True):
        each.load_state_dict(state)
    train(other, *resumed, 10, first=10)
    assert_same(snapshot(other), snapshot(model))
    assert_same(accumulators(resumed[1]), accumulators(trainer))
    assert any(a.any() for a in accumulators(trainer).values())
    assert resumed[1].stats().threshold == trainer.stats().threshold
    # In place: what was saved is not what trains.
    for kept, a in zip(saved[2]["state"].values(), accumulators(trainer).values(), strict=True):
        assert kept["step"] == 10
        assert not torch.equal(kept["accumulator"], a)


def test_state_that_does_not_fit_is_refused_and_nothing_is_loaded():
    model = small_model()
    trainer = TernaryFlip(model, 4)
    train(model, torch.optim.SGD(model.parameters(), lr=0.0), trainer, 2)
    before = copy.deepcopy(accumulators(trainer))
    wide = small_model()
    other = TernaryFlip(wide, 4, accumulator=torch.int16)
    train(wide, torch.optim.SGD(wide.parameters(), lr=0.0), other, 2)
    good = other.state_dict()

    def with_state(index, **changes):
        return {**good, "state": {**good["state"], index: {**good["state"][index], **changes}}}

    def with_options(**changes):
        return {**good, "param_groups": [{**good["param_groups"][0], **changes}]}

    for bad, says in (
        (with_state(1, accumulator=torch.zeros(2, 2, dtype=torch.int16)), r"'3.votes' has shape \(2, 2\)"),
        (with_state(1, accumulator=[]), "'3.votes' is a list"),
        (with_options(accumulator=torch.int8), "'0.votes' has dtype torch.int16"),
        (with_options(threshold=-1.0), "threshold must be"),
        (with_options(schedule="custom"), r"schedule=\.\.\..*nothing was loaded"),
        (TernaryFlip(nn.Sequential(small_model()[0]), 4).state_dict(), "doesn't match the size"),
    ):
        with pytest.raises(ValueError, match=says):
            trainer.load_state_dict(bad)
        assert_same(accumulators(trainer), before)
        assert trainer.param_groups[0]["threshold"] == 4
    trainer.load_state_dict(good)
    assert accumulators(trainer)["0"].dtype == torch.int16


@pytest.mark.parametrize("votes", ["sign", "magnitude"])
def test_nonfinite_gradients_by_option(votes):
    def run(nonfinite):
        model = small_model()
        trainer = TernaryFlip(model, 2, votes=votes, nonfinite=nonfinite)
        for index in range(3):
            loss_of(model, index).backward()
            trainer.step()
        loss_of(model, 3).backward()
        good = [votes.clone() for votes in pending(trainer)]
        trainer.zero_grad()
        before = snapshot(model), copy.deepcopy(accumulators(trainer))
        x = torch.randn(4, 6)
        x[2, 1] = float("nan")
        loss_of(model, 3).backward()
        model[0](x).sum().backward()
        return model, trainer, before, good

    model, trainer, (weights, state), good = run("ignore")
    # The NaN's column takes no votes of that pass, by magnitude no weight of its layer does.
    first = pending(trainer)[0]
    assert torch.equal(first[:, 1], good[0][:, 1])
    assert torch.equal(first, good[0]) == (votes == "magnitude")
    trainer.step()
    assert taken(trainer) == 4

    model, trainer, (weights, state), _ = run("skip")
    trainer.step()
    assert trainer.skipped_steps == 1
    assert_same(snapshot(model), weights)
    assert_same(accumulators(trainer), state)
    assert taken(trainer) == 3
    assert not has_votes(trainer)

    model, trainer, (weights, state), _ = run("raise")
    with pytest.raises(FloatingPointError, match=r"gradient of parameter '0\.votes' has 1 infinite or NaN"):
        trainer.step()
    assert_same(snapshot(model), weights)
    assert_same(accumulators(trainer), state)
    assert taken(trainer) == 3


def test_grad_scalers_skipped_step_drops_its_votes():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = TernaryFlip(model, 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = snapshot(model)
    for index, overflows in ((0, True), (1, False)):
        scale = torch.finfo(torch.float32).max if overflows else 1.0
        (scaler.scale(loss_of(model, index)) * scale).backward()
        scaler.unscale_(optimizer)
        found = sum(scaler._found_inf_per_device(optimizer).values())
        scaler.step(optimizer)
        if not found:
            trainer.step()
        scaler.update()
        for each in (optimizer, trainer):
            each.zero_grad()
        if overflows:
            assert_same(snapshot(model), before)
            assert not has_votes(trainer)
    assert trainer.stats().flips > 0


def stepped(model, trainer):
    model(torch.randn(1, 256)).sum().backward()
    trainer.step()
    return trainer


def test_the_state_is_a_byte_a_weight():
    model = nn.Sequential(TernaryLinear(256, 256), TernaryLinear(256, 128))
    trainer = TernaryFlip(model)
    weights = trainer.stats().weights
    packed = sum(layer.packed.numel() for layer in model)
    assert packed + stepped(model, trainer).state_bytes() <= 1.26 * weights
    assert stepped(model, TernaryFlip(model, accumulator=torch.int16)).state_bytes() == 2 * weights + 16
    binary = nn.Sequential(BinaryLinear(256, 256), BinaryLinear(256, 128))
    packed = sum(layer.packed.numel() for layer in binary)
    assert packed * 8 == weights
    assert packed + stepped(binary, TernaryFlip(binary)).state_bytes() <= 1.13 * weights


def test_a_compiled_or_wrapped_model_has_the_same_layers():
    model = small_model()
    assert list(TernaryFlip(torch.compile(model)).targets.layers) == ["0", "3"]


@pytest.mark.parametrize(("share", "flips"), [(1.0, 288), (0.5, 144), (0.1, 28), (1e-3, 1), (0.0, 0)])
def test_the_largest_part_that_may_flip_is_one_weight_at_least(share, flips):
    layer = TernaryLinear(9, 32)
    layer.set_ternary(torch.zeros(32, 9))
    layer.scale.data.fill_(1.0)
    trainer = TernaryFlip(layer, 1, max_flip_fraction=share)
    layer(torch.ones(1, 9)).sum().backward()
    trainer.step()
    assert trainer.stats().flips == flips


def test_a_schedule_is_asked_once_a_step():
    asked = []

    def schedule(step):
        asked.append(step)
        return 2.0

    model = small_model()
    train(model, torch.optim.SGD(model.parameters()), TernaryFlip(model, schedule=schedule), 3)
    assert asked == [0, 1, 2]


@pytest.mark.parametrize("votes", ["sign", "magnitude"])
def test_the_pull_toward_zero_is_handed_on(votes):
    layer = TernaryLinear(4, 3)
    layer.set_ternary(torch.tensor([[1, -1, 0, 1]] * 3))
    trainer = TernaryFlip(layer, 100, votes=votes, zero_pull=1.0)
    layer(torch.zeros(1, 4)).sum().backward()
    trainer.step()
    assert torch.equal(accumulators(trainer)[""], -layer.unpack())


def test_a_bad_pass_is_remembered_when_a_good_one_follows():
    layer = TernaryLinear(4, 3)
    trainer = TernaryFlip(layer, 1, nonfinite="skip")
    before = layer.packed.clone()
    layer(torch.full((1, 4), float("nan"))).sum().backward()
    layer(torch.ones(1, 4)).sum().backward()
    trainer.step()
    assert trainer.skipped_steps == 1
    assert torch.equal(layer.packed, before)


def test_noise_differs_between_passes_steps_and_layers():
    # The same dT everywhere, nowhere a whole number of rms: what differs is the rounding.
    torch.manual_seed(0)
    model = nn.ModuleList([TernaryLinear(200, 4, bias=False) for _ in range(2)])
    trainer = TernaryFlip(model, 120, votes="magnitude", outward="cancel")
    x = torch.randn(1, 200)

    def votes(index):
        layer, vote_buffer = model[index], list(trainer.targets.buffers.values())[index]
        before = 0 if vote_buffer.pending is None else vote_buffer.pending.clone()
        layer.scale.data.fill_(1.0)
        layer(x).sum().backward()
        return vote_buffer.pending - before

    draws = [votes(0), votes(0), votes(1)]
    trainer.step()
    draws.append(votes(0))
    for at, one in enumerate(draws):
        for other in draws[:at]:
            assert not torch.equal(one, other)
            # Each is the gradient rounded up or down.
            assert (one - other).abs().max() == 1


def test_outward_votes_by_magnitude_are_dropped():
    layer = TernaryLinear(3, 1, bias=False)
    layer.set_ternary(torch.tensor([[1, -1, 0]]))
    layer.scale.data.fill_(1.0)
    trainer = TernaryFlip(layer, votes="magnitude", outward="drop")
    layer(torch.tensor([[-1.0, 1.0, -1.0]])).sum().backward()
    assert pending(trainer)[0].tolist() == [[0, 0, 1]]


def test_the_pull_toward_zero_differs_between_steps_and_layers():
    model = nn.Sequential(TernaryLinear(200, 200, bias=False), TernaryLinear(200, 200, bias=False))
    for layer in model:
        layer.set_ternary(torch.ones(200, 200))
    trainer = TernaryFlip(model, 100, zero_pull=0.5)
    pulls, before = [], [torch.zeros(200, 200, dtype=torch.int8)] * 2
    for _ in range(2):
        model(torch.zeros(1, 200)).sum().backward()
        trainer.step()
        now = [a.clone() for a in accumulators(trainer).values()]
        pulls += [one - other for one, other in zip(now, before, strict=True)]
        before = now
    # Two that are drawn apart agree in half of the places.
    for at, one in enumerate(pulls):
        for other in pulls[:at]:
            assert abs((one == other).float().mean().item() - 0.5) < 0.02


def test_noise_depends_on_a_layers_name_not_on_its_trainer():
    # Two trainers of one seed, and one for both: each layer draws what it draws there.
    def pulls(*parts):
        model = nn.ModuleDict({name: TernaryLinear(200, 50, bias=False) for name in ("a", "b")})
        for layer in model.values():
            layer.set_ternary(torch.ones(50, 200))
        found = {}
        for part in parts:
            trainer = TernaryFlip(nn.ModuleDict({name: model[name] for name in part}), 100, zero_pull=0.5)
            for name in part:
                model[name](torch.zeros(1, 200)).sum().backward()
            trainer.step()
            found |= {name: a.clone() for name, a in accumulators(trainer).items()}
        return found

    apart, together = pulls("a", "b"), pulls("ab")
    assert_same(apart, together)
    # Two that are drawn apart agree in half of the places.
    assert abs((apart["a"] == apart["b"]).float().mean().item() - 0.5) < 0.03


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"threshold": -1.0}, "threshold must be"),
        ({"votes": "size"}, "'size'"),
        ({"accumulator": torch.int16}, "accumulator was torch.int8 .* cannot become torch.int16"),
        ({"schedule": "custom"}, "needs the function"),
        ({"schedule": "annealed"}, "needs total_steps"),
    ],
)
@pytest.mark.parametrize("when", ["before backward", "before step"])
def test_invalid_option_changes_are_refused_before_anything_changes(change, says, when):
    model = small_model()
    trainer = TernaryFlip(model, 2)
    train(model, torch.optim.SGD(model.parameters()), trainer, 3)
    options = dict(trainer.param_groups[0])
    before, state = snapshot(model), copy.deepcopy(accumulators(trainer))
    if when == "before step":
        loss_of(model, 3).backward()
        trainer.param_groups[0].update(change)
    else:
        trainer.param_groups[0].update(change)

    def go_on():
        if when == "before backward":
            loss_of(model, 3).backward()
        trainer.step()

    with pytest.raises((ValueError, TypeError), match=says):
        go_on()
    assert_same(snapshot(model), before)
    assert_same(accumulators(trainer), state)
    assert taken(trainer) == 3
    # Mended, the step can be taken.
    trainer.param_groups[0].clear()
    trainer.param_groups[0].update(options)
    trainer.zero_grad()
    loss_of(model, 3).backward()
    trainer.step()
    assert taken(trainer) == 4


def test_options_changed_between_steps_are_those_of_the_next():
    found = []
    for changed in (False, True):
        model = small_model()
        trainer = TernaryFlip(model, 5 if changed else 2, votes="sign" if changed else "magnitude")
        trainer.param_groups[0].update(votes="magnitude", threshold=2.0)
        train(model, torch.optim.SGD(model.parameters(), lr=0.01), trainer, 4)
        assert trainer.stats().total_flips > 0
        found.append(snapshot(model))
    assert_same(*found)


def test_compile_may_be_changed_between_steps(monkeypatch):
    asked = []

    def eagerly(key, function, arguments, doing, trial=None):
        asked.append(function.__name__)
        return function(*arguments)

    monkeypatch.setattr(available, "compiler_available", lambda kind: True)
    for module in (chunks, planes):
        monkeypatch.setattr(module, "run_dynamic", eagerly)
    layer = TernaryLinear(64, 8)
    trainer = TernaryFlip(layer, votes="magnitude")
    found = []
    for option in (None, True, False):
        trainer.param_groups[0]["compile"] = option
        layer(torch.randn(2, 64)).square().sum().backward()
        trainer.step()
        found.append(list(asked))
        asked.clear()
    assert found == [[], ["_add", "sweep"], []]


def test_votes_and_counters_of_a_layer_that_moves_go_with_it(monkeypatch):
    # No second device here: the meta device stands for it, which cannot compute flips.
    model = small_model()
    trainer = TernaryFlip(model)
    loss_of(model, 0).backward()
    trainer.step()
    loss_of(model, 1).backward()
    moved = []

    def flip(packed, a, votes, **options):
        moved.append((packed.device.type, a.device.type, votes.device.type))
        return torch.zeros((), dtype=torch.int64)

    monkeypatch.setattr(targets, "flip_layer", flip)
    model[0].packed = model[0].packed.to("meta")
    trainer.step()
    assert moved == [("meta",) * 3, ("cpu",) * 3]
    assert accumulators(trainer)["0"].device.type == "meta"
    vote_buffer = trainer.targets.buffers["0"]
    for where in ("cpu", "meta"):
        vote_buffer.begin_pass((13, 6), torch.device(where))
    assert vote_buffer.pending.device.type == "meta"
    assert vote_buffer.passes == 2


def test_transposed_counters_are_loaded():
    found = []
    for turned in (False, True):
        model = small_model()
        trainer = TernaryFlip(model, 4, max_flip_fraction=0.1)
        loss_of(model, 1).backward()
        trainer.step()
        state = copy.deepcopy(trainer.state_dict())
        generator = torch.Generator().manual_seed(0)
        for entries in state["state"].values():
            a = entries["accumulator"].random_(-9, 10, generator=generator)
            entries["accumulator"] = a.t().contiguous().t() if turned else a
        trainer.load_state_dict(state)
        loss_of(model, 0).backward()
        trainer.step()
        found.append({**snapshot(model), **accumulators(trainer)})
    assert_same(*found)


@pytest.mark.parametrize("turned", [False, True])
def test_checkpoints_of_the_first_releases_load(turned):
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = TernaryFlip(model, 2, votes="magnitude", seed=3, max_flip_fraction=0.1)
    train(model, optimizer, trainer, 3)
    options = {*TernaryFlipRule.hyper, "nonfinite", "compile", "seed"} - {"lr", "weight_decay"}
    saved = copy.deepcopy(accumulators(trainer))
    old = {
        "step": 3,
        "options": {name: trainer.param_groups[0][name] for name in options},
        "accumulators": dict(reversed(saved.items())) if turned else saved,
    }
    twin = copy.deepcopy(model)
    resumed = TernaryFlip(twin, 100, seed=9)
    resumed.load_state_dict(old)
    train(model, optimizer, trainer, 4, first=3)
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.01), resumed, 4, first=3)
    assert_same(snapshot(twin), snapshot(model))
    assert_same(accumulators(resumed), accumulators(trainer))
    assert trainer.stats().flips > 0
    assert taken(resumed) == 7
    with pytest.raises(ValueError, match="other ternary layers: '3'; nothing was loaded"):
        resumed.load_state_dict({**old, "accumulators": {"0": saved["0"]}})
    assert taken(resumed) == 7


def test_binary_layers_are_never_zero_and_a_pull_there_is_refused():
    model = mixed_model()
    trainer = TernaryFlip(model, 1)
    train(model, torch.optim.SGD(model.parameters(), lr=0.0), trainer, 3)
    ternary, binary = trainer.stats().layers
    assert ternary.zeros > 0
    assert (binary.zeros, binary.weights) == (0, 91)
    assert binary.flips > 0
    assert trainer.stats().zeros == ternary.zeros * 78 / 169
    before = snapshot(model)
    trainer.param_groups[0]["zero_pull"] = 0.5
    loss_of(model, 3).backward()
    with pytest.raises(ValueError, match="layer '3' is binary"):
        trainer.step()
    good = TernaryFlip(small_model(), zero_pull=0.5).state_dict()
    with pytest.raises(ValueError, match=r"layer '3' is binary.*nothing was loaded"):
        trainer.load_state_dict(good)
    assert_same(snapshot(model), before)


def test_loading_does_not_take_layers_back_from_a_later_trainer():
    model = small_model()
    first = TernaryFlip(model, 4)
    saved = first.state_dict()
    second = TernaryFlip(model, 4)
    with pytest.raises(RuntimeError, match="layer '0' belongs to another TernaryFlip"):
        first.load_state_dict(saved)
    loss_of(model, 0).backward()
    assert has_votes(second)
    second.step()


def test_a_step_that_failed_can_be_tried_again(monkeypatch):
    found = []
    for fails in (False, True):
        model, asked = small_model(), []

        def schedule(step, asked=asked, fails=fails):
            asked.append(step)
            if fails and len(asked) == 1:
                raise OSError("no schedule today")
            return 2.0

        trainer = TernaryFlip(model, schedule=schedule)
        loss_of(model, 0).backward()
        if fails:
            with pytest.raises(OSError, match="today"):
                trainer.step()
        trainer.step()
        found.append({**snapshot(model), **accumulators(trainer)})
    assert_same(*found)


def failing_in(layer, function):
    def sum_of(name, group):
        if name == layer:
            raise OSError("no room")
        return function(name, group)

    return sum_of


def test_a_retried_step_does_not_repeat_layers_that_were_stepped(monkeypatch):
    found = []
    for fails in (False, True):
        model = small_model()
        trainer = TernaryFlip(model, 100)
        loss_of(model, 0).backward()
        if fails:
            with monkeypatch.context() as patch:
                patch.setattr(trainer.targets, "_sum", failing_in("3", trainer.targets._sum))
                with pytest.raises(OSError, match="no room"):
                    trainer.step()
        trainer.step()
        assert accumulators(trainer)["0"].any()
        found.append({"a": accumulators(trainer)["0"], "packed": model[0].packed})
    assert_same(*found)


@pytest.mark.parametrize(("size", "skips"), [(2.0**127, 0), (float("inf"), 1), (float("nan"), 1)])
def test_gradients_whose_sum_is_infinite_are_finite(size, skips):
    layer = TernaryLinear(4, 3, bias=False)
    layer.scale.data.fill_(1.0)
    trainer = TernaryFlip(layer, 1, nonfinite="skip")
    layer(torch.ones(1, 4)).backward(torch.full((1, 3), size))
    trainer.step()
    assert trainer.skipped_steps == skips


def test_noise_is_the_same_within_torchs_wrappers():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = small_model()
    names = TernaryFlip(model).targets.layers.keys()
    model[3] = checkpoint_wrapper(model[3])
    assert TernaryFlip(torch.compile(model)).targets.layers.keys() == names
