"""Megatron: its optimizer around ours, with its schedule, its clipping and a checkpoint, on the CPU."""

import pytest
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from processes import run_processes

from .test_docs import FIRST, blocks, sections
from .tiny import assert_same, mlp, rows, state

STEPS = 4
# The function that makes the optimizer; and a training in one process, which starts a group.
DEFINITIONS, TRAINING = blocks(sections()["Megatron"])


class OnCpu(TorchFunctionMode):
    """Megatron takes CUDA for granted: it makes tensors there, and asserts that gradients are there."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        found = function(*args, **kwargs)
        return found.replace("torch.", "torch.cuda.") if function is torch.Tensor.type else found


def run_page(*blocks_of_it):
    names = {}
    for block in (FIRST, *blocks_of_it):
        exec(compile(block, "docs/frameworks.md, Megatron", "exec"), names)
    return names


def settings():
    from megatron.core.optimizer import OptimizerConfig

    return OptimizerConfig(optimizer="adam", lr=1e-2, weight_decay=0.1, clip_grad=1.0)


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What the page's blocks define and compute, in their group of one process."""
    parallel = pytest.importorskip("megatron.core.parallel_state")
    with pytest.MonkeyPatch.context() as patch, OnCpu():
        patch.chdir(tmp_path_factory.mktemp("page"))
        yield run_page(DEFINITIONS, TRAINING)
    parallel.destroy_model_parallel()
    dist.destroy_process_group()


def prepare(names):
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    model = mlp()
    optimizer = names["megatron_optimizer"](model, settings(), "muon")
    rates = {"init_lr": 0.0, "max_lr": 1e-2, "min_lr": 1e-3, "lr_warmup_steps": 1, "lr_decay_steps": STEPS}
    decays = {"start_wd": 0.1, "end_wd": 0.1, "wd_incr_steps": STEPS, "wd_incr_style": "constant"}
    schedule = OptimizerParamScheduler(optimizer, **rates, lr_decay_style="cosine", **decays)
    return model, optimizer, schedule


def train(model, optimizer, schedule):
    x, y = rows()
    for _ in range(STEPS // 2):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        done, norm, _ = optimizer.step()
        assert done
        assert norm > 0
        schedule.step(increment=1)


def test_the_blocks_of_the_page_resume_bit_for_bit(names):
    assert {group["rule"] for group in names["whole"]["optimizer"]["param_groups"]} == {"muon", "adamw"}
    assert_same(names["resumed"], names["whole"])


def test_it_resumes_with_megatrons_schedule(names, tmp_path):
    whole, resumed = prepare(names), prepare(names)
    train(*whole)
    torch.save([each.state_dict() for each in whole], tmp_path / "half.pt")
    train(*whole)
    for each, saved in zip(resumed, torch.load(tmp_path / "half.pt"), strict=True):
        each.load_state_dict(saved)
    train(*resumed)
    for one, other in zip(resumed, whole, strict=True):
        assert_same(state(one), state(other))
    decays = {group["name"]: group["weight_decay"] for group in whole[1].param_groups}
    assert decays == {"muon": 0.1, "adamw": 0.1, "adamw, no decay": 0.0}


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """What two processes have made of layers that tensor parallelism cuts."""
    pytest.importorskip("megatron.core")
    return run_processes("integrations.megatron_job", 2, tmp_path_factory.mktemp("megatron"))


@pytest.mark.parametrize("rule", ["sgd", "lion"])
def test_element_rules_step_shards_of_tensor_parallelism_as_whole_tensors(cut, rule):
    for done in cut:
        torch.testing.assert_close(done[rule]["whole"], done[rule]["alone"])
        assert_same(done[rule]["resumed"], done[rule]["whole"])


@pytest.mark.parametrize("rule", ["sgd_sai", "muon"])
def test_rules_that_need_whole_tensors_refuse_those_shards(cut, rule):
    for done in cut:
        assert "'up.weight' is a shard of Megatron's tensor parallelism" in done[rule]
