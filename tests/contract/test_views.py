"""A fused parameter honours the contract as the separate matrices do that it is said to be."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import steepest
from loops import for_each
from steepest.views import (
    along,
    columns,
    cut,
    heads,
    interleaved,
    matrices,
    matrix_shapes,
    rows,
    transposed,
)

from .cases import RULES, Case, by_id, deterministic
from .training import gradient, identical, make_params, same_bits, snapshot

VIEWS: dict[str, Any] = {
    "qkv": rows(4, 2, 2),
    "up": columns(3, 5),
    "stored": transposed(),
    "c_attn": transposed(columns(4, 3)),
    "deconv": transposed(rows(2, 4)),
    "heads": interleaved(2, rows(2, 1, 3)),
    "pairs": transposed(interleaved(3, columns(1, 1))),
}
NAMES = ("qkv", "up", "plain", "stored", "c_attn", "deconv", "heads", "pairs")
SHAPES = [(8, 3), (4, 8), (4, 3), (3, 5), (4, 7), (6, 2, 3), (12, 4), (4, 6)]
VIEWED = [case for case in RULES if "views" in case.rule.hyper]

every_case = pytest.mark.parametrize("case", VIEWED, ids=by_id)


def _params(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    return make_params(dtype, shapes=SHAPES)


def _make(case: Case, params: list[Parameter], **options: Any) -> Any:
    return case.make(list(zip(NAMES, params, strict=True)), views=dict(VIEWS), **options)


def _go_on(optimizer: Any, which: range) -> list[Tensor]:
    params = optimizer.param_groups[0]["params"]
    for step in which:
        for index, param in enumerate(params):
            param.grad = gradient(param, index, step)
        optimizer.step()
    return params


def _blocks(whole: Tensor, name: str) -> list[Tensor]:
    if name not in VIEWS:
        return [whole]
    kind, sizes, *more = VIEWS[name]
    times = more[0] if more and isinstance(more[0], int) else 1
    blocks = [whole]
    if kind != "whole":
        dim = 0 if kind == "rows" else 1
        places = torch.arange(whole.shape[dim]).view(times, -1).split(sizes, dim=1)
        blocks = [whole.index_select(dim, each.flatten()) for each in places]
    return [each.swapaxes(0, 1) if "transposed" in more else each for each in blocks]


# -- views by themselves

# (shape, view, whether leading dimensions count matrices) -> the blocks, by plain indexing.
CUTS: list[tuple[tuple[int, ...], Any, bool, Any]] = [
    ((6, 4), None, False, lambda p: [p]),
    ((6, 4), None, True, lambda p: [p]),
    ((6, 4), rows(4, 2), False, lambda p: [p[:4], p[4:]]),
    ((6, 4), heads(3, 2), False, lambda p: [p[:2], p[2:4], p[4:]]),
    ((6, 4), columns(1, 3), True, lambda p: [p[:, :1], p[:, 1:]]),
    ((4, 3, 6), along(2, 2, 4), True, lambda p: [p[:, :, :2], p[:, :, 2:]]),
    ((6, 4), interleaved(1, rows(4, 2)), False, lambda p: [p[:4], p[4:]]),
    ((6, 4), interleaved(3, rows(1, 1)), False, lambda p: [p[0::2, None], p[1::2, None]]),
    ((6, 4), interleaved(2, rows(2, 1)), False, lambda p: [p.view(2, 3, 4)[:, :2], p.view(2, 3, 4)[:, 2:]]),
    ((6, 4), transposed(), False, lambda p: [p.T]),
    ((6, 4), transposed(), True, lambda p: [p.T]),
    ((6, 4), transposed(rows(4, 2)), False, lambda p: [p[:4].T, p[4:].T]),
    ((6, 4), transposed(columns(1, 3)), False, lambda p: [p[:, :1].T, p[:, 1:].T]),
    ((6, 4, 3, 2), transposed(), False, lambda p: [p.permute(1, 0, 2, 3)]),
    ((6, 4, 3, 2), transposed(), True, lambda p: [p.permute(0, 1, 3, 2)]),
    ((6, 4, 3), transposed(rows(4, 2)), False, lambda p: [p[:4].permute(1, 0, 2), p[4:].permute(1, 0, 2)]),
    ((6, 4, 3), transposed(rows(4, 2)), True, lambda p: [p[:4].permute(0, 2, 1), p[4:].permute(0, 2, 1)]),
]


@pytest.mark.parametrize(("shape", "view", "batch", "expected"), CUTS, ids=range(len(CUTS)))
def test_blocks_are_views_of_the_tensors_memory(shape: Any, view: Any, batch: bool, expected: Any):
    whole = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    blocks = cut(whole, view, batch)
    for ours, theirs in zip(blocks, expected(whole), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        assert [each for each, size in zip(ours.stride(), ours.shape, strict=True) if size > 1] == [
            each for each, size in zip(theirs.stride(), theirs.shape, strict=True) if size > 1
        ]
    with torch.no_grad():
        for each in blocks:
            each.fill_(-1)
    assert bool((whole == -1).all())


def test_transposed_is_plain_data_and_takes_a_view_once():
    assert transposed() == ("whole", (), "transposed")
    assert transposed(columns(2, 2)) == ("columns", (2, 2), "transposed")
    assert transposed(heads(2, 3)) == ("rows", (3, 3), "transposed")
    for wrong in (transposed(), ("diagonal", (2,)), 3, "rows", [], ("rows",)):
        with pytest.raises(ValueError, match="transposed\\(\\) takes rows"):
            transposed(wrong)


# (shape, view, whether leading dimensions count matrices) -> the merged blocks, by plain indexing.
INTERLEAVED: list[tuple[tuple[int, ...], Any, bool, Any]] = [
    ((12, 5), interleaved(2, rows(3, 2, 1)), False, lambda p: [
        p[[0, 1, 2, 6, 7, 8]], p[[3, 4, 9, 10]], p[[5, 11]]]),
    ((3, 8), interleaved(4, columns(1, 1)), False, lambda p: [p[:, ::2], p[:, 1::2]]),
    ((3, 8), transposed(interleaved(4, columns(1, 1))), False, lambda p: [p[:, ::2].T, p[:, 1::2].T]),
    ((3, 8), transposed(interleaved(2, columns(3, 1))), True, lambda p: [
        p[:, [0, 1, 2, 4, 5, 6]].T, p[:, [3, 7]].T]),
    ((12, 5, 2), transposed(interleaved(2, rows(4, 2))), False, lambda p: [
        p[[0, 1, 2, 3, 6, 7, 8, 9]].transpose(0, 1), p[[4, 5, 10, 11]].transpose(0, 1)]),
    ((3, 4, 6), transposed(interleaved(3, along(2, 1, 1))), True, lambda p: [
        p[:, :, ::2].mT, p[:, :, 1::2].mT]),
    ((3, 6, 4), interleaved(2, columns(2, 1)), True, lambda p: [p[:, [0, 1, 3, 4]], p[:, [2, 5]]]),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "view", "batch", "expected"), INTERLEAVED, ids=range(len(INTERLEAVED)))
def test_what_is_interleaved_makes_one_matrix(shape: Any, view: Any, batch: bool, expected: Any):
    whole = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    wanted = expected(whole)
    merged, blocks = matrices(whole, view, batch), cut(whole, view, batch)
    assert matrix_shapes(shape, view, batch) == [each.shape for each in wanted]
    for ours, block, theirs in zip(merged, blocks, wanted, strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(block.reshape(theirs.shape), theirs)
        block.fill_(-1)
    assert bool((whole == -1).all())


def test_interleaved_is_plain_data_and_refuses_what_has_no_pattern():
    assert interleaved(12, rows(2, 2)) == ("rows", (2, 2), 12)
    assert transposed(interleaved(3, along(2, 1, 1))) == ("dim 2", (1, 1), 3, "transposed")
    for wrong in (transposed(), transposed(rows(2)), interleaved(2, rows(1)), None, ("diagonal", (2,)), 3):
        with pytest.raises(ValueError, match=r"interleaved\(\) takes rows"):
            interleaved(2, wrong)
    for count in (0, 1.5, True, "2"):
        with pytest.raises(ValueError, match=r"takes a number of repetitions, an integer ≥ 1, got"):
            interleaved(count, rows(2))
    for dim in (-1, 4, True, None):
        with pytest.raises(ValueError, match=r"along\(\) takes a dimension"):
            along(dim, 2)


def test_the_averages_of_an_interleaved_parameter_may_take_a_byte():
    """The codes' blocks lie within rows, which interleaving leaves whole: as those of separate matrices."""
    view = interleaved(2, rows(32, 16, 16))
    params, twins = (make_params(torch.float32, shapes=[(128, 128)]) for _ in range(2))
    options: Any = {"lr": 0.05, "state_dtype": "int8", "method": "svd"}
    fused = steepest.Muon([("qkv", params[0])], views={"qkv": view}, **options)
    apart = [Parameter(block.clone()) for block in matrices(twins[0].detach(), view)]
    twin = steepest.Muon(apart, **options)
    for step in range(3):
        params[0].grad = gradient(params[0], 0, step)
        for param, grad in zip(apart, matrices(params[0].grad, view), strict=True):
            param.grad = grad
        fused.step()
        twin.step()
    assert fused.state[params[0]]["momentum_buffer"].dtype == torch.int8
    for ours, theirs in zip(matrices(params[0].detach(), view), apart, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-3, atol=1e-4)


def test_a_vector_cannot_be_seen_transposed():
    for view in (transposed(), transposed(rows(3))):
        with pytest.raises(
            ValueError, match=r"parameter 'v' has shape \(3,\): a vector cannot be seen trans"
        ):
            steepest.QUAD([("v", Parameter(torch.ones(3)))], views={"v": view})


# -- the contract


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [case for case in VIEWED if deterministic(case)], ids=by_id)
def test_a_fused_parameter_is_its_blocks(case: Case, dtype: torch.dtype):
    """PSGD's noise, which goes by an element's place in its parameter, is compared without: tests/psgd."""
    params = _params(dtype)
    twins = [Parameter(b.clone()) for p, n in zip(params, NAMES, strict=True) for b in _blocks(p.detach(), n)]
    optimizer, twin = _make(case, params), case.make(twins)
    for step in range(4):
        grads = [gradient(param, index, step) for index, param in enumerate(params)]
        parts = [b.clone() for g, n in zip(grads, NAMES, strict=True) for b in _blocks(g, n)]
        for some, theirs in ((params, grads), (twins, parts)):
            for param, grad in zip(some, theirs, strict=True):
                param.grad = grad
        optimizer.step()
        twin.step()
    ours = [block for p, n in zip(params, NAMES, strict=True) for block in _blocks(p.detach(), n)]
    assert identical(ours, [p.detach() for p in twins])


@pytest.mark.parametrize("options", [{}, {"rounding": "stochastic"}, {"state_dtype": torch.float32}], ids=str)
@every_case
def test_it_resumes_exactly(case: Case, options: dict[str, Any]):
    """From a file, a copy and a pickle of the same optimizer: to train one for each takes twice as long."""
    optimizer, straight = (_make(case, _params(torch.bfloat16), **options) for _ in range(2))
    params = _go_on(optimizer, range(2))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = _make(case, [Parameter(param.detach().clone()) for param in params], **options)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    resumed = {
        "file": loaded,
        "deepcopy": copy.deepcopy(optimizer),
        "pickle": pickle.loads(pickle.dumps(optimizer)),
    }
    theirs = _go_on(straight, range(4))
    for how, again in resumed.items():
        assert identical(again.state_dict(), optimizer.state_dict()), how
        _go_on(again, range(2, 4))
        assert identical(again.param_groups[0]["params"], theirs), how
        assert identical(again.state_dict()["state"], straight.state_dict()["state"]), how


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@every_case
def test_a_skipped_step_leaves_every_block(case: Case, value: float):
    optimizer, twin = _make(case, _params(), nonfinite="skip"), _make(case, _params())
    for step in range(3):
        params = optimizer.param_groups[0]["params"]
        for index, param in enumerate(params):
            param.grad = gradient(param, index, 50)
        params[0].grad[-1, -1] = value
        optimizer.step()
        assert identical(_go_on(optimizer, range(step, step + 1)), _go_on(twin, range(step, step + 1)))
    assert optimizer.skipped_steps == 3
    assert identical(optimizer.state_dict()["state"], twin.state_dict()["state"])


@every_case
def test_equal_blocks_round_otherwise(case: Case):
    """Stochastic rounding goes by an element's place in the whole parameter."""
    params = _params(torch.bfloat16)
    with torch.no_grad():
        params[0][4:6] = params[0][6:8]
    optimizer = _make(case, params, rounding="stochastic")
    for step in range(4):
        block = gradient(params[0][:2], 0, step)
        params[0].grad = torch.cat([torch.zeros_like(params[0][:4]), block, block])
        optimizer.step()
    assert not same_bits(params[0][4:6], params[0][6:8])


@pytest.mark.parametrize("name", ["stored", "c_attn"])
def test_noise_goes_by_the_place_in_the_parameter_as_it_is_stored(name: str):
    """A matrix and its transpose have the same polar factor, which must be rounded by the same noise."""

    def trained(view: Any, seed: int = 0) -> Tensor:
        param = make_params(torch.bfloat16, shapes=[(48, 70)])[0]
        options = {"lr": 1.0, "scale": "none", "method": "svd", "rounding": "stochastic", "seed": seed}
        optimizer = steepest.Muon([(name, param)], views=None if view is None else {name: view}, **options)
        param.grad = gradient(param, 0, 0)
        optimizer.step()
        return param.detach()

    plain, turned = (None, transposed()) if name == "stored" else (columns(30, 40), None)
    turned = turned or transposed(columns(30, 40))
    straight, ours, other = trained(plain), trained(turned), trained(plain, seed=1)
    # Where a rounding is as near as can be, a difference of one unit in float32 may turn it.
    assert (ours == straight).float().mean() > 0.99
    assert (other == straight).float().mean() < 0.9


@every_case
def test_state_of_other_blocks_is_refused_and_nothing_changes(case: Case):
    """Where there is state that belongs to a block."""
    optimizer = _make(case, _params())
    params = _go_on(optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    factors = [name for name, value in saved["state"][0].items() if "." in name and value.dim() > 0]
    for name in factors:
        broken = copy.deepcopy(saved)
        broken["state"][0][name] = torch.zeros(7, 7)
        before = snapshot(optimizer, params)
        with pytest.raises(ValueError, match=rf"state '{name}' of parameter 'qkv' has shape \(7, 7\)"):
            optimizer.load_state_dict(broken)
        assert identical(snapshot(optimizer, params), before)


MISFITS = [
    rows(4, 2),
    columns(4),
    ("diagonal", (8,)),
    3,
    rows(8, 8),
    transposed(columns(8)),
    ("whole", (8,), "transposed"),
    ("rows", (8,), "turned"),
    ("rows", (4, 4.0)),
    ("rows", (8,), "transposed", ""),
    ("rows", (2, 2), 2.0),
    ("rows", (8,), 1),
    interleaved(3, rows(2, 1)),
    interleaved(2, along(2, 4)),
]


@for_each("view", MISFITS)
@every_case
def test_a_view_that_does_not_fit_is_refused_by_name(case: Case, view: Any):
    params = [("fine", _params()[2]), ("qkv", _params()[0])]
    with pytest.raises(ValueError, match="parameter 'qkv'"):
        case.make(params, views={"qkv": view})
    optimizer = case.make(params[:1])
    with pytest.raises(ValueError, match="parameter 'qkv'"):
        optimizer.add_param_group({"params": params[1:], "views": {"qkv": view}})
    assert len(optimizer.param_groups) == 1


@every_case
def test_strides_do_not_matter(case: Case):
    params, twins = _params(), _params()
    params = [Parameter(param.detach().mT.contiguous().mT) for param in params]
    optimizer, twin = _make(case, params), _make(case, twins)
    assert identical(_go_on(optimizer, range(3)), _go_on(twin, range(3)))
