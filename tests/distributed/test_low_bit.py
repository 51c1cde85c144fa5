"""One-byte averages and master weights on DTensors equal one process bit for bit, in checkpoints too."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DeviceMesh, DTensor, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.nn import Parameter

import steepest
from steepest import master_state_dict
from steepest.engine.storage import _shards_keep
from steepest.formats.blocks import block_size
from steepest.rule import find_rule

from .ranks import LAYOUTS, WORLD, alone_as, placed, run_on_ranks

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# Uneven rows; few rows; three dimensions; blocks of 32; one that is not coded.
SHAPES = [(131, 64), (6, 1024), (70, 3, 64), (64, 96), (9,)]
# Where a layout's columns cut a block: 64, 96 and 192 columns over 2 or 4.
CUT = {
    "columns": [(131, 64), (64, 96)],
    "FSDP x TP, columns": [(131, 64), (64, 96)],
    "TP beside replicas": [(131, 64), (64, 96)],
}
LOW: dict[str, Any] = {"state_dtype": "int8", "lr": 0.05, "weight_decay": 0.1, "seed": 3}
SPLIT8 = {"master": "split8", "rounding": "stochastic"}
CASES: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "lion": ("lion", F32, {}),
    "adamw": ("adamw", BF16, SPLIT8),
    "sgd_sai": ("sgd_sai", F16, {"master": "split16"}),
    "muon": ("muon", BF16, {**SPLIT8, "method": "svd"}),
    # It moves whole masters back onto a sphere.
    "hyperball": ("hyperball", BF16, {**SPLIT8, "method": "svd", "weight_decay": 0.0}),
    "ademamix": ("ademamix", F32, {}),
    "normuon": ("normuon", BF16, {**SPLIT8, "method": "svd"}),
    "hyperball, exact": (
        "hyperball",
        BF16,
        {"master": "split16", "method": "svd", "weight_decay": 0.0, "nonfinite": "skip"},
    ),
}


IN_EVERY_LAYOUT = ["lion", "adamw", "hyperball"]


def wholes(step: int, case: str) -> list[Tensor]:
    """The parameters (step -1) or their gradients."""
    name, dtype, _ = CASES[case]
    generator = torch.Generator().manual_seed(step + 1)
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    return values[:-1] if find_rule(name).transforms else values


def make(case: str, params: list[Any], **options: Any) -> steepest.Optimizer:
    name, _, own = CASES[case]
    named = [(f"params.{at}", param) for at, param in enumerate(params)]
    return steepest.create(name, named, **{**LOW, **own, **options})


def train(optimizer: Any, case: str, which: range, place: Any = lambda grad: grad) -> None:
    params = optimizer.param_groups[0]["params"]
    for step in which:
        for param, grad in zip(params, wholes(step, case), strict=True):
            param.grad = place(grad)
        optimizer.step()


def in_one_process(case: str, steps: int = 3, **options: Any) -> steepest.Optimizer:
    optimizer = make(case, [Parameter(whole) for whole in wholes(-1, case)], **options)
    train(optimizer, case, range(steps))
    return optimizer


def on_mesh(case: str, layout: str, steps: int = 3, **options: Any) -> tuple[steepest.Optimizer, Any]:
    mesh_shape, placements = LAYOUTS[layout]
    mesh = init_device_mesh("cpu", mesh_shape)

    def place(whole: Tensor) -> Any:
        return placed(whole, mesh, placements)

    optimizer = make(case, [Parameter(place(whole)) for whole in wholes(-1, case)], **options)
    train(optimizer, case, range(steps), place)
    return optimizer, place


def assert_parts(optimizer: Any, expected: Any, at: int) -> None:
    """The parameter at this place, its state and its master are this rank's parts of the whole ones."""
    param, whole = (each.param_groups[0]["params"][at] for each in (optimizer, expected))
    own, theirs = optimizer.state[param], expected.state[whole]
    assert own.keys() == theirs.keys()
    pairs = {name: (own[name], theirs[name]) for name in own}
    pairs["param"] = (param.detach(), whole.detach())
    pairs["master"] = (optimizer.master_weight(param), expected.master_weight(whole))
    for name, (here, there) in pairs.items():
        assert here.shape == there.shape, name
        assert here.dtype == there.dtype, name
        if isinstance(here, DTensor):
            assert (here.device_mesh, here.placements) == (param.device_mesh, param.placements), name
            here, there = here.to_local(), placed(there, param.device_mesh, param.placements).to_local()
        assert torch.equal(here, there), name


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        *itertools.product(IN_EVERY_LAYOUT, LAYOUTS),
        *itertools.product(
            [case for case in CASES if case not in IN_EVERY_LAYOUT], ["FSDP", "HSDP", "columns"]
        ),
    ],
)
def test_steps_equal_one_process(case: str, layout: str):
    coded = in_one_process(case)
    floats = in_one_process(case, state_dtype=F32)

    def work(rank: int) -> None:
        optimizer, _ = on_mesh(case, layout)
        for at, param in enumerate(optimizer.param_groups[0]["params"]):
            assert_parts(optimizer, floats if tuple(param.shape) in CUT.get(layout, []) else coded, at)

    run_on_ranks(work)


def test_another_format_or_seed_would_be_seen():
    """The comparison above has teeth."""
    expected = in_one_process("adamw")

    def work(rank: int) -> None:
        for options in ({"seed": 4}, {"master": "split16"}, {"state_dtype": F32}):
            optimizer, _ = on_mesh("adamw", "FSDP", **options)
            with pytest.raises(AssertionError):
                assert_parts(optimizer, expected, 0)

    run_on_ranks(work)


@pytest.mark.parametrize(("shape", "world"), [((6, 1024), 2), ((1601, 64), 4), ((6, 1024), 8)])
def test_what_is_coded_does_not_depend_on_the_world_size(shape: tuple[int, ...], world: int):
    """A shard of 3 × 1024, or of no row at all, has fewer elements than are coded by themselves."""

    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (world,))
        param = Parameter(placed(torch.zeros(shape), mesh, [Shard(0)]))
        param.grad = placed(torch.ones(shape), mesh, [Shard(0)])
        optimizer = steepest.AdamW([param], state_dtype="int8")
        optimizer.step()
        state = optimizer.state[param]
        assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype) == (torch.int8, torch.uint8)
        assert state["exp_avg_scale"].shape == (shape[0], shape[1] // 64)
        rows = len(param.to_local())
        assert state["exp_avg_scale"].to_local().shape == (rows, shape[1] // 64)
        assert optimizer.state_bytes() == rows * shape[1] * 2 + rows * shape[1] // 64 * 8 + 8

    run_on_ranks(work, world)


@pytest.mark.parametrize(
    ("shape", "mesh", "placements", "kept"),
    [
        ((64, 1024), (2,), (Shard(1),), True),
        ((64, 1024), (3,), (Shard(1),), False),  # 342 columns
        ((64, 64), (2,), (Shard(1),), False),
        ((64, 3, 64), (2,), (Shard(1),), True),
        # Two thirds of the parameter's blocks, half of the scales'.
        ((64, 3, 128), (2,), (Shard(1),), False),
        ((64, 4, 64), (2,), (Shard(2),), False),
        ((64, 4, 64), (1,), (Shard(2),), False),
        ((1601, 64), (4,), (Shard(0),), True),
        ((64, 1024), (2, 2), (Shard(0), Shard(1)), True),
        ((64, 1024), (2, 2), (Shard(1), Shard(1)), True),
        ((64, 128), (2, 2), (Shard(1), Shard(1)), False),
        # More processes than blocks.
        ((64, 64 * 127), (128,), (Shard(1),), True),
    ],
)
def test_which_layouts_keep_blocks_whole(shape: Any, mesh: Any, placements: Any, kept: bool):
    block = block_size(shape)
    assert block == 64
    assert _shards_keep(block, shape, mesh, placements) is kept


def test_explain_says_what_the_layout_cuts():
    with alone_as(0, 2):
        mesh = init_device_mesh("cpu", (2,))
        params = [Parameter(placed(torch.zeros(64, 64), mesh, [Shard(dim)])) for dim in (0, 1)]
        optimizer = steepest.Lion([("rows", params[0]), ("columns", params[1])], state_dtype="int8")
        assert [row.state for row in optimizer.explain().rows] == ["int8/64", "float32 (shards cut blocks)"]


@pytest.mark.parametrize("case", CASES)
def test_resuming_equals_never_stopping(case: str):
    expected = in_one_process(case)

    def work(rank: int) -> None:
        optimizer, place = on_mesh(case, "HSDP", steps=2)
        saved = optimizer.state_dict()
        params = [Parameter(param.detach().clone()) for param in optimizer.param_groups[0]["params"]]
        again = make(case, params)
        again.load_state_dict(saved)
        own = optimizer.state[optimizer.param_groups[0]["params"][0]]
        for name, entry in own.items():
            if isinstance(entry, DTensor):
                assert entry.to_local().data_ptr() != again.state[params[0]][name].to_local().data_ptr()
        train(again, case, range(2, 3), place)
        for at in range(len(params)):
            assert_parts(again, expected, at)

    run_on_ranks(work)


@pytest.mark.parametrize("case", ["adamw", "muon"])
def test_whole_tensors_are_cut_where_they_are_loaded(case: str):
    half, expected = in_one_process(case, 2), in_one_process(case)
    saved = copy.deepcopy(half.state_dict())
    values = [param.detach().clone() for param in half.param_groups[0]["params"]]

    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (WORLD,))

        def place(whole: Tensor) -> Any:
            return placed(whole, mesh, [Shard(0)])

        optimizer = make(case, [Parameter(place(value.clone())) for value in values])
        optimizer.load_state_dict(saved)
        train(optimizer, case, range(2, 3), place)
        for at in range(len(values)):
            assert_parts(optimizer, expected, at)

    run_on_ranks(work)


CHANGES: list[dict[str, Any]] = [
    {"state_dtype": F32},
    {"state_dtype": F32, "master": None},
    {"master": "split16", "rounding": "nearest"},
]


@pytest.mark.parametrize("to", CHANGES, ids=str)
@pytest.mark.parametrize("back", [False, True], ids=["from int8", "to int8"])
@pytest.mark.filterwarnings("ignore:the state dict has corrections")
def test_formats_change_on_loading_as_in_one_process(to: dict[str, Any], back: bool):
    """Shards of the same layout, and whole tensors that are cut where a block is cut, too."""
    first, second = ({}, to) if not back else (to, {})
    saver = in_one_process("adamw", 2, **first)
    saved = copy.deepcopy(saver.state_dict())
    values = [param.detach().clone() for param in saver.param_groups[0]["params"]]
    whole = make("adamw", [Parameter(value.clone()) for value in values], **second)
    whole.load_state_dict(saved)

    def work(rank: int) -> None:
        sharded, place = on_mesh("adamw", "FSDP", steps=2, **first)
        other = make("adamw", [Parameter(place(value.clone())) for value in values], **second)
        other.load_state_dict(sharded.state_dict())
        cut = make("adamw", [Parameter(place(value.clone())) for value in values], **second)
        cut.load_state_dict(saved)
        for at in range(len(values)):
            assert_parts(other, whole, at)
            assert_parts(cut, whole, at)

    run_on_ranks(work)


def test_whole_codes_load_where_shards_cut_their_blocks():
    saver = in_one_process("lion", 2)
    saved = copy.deepcopy(saver.state_dict())
    values = [param.detach().clone() for param in saver.param_groups[0]["params"]]
    floats = make("lion", [Parameter(value.clone()) for value in values], state_dtype=F32)
    floats.load_state_dict(saved)

    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (WORLD,))
        param = Parameter(placed(values[0].clone(), mesh, [Shard(1)]))
        optimizer = steepest.Lion([("params.0", param)], **LOW)
        own = {**saved, "state": {0: saved["state"][0]}, "param_groups": [{**saved["param_groups"][0]}]}
        own["param_groups"][0] |= {"params": [0], "param_names": ["params.0"]}
        optimizer.load_state_dict(own)
        assert_parts(optimizer, floats, 0)

    run_on_ranks(work)


# -- checkpoints


class Net(torch.nn.Module):
    def __init__(self, params: list[Any]) -> None:
        super().__init__()
        self.params = torch.nn.ParameterList(params)


def checkpointed(case: str, **options: Any) -> tuple[Net, steepest.Optimizer, Any]:
    """A sharded model, its optimizer, and what cuts gradients likewise."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))

    def place(whole: Tensor) -> Any:
        return placed(whole, mesh, [Shard(0)])

    net = Net([Parameter(place(whole)) for whole in wholes(-1, case)])
    return net, make(case, list(net.params), **options), place


def results(optimizer: Any) -> list[Tensor]:
    params = optimizer.param_groups[0]["params"]
    whole = [optimizer.master_weight(param).full_tensor() for param in params]
    for param in params:
        for name, entry in sorted(optimizer.state[param].items()):
            if entry.dtype == torch.int16:  # which gloo cannot gather
                continue
            whole += [entry.full_tensor() if name != "step" and isinstance(entry, DTensor) else entry]
    return whole


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("case", ["adamw", "sgd_sai", "muon", "hyperball, exact"])
def test_checkpoints_resume_on_other_numbers_of_processes(case: str, flat: bool, tmp_path: Path):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)

    def save(rank: int) -> list[Tensor]:
        net, optimizer, place = checkpointed(case)
        train(optimizer, case, range(2), place)
        saved = {
            "net": net.state_dict(),
            "optimizer": get_optimizer_state_dict(net, optimizer, options=options),
        }
        dcp.save(saved, checkpoint_id=tmp_path)
        train(optimizer, case, range(2, 4), place)
        return results(optimizer)

    def load(rank: int) -> list[Tensor]:
        net, optimizer, place = checkpointed(case)
        found = {
            "net": net.state_dict(),
            "optimizer": get_optimizer_state_dict(net, optimizer, options=options),
        }
        dcp.load(found, checkpoint_id=tmp_path)
        net.load_state_dict(found["net"])
        set_optimizer_state_dict(net, optimizer, found["optimizer"], options=options)
        train(optimizer, case, range(2, 4), place)
        return results(optimizer)

    expected = run_on_ranks(save, 2)[0]
    for world in (1, 2, 3):
        for one, other in zip(run_on_ranks(load, world)[0], expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_codes_that_a_checkpoint_puts_into_floats_are_refused(flat: bool, tmp_path: Path):
    """dcp.load casts them, and leaves the scales behind that no one asks for."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)

    def work(rank: int) -> None:
        net, optimizer, place = checkpointed("lion")
        train(optimizer, "lion", range(2), place)
        saved = get_optimizer_state_dict(net, optimizer, options=options)
        dcp.save({"optimizer": saved}, checkpoint_id=tmp_path)
        optimizer.zero_grad()  # or torch would make no state to load into
        floats = make("lion", list(net.params), state_dtype=F32)
        found = {"optimizer": get_optimizer_state_dict(net, floats, options=options)}
        dcp.load(found, checkpoint_id=tmp_path)
        with pytest.raises(
            ValueError, match=r"'exp_avg' of parameter 'params.0' holds one-byte codes without"
        ):
            set_optimizer_state_dict(net, floats, found["optimizer"], options=options)
        # The way that the message names.
        coded = make("lion", list(net.params))
        found = {"optimizer": get_optimizer_state_dict(net, coded, options=options)}
        dcp.load(found, checkpoint_id=tmp_path)
        set_optimizer_state_dict(net, coded, found["optimizer"], options=options)
        floats = make("lion", list(net.params), state_dtype=F32)
        floats.load_state_dict(coded.state_dict())
        entry = floats.state[net.params[0]]["exp_avg"].full_tensor()
        assert entry.dtype == F32
        assert 0 < entry.abs().max() < 1

    run_on_ranks(work, 2)


# -- masters


def test_master_weights_are_written_and_read_as_shards():
    values = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))

    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (WORLD,))
        net = Net([Parameter(placed(torch.zeros(5, 4, dtype=BF16), mesh, [Shard(0)]))])
        param = net.params[0]
        optimizer = steepest.Lion(net.named_parameters(), master="split16")
        for value in (values, placed(values + 1, mesh, [Shard(0)])):
            optimizer.set_master_weight(param, value)
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            assert torch.equal(optimizer.master_weight(param).full_tensor(), whole)
            assert torch.equal(master_state_dict(net, optimizer)["params.0"].full_tensor(), whole)
            assert torch.equal(param.detach().full_tensor(), whole.to(BF16))
        before = optimizer.master_weight(param).full_tensor()
        param.grad = placed(torch.zeros(5, 4, dtype=BF16), mesh, [Shard(0)])
        optimizer.step()
        assert torch.equal(optimizer.master_weight(param).full_tensor(), before)

    run_on_ranks(work)


def test_a_master_of_another_layout_is_refused():
    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (2, 2))
        value = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
        param = Parameter(placed(torch.zeros(64, 64, dtype=BF16), mesh, [Shard(0), Shard(1)]))
        plain = Parameter(torch.zeros(64, 64, dtype=BF16))
        optimizer = steepest.Lion([param, plain], master="split16")
        for placements in ([Shard(1), Shard(0)], [Replicate(), Replicate()]):
            for own in (param, plain):
                with pytest.raises(ValueError, match="must have its parameter's placements"):
                    optimizer.set_master_weight(own, placed(value, mesh, placements))
        assert not optimizer.state
        assert not plain.any()

    run_on_ranks(work)


def test_a_master_before_a_resume_costs_no_state():
    """All processes make the state of all parameters, matrices of other owners too."""
    expected = in_one_process("hyperball")

    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (WORLD,))

        def place(whole: Tensor) -> Any:
            return placed(whole, mesh, [Shard(0)])

        optimizer = make("hyperball", [Parameter(place(whole)) for whole in wholes(-1, "hyperball")])
        first = optimizer.param_groups[0]["params"][0]
        optimizer.set_master_weight(first, first.detach().float())
        train(optimizer, "hyperball", range(3), place)
        for at in range(len(SHAPES) - 1):
            assert_parts(optimizer, expected, at)

    run_on_ranks(work)


def test_codes_in_floats_are_refused_by_all_processes_or_none():
    """Where a process has only zeros, too."""

    def work(rank: int) -> str:
        mesh = init_device_mesh("cpu", (WORLD,))
        whole = torch.zeros(128, 64)
        param = Parameter(placed(whole, mesh, [Shard(0)]))
        optimizer = steepest.Lion([("w", param)], state_dtype=F32)
        codes = whole.clone()
        codes[3] = 7
        group = {**optimizer.state_dict()["param_groups"][0], "state_dtype": "int8"}
        saved = {"state": {0: {"exp_avg": placed(codes, mesh, [Shard(0)])}}, "param_groups": [group]}
        try:
            optimizer.load_state_dict(saved)
        except ValueError as error:
            return str(error)
        return "loaded"

    assert all("one-byte codes without their scales" in each for each in run_on_ranks(work))


def test_codes_and_scales_come_in_one_kind_of_tensor():
    def work(rank: int) -> None:
        optimizer, _ = on_mesh("lion", "FSDP", steps=1)
        saved = copy.deepcopy(optimizer.state_dict())
        saved["param_groups"][0]["lr"] = 0.7
        saved["state"][0]["exp_avg_scale"] = torch.ones(saved["state"][0]["exp_avg_scale"].shape)
        before = optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"].to_local().clone()
        with pytest.raises(ValueError, match="must both be DTensors"):
            optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["lr"] == 0.05
        after = optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"].to_local()
        assert torch.equal(before, after)

    run_on_ranks(work)


def test_a_layout_that_cuts_codes_is_refused_after_a_step():
    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (2,))
        param = Parameter(torch.zeros(64, 64))
        optimizer = steepest.Lion([("w", param)], state_dtype="int8")
        param.grad = torch.ones(64, 64)
        optimizer.step()
        before = param.detach().clone()
        # As those do who replace parameters and keep their state.
        shard = Parameter(placed(before.clone(), mesh, [Shard(1)]))
        optimizer.param_groups[0]["params"][0] = shard
        optimizer.state[shard] = optimizer.state.pop(param)
        shard.grad = placed(torch.ones(64, 64), mesh, [Shard(1)])
        with pytest.raises(ValueError, match=r"'w'.*its view or layout, changed after a step, cuts"):
            optimizer.step()
        assert torch.equal(shard.detach().to_local(), placed(before, mesh, [Shard(1)]).to_local())

    run_on_ranks(work, 2)


def test_shards_that_are_kept_on_the_host_have_their_scales_there():
    """As FSDP2's CPUOffloadPolicy makes them: the mesh is an accelerator's."""
    whole = torch.randn(70, 64, generator=torch.Generator().manual_seed(0))
    expected = Parameter(whole.clone())
    expected.grad = whole.clone()
    alone = steepest.Lion([("w", expected)], state_dtype="int8")
    alone.step()
    with alone_as(1, 2):
        mesh = DeviceMesh("cuda", [0, 1])
        spec = DTensorSpec(mesh, (Shard(0),), tensor_meta=TensorMeta(whole.shape, whole.stride(), F32))
        param = Parameter(DTensor(whole[35:].clone(), spec, requires_grad=False))
        param.grad = DTensor(whole[35:].clone(), spec, requires_grad=False)
        optimizer = steepest.Lion([("w", param)], state_dtype="int8")
        optimizer.step()
        again = steepest.Lion([("w", param)], state_dtype="int8")
        again.load_state_dict(optimizer.state_dict())
        for each in (optimizer, again):
            for name, entry in each.state[param].items():
                assert entry.shape == alone.state[expected][name].shape
                assert entry.placements == (Shard(0),)
                assert entry.to_local().is_contiguous()
                assert torch.equal(entry.to_local(), alone.state[expected][name][35:])


@pytest.mark.parametrize("case", ["muon", "hyperball"])
def test_owners_of_plain_parameters(case: str):
    """Replicas that share the work on whole matrices."""
    expected = in_one_process(case)

    def work(rank: int) -> None:
        optimizer = make(case, [Parameter(whole) for whole in wholes(-1, case)], distributed="owners")
        train(optimizer, case, range(3))
        for at in range(len(wholes(-1, case))):
            assert_parts(optimizer, expected, at)

    run_on_ranks(work)


def test_views_of_rows_on_shards():
    """Fused projections: blocks of rows, which the processes cut otherwise."""
    whole = [torch.randn(96, 64, generator=torch.Generator().manual_seed(seed)).to(BF16) for seed in range(3)]
    options = {**LOW, **SPLIT8, "method": "svd", "views": {"w": ("rows", (32, 48, 16))}}
    expected = Parameter(whole[0].clone())
    alone = steepest.Muon([("w", expected)], **options)

    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (WORLD,))
        param = Parameter(placed(whole[0].clone(), mesh, [Shard(0)]))
        optimizer = steepest.Muon([("w", param)], **options)
        for grad in whole[1:]:
            param.grad = placed(grad, mesh, [Shard(0)])
            optimizer.step()
        assert_parts(optimizer, alone, 0)

    for grad in whole[1:]:
        expected.grad = grad.clone()
        alone.step()
    assert alone.state[expected]["momentum_buffer"].dtype == torch.int8
    run_on_ranks(work)


def test_replicas_on_a_mesh_are_as_plain_ones():
    with alone_as(0, 2):
        mesh = init_device_mesh("cpu", (2,))
        param = Parameter(placed(torch.zeros(64, 3, 64), mesh, [Replicate()]))
        param.grad = placed(torch.ones(64, 3, 64), mesh, [Replicate()])
        optimizer = steepest.Lion([param], state_dtype="int8")
        optimizer.step()
        assert optimizer.state[param]["exp_avg_scale"].shape == (64, 3)
