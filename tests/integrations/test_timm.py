"""timm: its registry makes our optimizers, with its groups, layer decay and schedules."""

from functools import partial

import pytest
import torch
from torch import nn

import steepest
from steepest.registry import optimizer_class

from .tiny import assert_same, run_examples, state

# An OrthogonalizedOptimizer's step is a method of its class, which neither Auto nor groups can give it.
RULES = [
    rule
    for rule in steepest.list_optimizers()
    if rule != "orthogonalized" and optimizer_class(rule).__module__.startswith("steepest.")
]
ELEMENT = ["adamw", "ademamix", "lion", "sgd", "sgd_sai", "signgsd", "signum", "simba"]


@pytest.fixture(scope="module")
def registered():
    """The integration, where timm is installed."""
    pytest.importorskip("timm")
    from steepest.integrations import timm

    return timm


def vit():
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=4)


def step(model, optimizer, seed):
    draw = torch.Generator().manual_seed(seed)
    images, labels = torch.randn(4, 3, 8, 8, generator=draw), torch.randint(4, (4,), generator=draw)
    nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_every_rule_is_registered_with_what_it_takes(registered):
    from timm.optim import get_optimizer_info, list_optimizers

    names = list_optimizers("steepest-*")
    assert set(names) >= {registered.timm_name(rule) for rule in RULES}
    assert "steepest-orthogonalized" not in names
    info = get_optimizer_info("steepest-lion")
    assert (info.has_betas, info.has_momentum, info.has_eps) == (True, False, False)
    assert info.description.startswith("steepest: ")


@pytest.mark.parametrize("rule", RULES)
def test_every_registered_rule_takes_a_models_parameters(registered, rule):
    from timm.optim import create_optimizer_v2

    model = vit()
    optimizer = create_optimizer_v2(model.parameters(), registered.timm_name(rule), lr=1e-3)
    own = {id(param) for group in optimizer.param_groups for param in group["params"]}
    assert own == {id(param) for param in model.parameters()}
    step(model, optimizer, 0)


@pytest.mark.parametrize("rule", ELEMENT)
def test_it_steps_as_the_class_does_with_the_same_groups(registered, rule):
    from timm.optim import create_optimizer_v2, param_groups_weight_decay

    options = {"momentum": 0.8} if "momentum" in steepest.rule.find_rule(rule).hyper else {}
    models = vit(), vit()
    made = create_optimizer_v2(models[0], f"steepest-{rule.replace('_', '-')}", 1e-3, 0.1, **options)
    own = steepest.create(
        rule,
        param_groups_weight_decay(models[1], 0.1, no_weight_decay_list=models[1].no_weight_decay()),
        lr=1e-3,
        **options,
    )
    for seed in range(2):
        for model, optimizer in zip(models, (made, own), strict=True):
            step(model, optimizer, seed)
    assert_same(state(models[0]), state(models[1]))


def test_layer_decay_scales_the_rates_that_its_schedules_set(registered):
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler

    model = vit()
    optimizer = create_optimizer_v2(model, "steepest-lion", lr=1e-3, weight_decay=0.1, layer_decay=0.5)
    schedule = CosineLRScheduler(optimizer, t_initial=4)
    scales = [group["lr_scale"] for group in optimizer.param_groups]
    assert min(scales) < max(scales) == 1
    step(model, optimizer, 0)
    schedule.step(2)
    for group, scale in zip(optimizer.param_groups, scales, strict=True):
        assert group["lr"] == pytest.approx(5e-4 * scale)


def test_matrix_rules_ask_for_groups_that_name_the_matrices(registered):
    from timm.optim import create_optimizer_v2

    with pytest.raises(
        ValueError, match=r"'steepest-muon' takes the matrices .*model.parameters\(\).*param_group_fn="
    ):
        create_optimizer_v2(vit(), "steepest-muon", lr=1e-3)


@pytest.mark.parametrize("way", ["parameters", "groups"])
def test_it_steps_as_build_does(registered, way):
    from timm.optim import create_optimizer_v2

    models = vit(), vit()
    if way == "parameters":
        made = create_optimizer_v2(models[0].parameters(), "steepest-muon", 1e-3, 0.1, momentum=0.8)
    else:
        groups = partial(steepest.param_groups, rule="muon", lr=1e-3, weight_decay=0.1, momentum=0.8)
        made = create_optimizer_v2(models[0], "steepest-muon", lr=1e-3, param_group_fn=groups)
    own = steepest.build(models[1], "muon", lr=1e-3, weight_decay=0.1, momentum=0.8)
    for seed in range(2):
        for model, optimizer in zip(models, (made, own), strict=True):
            step(model, optimizer, seed)
    assert_same(state(models[0]), state(models[1]))


def test_a_checkpoint_of_its_saver_resumes_bit_for_bit(registered, tmp_path):
    """As in timm's train.py: CheckpointSaver writes, resume_checkpoint reads, the schedule is told where."""
    from timm.models import resume_checkpoint
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    from timm.utils import CheckpointSaver

    def prepare():
        model = vit()
        optimizer = create_optimizer_v2(model, "steepest-lion", lr=1e-3, weight_decay=0.1, layer_decay=0.5)
        return model, optimizer, CosineLRScheduler(optimizer, t_initial=4, warmup_t=1)

    model, optimizer, schedule = prepare()
    saver = CheckpointSaver(model, optimizer, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    for epoch in range(4):
        step(model, optimizer, epoch)
        if epoch == 1:
            saver.save_checkpoint(epoch)
        schedule.step(epoch + 1)
    again, resumed, rest = prepare()
    start = resume_checkpoint(again, str(tmp_path / "last.pth.tar"), resumed, log_info=False)
    rest.step(start)
    for epoch in range(start, 4):
        step(again, resumed, epoch)
        rest.step(epoch + 1)
    assert start == 2
    assert_same(state(again), state(model))
    assert_same(state(resumed), state(optimizer))


def test_examples(registered):
    assert run_examples(registered) > 0
