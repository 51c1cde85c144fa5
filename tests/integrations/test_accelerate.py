"""Accelerate: prepare, accumulate, clip, save_state and load_state."""

import pytest
import torch
from torch import nn

import steepest

from .tiny import assert_same, mlp, rows, state


def test_a_loaded_state_goes_on_as_one_that_never_stopped(tmp_path):
    accelerate = pytest.importorskip("accelerate")

    def prepare():
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = mlp()
        optimizer = steepest.build(model, "muon", lr=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=20)
        return accelerator, *accelerator.prepare(model, optimizer, schedule)

    def train(accelerator, model, optimizer, schedule):
        x, y = rows()
        for _ in range(4):
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(x), y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()

    whole = prepare()
    train(*whole)
    whole[0].save_state(tmp_path)
    train(*whole)
    again = prepare()
    again[0].load_state(tmp_path)
    train(*again)
    assert_same(state(again[1]), state(whole[1]))
    assert_same(state(again[2]), state(whole[2]))
    steps = {int(each["step"]) for each in whole[2].state_dict()["state"].values() if "step" in each}
    assert steps == {4}  # of 8 passes
