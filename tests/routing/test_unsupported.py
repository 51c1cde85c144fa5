"""Models that cannot be routed (sharded, flattened, uninitialized), and tensors that cannot train."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial

import steepest

from .zoo import GPT, MLP


@pytest.fixture
def _group(tmp_path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_group")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("rule", ["muon", "lion"])
@pytest.mark.parametrize(("original", "reason"), [(False, "is a FlatParameter"), (True, "sharded by FSDP1")])
def test_fsdp1(rule: str, original: bool, reason: str):
    model = FullyShardedDataParallel(MLP(), use_orig_params=original, device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match=f"parameter '.*' .*{reason}"):
        steepest.build(model, rule)


@pytest.mark.usefixtures("_group")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("original", [False, True])
def test_fsdp1_with_ternary_layers(original: bool):
    model = MLP()
    steepest.ternary.ternarize(model)
    wrapped = FullyShardedDataParallel(model, use_orig_params=original, device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"is a FlatParameter|sharded by FSDP1"):
        steepest.build(wrapped, "lion")


@pytest.mark.usefixtures("_group")
def test_dtensor():
    model = MLP()
    mesh = init_device_mesh("cpu", (1,))
    weight = DTensor.from_local(model[2].weight.detach(), mesh, [Partial()], run_check=False)
    model[2].weight = nn.Parameter(weight)
    with pytest.raises(ValueError, match=r"parameter '2.weight' is a DTensor that has the placement .*sum"):
        steepest.build(model, "muon")


@pytest.mark.parametrize("mark", ["ds_id", "ds_tensor"])
def test_deepspeed(mark: str):
    model = GPT()
    setattr(model.blocks[0].up.weight, mark, 0)
    with pytest.raises(ValueError, match=r"'blocks.0.up.weight' is partitioned by DeepSpeed ZeRO"):
        steepest.build(model, "muon")


@pytest.mark.parametrize("rule", ["muon", "sgd_sai", "adamw"])
@pytest.mark.parametrize(
    ("ranks", "cut"),
    [((None,), False), ((1,), False), ((2,), True), ((1, None), False), ((1, 1), False), ((1, 2), True)],
)
def test_megatrons_tensor_parallelism(
    rule: str, ranks: tuple[int | None, ...], cut: bool, monkeypatch: pytest.MonkeyPatch
):
    """Megatron marks the tensors of its parallel layers, whole ones too. Experts have their own group."""
    state = SimpleNamespace()
    for kind, size in zip(("tensor_model", "expert_tensor"), ranks, strict=False):
        group = size and SimpleNamespace(size=lambda size=size: size)
        setattr(state, f"get_{kind}_parallel_group", lambda check_initialized, group=group: group)
    monkeypatch.setitem(sys.modules, "megatron.core.parallel_state", state)
    model = MLP()
    model[2].weight.tensor_model_parallel = True
    if cut and rule != "adamw":
        with pytest.raises(ValueError, match=r"'2.weight' is a shard of Megatron's tensor parallelism"):
            steepest.build(model, rule)
    else:
        assert "2.weight" in {row.name for row in steepest.build(model, rule).explain().rows}


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_lazy():
    with pytest.raises(ValueError, match=r"'0.weight' has no shape yet: run the model once"):
        steepest.build(nn.Sequential(nn.LazyLinear(4)), "muon")


def test_meta():
    with torch.device("meta"):
        model = MLP()
    with pytest.raises(ValueError, match=r"'0.weight' is on the meta device: materialize"):
        steepest.build(model, "muon")


def test_a_dtype_without_arithmetic():
    model = MLP()
    model[2].weight = nn.Parameter(model[2].weight.detach().to(torch.float8_e4m3fn))
    with pytest.raises(ValueError, match=r"'2.weight' has dtype torch.float8_e4m3fn"):
        steepest.build(model, "muon")


def test_a_frozen_packed_weight_is_left_out_and_noted():
    model = MLP()
    model[2].weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.uint8), requires_grad=False)
    explanation = steepest.build(model, "muon").explain()
    assert "2.weight" not in {row.name for row in explanation.rows}
    assert any(
        "left out because they can never train: 2.weight (uint8)" in note for note in explanation.notes
    )


@pytest.mark.parametrize("rule", ["muon", "quad"])
def test_parameters_that_are_flattened_afterwards_are_refused_by_the_step(rule: str):
    """DeepSpeed's ZeRO 1 and 2 replace a group's parameters by one flat vector."""
    model = MLP()
    optimizer = steepest.build(model, rule)
    flats = []
    for group in optimizer.param_groups:
        flats.append(torch.cat([param.detach().flatten() for param in group["params"]]).requires_grad_())
        flats[-1].grad = torch.ones_like(flats[-1])
        group["params"] = [flats[-1]]
        group["param_names"] = ["flat"]
    before = [flat.detach().clone() for flat in flats]
    with pytest.raises(
        ValueError, match=rf"'flat' is a vector .* {rule!r} needs whole .* Nothing was stepped"
    ):
        optimizer.step()
    assert all(torch.equal(flat, was) for flat, was in zip(flats, before, strict=True))
    assert not optimizer.state


@pytest.mark.parametrize("name", ["Muon", "NorMuon", "Scion"])
def test_a_rule_for_hidden_matrices_names_build_for_the_vectors(name: str):
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4))
    way = rf"takes matrices. steepest.build\(model, '{name.lower()}'\) .* embeddings and output layers"
    with pytest.raises(ValueError, match=way):
        getattr(steepest, name)(model.parameters())
