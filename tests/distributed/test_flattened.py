"""Rules that need whole tensors refuse parameters that FSDP1 and DeepSpeed have flattened or cut."""

from __future__ import annotations

import pytest
import torch

import steepest

from .gloo_job import inputs, small_model, step_of

WHOLE = ["sgd_sai", "simba_leaky", "muon"]
MARKS = ["ds_id", "ds_tensor", "_is_flat_param", "_fsdp_flattened"]


@pytest.mark.parametrize("rule", WHOLE)
def test_fsdp1_is_refused(rule: str, processes):
    for done in processes:
        for original in (False, True):
            assert "is flattened or partitioned" in done["fsdp1"][f"{rule} {original}"]
            assert "fully_shard" in done["fsdp1"][f"{rule} {original}"]


def test_fsdp1_that_comes_after_the_optimizer_is_refused_by_its_first_step(processes):
    for done in processes:
        # One of the processes may hold a parameter whole, or have none of it.
        assert "flattened or partitioned" in done["fsdp1"]["afterwards"]
        assert done["fsdp1"]["afterwards, state"] == 0


def test_element_rules_step_fsdp1_as_one_process_steps(processes):
    model = small_model()
    step_of(model, steepest.SignGSD(model.parameters(), lr=0.5))
    expected = torch.cat([param.detach().flatten() for param in model.parameters()])
    assert torch.isfinite(model(inputs(0))).all()
    for done in processes:
        for original in (False, True):
            assert torch.equal(done["fsdp1"][f"element {original}"], expected)


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("rule", WHOLE)
def test_marks_are_refused_at_construction_and_in_place_of_others(rule: str, mark: str):
    param, plain = (torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    setattr(param, mark, 0)
    with pytest.raises(ValueError, match=r"'w' is flattened or partitioned .*fully_shard \(FSDP2\)"):
        steepest.create(rule, [("w", param)])
    optimizer = steepest.create(rule, [("w", plain)])
    optimizer.param_groups[0]["params"][0] = param
    param.grad = torch.ones(4, 4)
    with pytest.raises(ValueError, match=r"'w' is flattened or partitioned"):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("rule", WHOLE)
def test_a_flat_vector_in_place_of_a_groups_tensors_is_refused(rule: str):
    """DeepSpeed's ZeRO 1 and 2 put one vector, without a mark, in place of a group's parameters."""
    model = torch.nn.Linear(4, 4, bias=False)
    optimizer = steepest.create(rule, model.named_parameters())
    flat = torch.ones(16, requires_grad=True)
    flat.grad = torch.ones(16)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(ValueError, match=r"is a vector of shape \(16,\).*fully_shard"):
        optimizer.step()
    assert torch.equal(flat, torch.ones(16))
    assert not optimizer.state


@pytest.mark.parametrize("mark", MARKS)
def test_element_rules_take_them(mark: str):
    param = torch.nn.Parameter(torch.ones(4))
    setattr(param, mark, 0)
    optimizer = steepest.Lion([param], lr=0.5)
    param.grad = torch.ones(4)
    optimizer.step()
    assert param[0].item() == 0.5
