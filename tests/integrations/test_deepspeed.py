"""DeepSpeed in one process on the CPU, with the flags of the page: it steps as torch does, and resumes."""

import json
from importlib import import_module

import pytest
import torch
import torch.distributed as dist
from torch import nn

import steepest
from steepest.ternary import TernaryLinear, flip_stats

from .test_docs import FIRST, blocks, sections
from .tiny import assert_same, mlp, rows, state

STEPS = 4
(FLAGS,) = map(json.loads, blocks(sections()["DeepSpeed"], "json"))


@pytest.fixture(scope="module")
def deepspeed():
    """The package, in a group of one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")  # read at the import, which else looks for devices
        patch.setenv("LOCAL_RANK", "0")  # as its launcher sets it
        package = pytest.importorskip("deepspeed")
        # An extension for processes that share memory, which takes a minute to compile. It is optional.
        patch.setattr(import_module("deepspeed.comm.torch"), "build_shm_op", lambda: None)
        patch.setattr(nn.functional, "linear", nn.functional.linear)  # put back what ZeRO-3 replaces
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield package
        dist.destroy_process_group()


def with_ternary() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), TernaryLinear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def engine_of(deepspeed, model, optimizer, stage, offload=False):
    zero = {"stage": stage, **({"offload_optimizer": {"device": "cpu"}} if offload else {})}
    config = {**FLAGS, "train_micro_batch_size_per_gpu": 16, "zero_optimization": zero}
    given = {"model": model, "optimizer": optimizer, "config": config}
    return deepspeed.initialize(**given, dist_init_required=False)[0]


def loss_of(model, index):
    x, y = rows()
    return nn.functional.cross_entropy(model(x.roll(index, 0)[:16]), y.roll(index)[:16])


def train(engine, steps):
    for index in steps:
        engine.backward(loss_of(engine, index))
        engine.step()


def with_torch(model, optimizer):
    for index in range(STEPS):
        loss_of(model, index).backward()
        nn.utils.clip_grad_norm_(model.parameters(), FLAGS["gradient_clipping"])
        optimizer.step()
        optimizer.zero_grad()
    return model


def assert_same_engines(found, expected):
    assert_same(state(found.module), state(expected.module))
    # Not their state dicts: between steps, ZeRO 3 empties the groups, by which those are made.
    entries, wanted = (list(each.basic_optimizer.state.values()) for each in (found, expected))
    assert any(wanted)
    assert_same(entries, wanted)


RUNS = [(0, "muon", False), (0, "sgd_sai", False)]
RUNS += [(stage, "lion", False) for stage in range(4)] + [(stage, "lion", True) for stage in (1, 2, 3)]


@pytest.mark.parametrize(("stage", "rule", "offload"), RUNS)
def test_it_steps_as_torch_does_and_resumes_bit_for_bit(deepspeed, stage, rule, offload, tmp_path):
    def prepare():
        model = mlp()
        return engine_of(deepspeed, model, steepest.build(model, rule, lr=1e-2), stage, offload)

    whole, resumed = prepare(), prepare()
    train(whole, range(2))
    whole.save_checkpoint(str(tmp_path), tag="half")
    train(whole, range(2, STEPS))
    resumed.load_checkpoint(str(tmp_path), tag="half")
    train(resumed, range(2, STEPS))
    assert_same_engines(resumed, whole)
    expected = mlp()
    with_torch(expected, steepest.build(expected, rule, lr=1e-2))
    torch.testing.assert_close(state(whole.module), state(expected))


def test_the_block_of_the_page_resumes(deepspeed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds.json").write_text(json.dumps(FLAGS))
    names = {}
    for block in (FIRST, *blocks(sections()["DeepSpeed"])):
        exec(compile(block, "docs/frameworks.md, DeepSpeed", "exec"), names)
    assert names["resumed"].keys() == names["make_model"]().state_dict().keys()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_flat_vectors_are_refused_where_a_rule_needs_whole_tensors(deepspeed, stage):
    model = mlp()
    engine = engine_of(deepspeed, model, steepest.build(model, "muon", lr=1e-2), stage)
    with pytest.raises(ValueError, match=r"something has flattened the parameters \(DeepSpeed ZeRO"):
        train(engine, range(1))


def test_ternary_layers_work_at_stage_0(deepspeed, tmp_path):
    def prepare():
        model = with_ternary()
        optimizer = steepest.build(model, "lion", ternary={"threshold": 1})
        return engine_of(deepspeed, model, optimizer, 0), optimizer

    (whole, optimizer), (resumed, _) = prepare(), prepare()
    train(whole, range(2))
    whole.save_checkpoint(str(tmp_path), tag="half")
    train(whole, range(2, STEPS))
    resumed.load_checkpoint(str(tmp_path), tag="half")
    train(resumed, range(2, STEPS))
    assert_same_engines(resumed, whole)
    assert flip_stats(optimizer).total_flips > 0


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_ternary_layers_are_refused_at_the_others(deepspeed, stage):
    model = with_ternary()
    engine = engine_of(deepspeed, model, steepest.build(model, "lion"), stage)
    with pytest.raises(ValueError, match=r"'2.votes' .*'ternary_flip' (takes|needs)"):
        train(engine, range(1))
